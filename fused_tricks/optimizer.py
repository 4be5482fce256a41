"""SGD with FP32 master weights, loss scaling, clipping and bias-excluded weight decay in one fused update."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ._torch import disable_dynamo, has_modes, has_step_hooks
from .backends import check_backend
from .distributed.found_inf_reduction import SharedGroup
from .distributed.sharding import check_flattened
from .loss_scale import DynamicLossScale, parse_loss_scale
from .step.device_state import StepState
from .step.diagnostics import StepDiagnostics
from .step.group_source import check_nothing_is_lost, register_source
from .step.hooks import runs_hooks, with_hooks
from .step.lock import StepLock, one_at_a_time
from .step.masters import masters_in_use, refresh_masters
from .step.new_state import NewState
from .step.overflow import overflowing_parameters
from .step.parameters import named_parameters
from .step.planned_steps import PlannedSteps
from .step.saved_state import Prepared
from .step.shared_memory import device_of, has_memory
from .step.state_dict import SCALE_KEYS
from .step.stats import StepStats
from .validation import (
    check_group,
    check_max_grad_norm,
    check_params,
    check_range,
    lists_biases_to_decay,
)

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class FusedSGD(PlannedSteps):
    """`torch.optim.SGD` for low-precision training, in one fused update.

    FP16 and BF16 parameters have FP32 masters and FP32 momentum buffers in the optimizer's state (Bag of Tricks, arXiv
    1812.01187, section 3). FP32 and FP64 parameters are updated in place in their own dtype. A gradient may be FP32
    beside an FP16 or BF16 parameter, and FP16 or BF16 beside an FP32 one (`Tensor.grad_dtype`). Gradients are read and
    never written. A step updates the weight `w` (the master, or the parameter without a master) and the momentum
    buffer `b`. Each operation is rounded as written, and `fma` is rounded once:

        g = grad * (1 / scale)                           with a loss scale
        g = g * min(1, max_grad_norm / (norm + 1e-6))    with max_grad_norm
        g = -g                                           with maximize
        w = w * (1 - lr * weight_decay)                  decay, decoupled
        g = fma(weight_decay, w, g)                      decay, coupled
        b = g                                            first update of this parameter
        b = fma(1 - dampening, g, momentum * b)          later updates
        d = fma(momentum, b, g) if nesterov else b       d = g without momentum
        w = fma(-lr, d, w)
        param = round_to_nearest_even(w)                 parameters in FP16 and BF16
        e = w                                            with ema_decay, first update of this average
        e = lerp(e, w, 1 - ema_decay)                    later updates

    With FP32 parameters, `loss_scale=None` and `bias_decay=True`, the result equals `torch.optim.SGD(foreach=False)`
    bit for bit. Expanded gradients (with a stride of 0) are an exception, because torch rounds them differently,
    depending on the processor.

    With a loss scale or `max_grad_norm`, a step is skipped if any gradient element is not finite. A skipped step
    changes only the scale and the counters. With `loss_scale=None`, a `torch.amp.GradScaler` may call the step, and
    the update applies its `grad_scale` and `found_inf`.

    User code may write to an FP16 or BF16 parameter between steps: under `torch.no_grad()`, by `load_state_dict`, or by
    assigning `.data`. The next step continues from the new values. `refresh_masters` lists writes that the step cannot
    detect.

    Parameters that share memory are updated one after the other by `backend="reference"`, as in `torch.optim.SGD`. FP16
    and BF16 parameters must not share memory. Parameters on `meta` and `FakeTensor`s get the same state as real
    parameters. Concurrent steps of several threads run one after the other.

    A `UserWarning` is issued once for each optimizer, if the optimizer has a loss scale and `scale` is never called; if
    FP16 gradients have neither a loss scale nor a `GradScaler` (`loss_scale=1.0` turns this warning off); and after 25
    skipped steps in a row with a static loss scale, with a dynamic loss scale at its floor, or without a loss scale.

    All options from `lr` to `ema_warmup` may differ between groups.

    Args:
        params: Tensors, `(name, tensor)` pairs as from `named_parameters()`, or dicts that define groups.
        lr: Learning rate, a number or a tensor of one element.
        momentum: Momentum factor.
        dampening: Dampening for momentum. The first update of a parameter ignores dampening.
        weight_decay: Weight decay factor, a number or a tensor of one element.
        nesterov: True for Nesterov momentum, which requires momentum and no dampening.
        maximize: True to ascend instead of descend.
        bias_decay: True to decay parameters of one dimension or fewer (biases, γ and β of norms) as well, as in
            `torch.optim.SGD`. False is the "no bias decay" of Bag of Tricks, section 3.1. A group that contains only
            such parameters and states a `weight_decay` above 0 gets `bias_decay=True`, unless it states `bias_decay`.
        decoupled_weight_decay: True to multiply a decaying weight by `1 - lr * weight_decay` before the update, as in
            `torch.optim.AdamW` and, bit for bit, timm's `SGDW`. False to add `weight_decay` times the weight to the
            gradient, as in `torch.optim.SGD`.
        ema_decay: The decay of an exponential moving average of the weights, from 0 to 1, or None for no average. The
            average is in FP32 (FP64 for an FP64 parameter), as `ema_param` in the optimizer's state. `ema_weights`
            evaluates with the averages, and `ema_state_dict` exports them. Without skipped steps, the average of FP32
            weights equals `torch.optim.swa_utils.AveragedModel` with `get_ema_multi_avg_fn(ema_decay)` bit for bit.
            The average moves only in updates of its parameter.
        ema_warmup: True for a decay of `min(ema_decay, (1 + t) / (10 + t))`, where `t` is the number of applied
            updates, this update included.
        loss_scale: None, a positive number (a static scale), `"dynamic"`, or a `DynamicLossScale`.
        max_grad_norm: Clips by this global L2 norm, as `torch.nn.utils.clip_grad_norm_`, without a write to the
            gradients. `inf` only measures. Each backend sums the squares in a fixed order, in FP64 or in pairs of FP32
            numbers that keep more than 40 bits, so equal gradients give equal bits. Norms of two backends may differ in
            the last bit: rarely in FP32, and often with FP64 gradients, whose norm and clip factor are FP64.
        partition_group: The process group over which the model's parameters are partitioned, if each process has an
            optimizer for its own part, as with `ZeroRedundancyOptimizer` or pipeline stages. An overflow in one process
            skips the step in all processes, and all clip by the norm of all gradients. Every process must call `step`
            equally often. `DTensor`s require no group, because their device meshes define the processes.
        backend: `"auto"`, or a name that `python -m fused_tricks` lists.
        foreach: Ignored; for compatibility with `torch.optim.SGD`.
        fused: Ignored; for compatibility with `torch.optim.SGD`, which also refuses `fused` with `foreach`.
        differentiable: Must be False.

    Raises:
        TypeError: An option has the wrong type.
        ValueError: An option is outside its range, or a group is malformed.
        RuntimeError: The backend is unusable here, `foreach` and `fused` are both True, or the groups are from another
            `FusedSGD` whose loss scale, clipping or partition group the new optimizer would lose.

    Example:
        ```python
        import torch
        import fused_tricks as ft

        model = ft.cast_model(torch.nn.Linear(4, 2), torch.float16)
        optimizer = ft.FusedSGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4, loss_scale="dynamic")
        loss = model(torch.randn(8, 4)).square().mean()
        optimizer.scale(loss).backward()
        optimizer.step()
        optimizer.zero_grad()
        ```
    """

    # torch.amp.GradScaler passes `grad_scale` and `found_inf` to an optimizer with this attribute.
    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | Tensor = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        bias_decay: bool = False,
        decoupled_weight_decay: bool = False,
        ema_decay: float | None = None,
        ema_warmup: bool = False,
        loss_scale: float | str | DynamicLossScale | None = None,
        max_grad_norm: float | None = None,
        partition_group: ProcessGroup | None = None,
        backend: str = "auto",
        foreach: bool | None = None,
        fused: bool | None = None,
        differentiable: bool = False,
    ) -> None:
        check_params(params)
        if fused and foreach:
            raise RuntimeError("`fused` and `foreach` cannot be `True` together.")
        check_backend(backend)
        check_max_grad_norm(max_grad_norm)
        loss_scale = parse_loss_scale(loss_scale)
        settings = {
            "loss_scale": loss_scale,
            "max_grad_norm": max_grad_norm,
            "partition_group": partition_group,
        }
        params = check_nothing_is_lost(params, settings)
        self._max_grad_norm = max_grad_norm
        self._loss_scale = loss_scale
        self._partition = SharedGroup(partition_group)
        self._backend = backend
        self._backend_in_use: str | None = None
        self._prepared: Prepared | None = None
        self._new_state = NewState()
        self._lock = StepLock()
        self._lends_weights = False
        super().__init__(
            params,
            {
                "lr": lr,
                "momentum": momentum,
                "dampening": dampening,
                "weight_decay": weight_decay,
                "nesterov": nesterov,
                "maximize": maximize,
                "bias_decay": bias_decay,
                "decoupled_weight_decay": decoupled_weight_decay,
                "ema_decay": ema_decay,
                "ema_warmup": ema_warmup,
                "foreach": foreach,
                "differentiable": differentiable,
                "fused": fused,
            },
        )
        if isinstance(loss_scale, DynamicLossScale):
            self._step_state = loss_scale.bind(self)
        else:
            self._step_state = StepState(scale=1.0 if loss_scale is None else loss_scale)
        self._diagnostics = StepDiagnostics(loss_scale, self._step_state)
        params = [param for group in self.param_groups for param in group["params"]]
        self._step_state.move_to(device_of(params, self._step_state.block.device))
        register_source(self)

    @property
    def loss_scale(self) -> float | DynamicLossScale | None:
        """The loss scaling: None, the static scale, or the `DynamicLossScale`."""
        self._step_state.scale_was_read = True
        return self._loss_scale

    @property
    def backend(self) -> str:
        """The name of the backend of the last plan; before the first step, the argument `backend`."""
        return self._backend_in_use or self._backend

    def __repr__(self) -> str:
        name = type(self).__name__
        own = {
            "backend": self.backend,
            "loss_scale": self._loss_scale,
            "max_grad_norm": self._max_grad_norm,
        }
        lines = "".join(f"\n{key}: {value}" for key, value in own.items())
        return f"{name} ({lines}" + super().__repr__().removeprefix(f"{name} (")

    @property
    def max_grad_norm(self) -> float | None:
        """The global norm that gradients are clipped to, or None. May be assigned."""
        return self._max_grad_norm

    @max_grad_norm.setter
    def max_grad_norm(self, max_grad_norm: float | None) -> None:
        check_max_grad_norm(max_grad_norm)
        self._max_grad_norm = max_grad_norm

    def scale(self, loss: Tensor) -> Tensor:
        """Returns the loss times the loss scale, without a sync; `loss` itself without loss scaling.

        Args:
            loss: A floating-point tensor of any shape. FP16 and BF16 losses are converted to FP32, because the product
                may overflow FP16.

        Raises:
            TypeError: `loss` is not a floating-point tensor.
        """
        if not isinstance(loss, Tensor) or not loss.is_floating_point():
            raise TypeError(f"loss must be a floating-point tensor, got {torch.typename(loss)}")
        if self._loss_scale is None:
            return loss
        self._step_state.scale_was_read = True
        scale = self._step_state.scale
        if not torch.compiler.is_compiling() and not has_memory(loss):
            scale = loss.new_ones((), dtype=torch.float32)
        if scale.device != loss.device:
            scale = scale.to(loss.device, non_blocking=True)
        # Autograd keeps the factor. A copy stays valid for a retained graph when the step changes the scale.
        return (loss.float() if loss.dtype in (torch.float16, torch.bfloat16) else loss) * scale.clone()

    # torch.compile would trace build_plan, with a guard for every tensor.
    @disable_dynamo
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates every parameter that has a gradient.

        Args:
            closure: A function that reevaluates the model and returns the loss, as in `torch.optim.SGD`. Not allowed
                with loss scaling.

        Returns:
            The result of the closure, or None.

        Raises:
            RuntimeError: A closure is combined with loss scaling, a `GradScaler` is combined with `loss_scale`, or a
                parameter or gradient cannot be updated. No parameter and no state is changed then.
            KeyError, TypeError, ValueError: An option of a group is missing or not valid. No parameter and no state is
                changed then.
        """
        try:
            if has_step_hooks(self) and runs_hooks(FusedSGD._own_step, self):
                return self._observed_step() if closure is None else self._observed_step(closure)
            return self._step(closure)
        except BaseException:
            # If step() raises, GradScaler leaves grad_scale behind and would multiply it into the next one.
            self.__dict__.pop("grad_scale", None)
            self.__dict__.pop("found_inf", None)
            raise

    # Prevents the base class from wrapping `step` in a profiler range, which costs several times the step's host time.
    step.hooked = True  # type: ignore[attr-defined]
    _own_step = staticmethod(step)

    # torch decorates the `step` of a subclass with this function.
    profile_hook_step = staticmethod(with_hooks)

    def _step(self, closure: Callable[[], Any] | None = None) -> Any:
        request = self._request()
        loss = None
        if closure is not None:
            loss = self._evaluate(closure, request)
        if torch.is_inference_mode_enabled() or has_modes():
            with self._ordinary_tensors():
                self._fill_or_update(request)
        else:
            self._fill_or_update(request)
        return loss

    _observed_step = Optimizer.profile_hook_step(_step)

    @one_at_a_time
    def stats(self) -> StepStats:
        """Returns the loss scale, the counters and the last norm as `StepStats`. Synchronises with the device."""
        self._step_state.scale_was_read = True
        reading = self._step_state.read()
        return StepStats.of(reading, self._loss_scale is not None, self._max_grad_norm is not None)

    @one_at_a_time
    def find_overflow(self) -> list[str]:
        """Returns the names of the parameters whose present gradients have an infinite or NaN element.

        After a skipped step and before `zero_grad()`, these gradients are the reason for the skip. Reads the gradients
        once, changes nothing, and synchronises with the device once. Gradients without memory do not count. A name is
        `layer.weight` if the optimizer was given `named_parameters()`, otherwise `parameter 3 of group 0`.

        With `DTensor`s, a `partition_group` or FSDP1 the names are those of this process: the call searches only the
        elements that this process has, and does not communicate. The list is empty on a process that skips because of
        another process.

        Returns:
            The names, in the order of the parameters; an empty list if all gradients are finite.

        Example:
            ```python
            import torch
            import fused_tricks as ft

            model = torch.nn.Linear(4, 2)
            optimizer = ft.FusedSGD(model.named_parameters(), lr=0.1, loss_scale="dynamic")
            optimizer.scale(model(torch.full((1, 4), torch.inf)).sum()).backward()
            optimizer.step()
            if optimizer.stats().last_step_skipped:
                print(optimizer.find_overflow())  # ['weight']
            ```
        """
        return overflowing_parameters(self.param_groups)

    @one_at_a_time
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, as in `torch.optim.Optimizer.add_param_group`.

        Args:
            param_group: A dict with `params` and the options of the group. Missing options get the optimizer's
                defaults.

        Raises:
            TypeError, ValueError: The group or one of its options is not valid. The group is not added then.
        """
        if isinstance(param_group, dict):
            if "params" in param_group:
                check_params(param_group["params"], of_group=True)
            check_group({**self.defaults, **param_group})
        stated = set(param_group) if isinstance(param_group, dict) else set()
        super().add_param_group(param_group)
        if lists_biases_to_decay(self.param_groups[-1], stated):
            self.param_groups[-1]["bias_decay"] = True
        for key in SCALE_KEYS:
            self.param_groups[-1].pop(key, None)
        try:
            check_range(self.param_groups[-1])
            self._check_flattened(len(self.param_groups) - 1)
        except ValueError:
            self.param_groups.pop()
            raise
        self._prepared = None

    def _check_flattened(self, index: int) -> None:
        listed = named_parameters(self.param_groups)
        decides = self._loss_scale is not None or self._max_grad_norm is not None
        check_flattened(
            [(name, param) for name, param, group in listed if group == index],
            self.param_groups[index],
            decides and self._partition.group is None,
        )

    @one_at_a_time
    def refresh_masters(self) -> None:
        """Resynchronises the FP32 masters after writes to FP16 and BF16 parameters that the step cannot detect.

        The step detects writes that change a parameter's version counter or address. Call this method after a write by
        other means: in place through `param.data`, through a NumPy array or DLPack tensor that shares memory, by
        `param.untyped_storage().copy_()`, through another `Parameter` that shares memory, or by another process. A
        master keeps its FP32 value where the parameter is the rounding of the master. Does not synchronise.

        Raises:
            RuntimeError: The storage of a parameter or master was resized. No master is changed then.

        Example:
            ```python
            import torch
            import fused_tricks as ft

            model = torch.nn.Linear(4, 2).half()
            optimizer = ft.FusedSGD(model.parameters(), lr=0.1, loss_scale="dynamic")
            model.weight.data.mul_(0.5)
            optimizer.refresh_masters()
            ```
        """
        self._check_has_its_weights()
        refresh_masters(masters_in_use(self.param_groups, self._state), self._new_state)
