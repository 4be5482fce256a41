"""SGD with FP32 master weights, loss scaling, clipping and bias-excluded weight decay in one fused update."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ._torch import disable_dynamo, has_modes, has_step_hooks, is_asked_for_state
from .backends import BACKENDS, REFERENCE, check_backend, choose_backend
from .distributed.found_inf_reduction import SharedGroup, find_reduction
from .distributed.sharding import check_flattened
from .loss_scale import DynamicLossScale, parse_loss_scale
from .step.device_state import StepState
from .step.diagnostics import StepDiagnostics
from .step.group_source import check_nothing_is_lost, register_source
from .step.hooks import runs_hooks, with_hooks
from .step.lock import StepLock, one_at_a_time
from .step.masters import masters_in_use, refresh_masters
from .step.new_state import NewState
from .step.optimizer_state import SCALE_KEYS
from .step.parameters import named_parameters
from .step.plan import build_plan
from .step.request import Outcome, StepRequest, step_request
from .step.saved_state import Prepared, SavedState
from .step.shared_memory import device_of, has_memory
from .step.stats import StepStats
from .validation import (
    check_group,
    check_max_grad_norm,
    check_numbers,
    check_params,
    check_range,
    check_readable,
    is_zero,
    lists_biases_to_decay,
)

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class FusedSGD(SavedState):
    """`torch.optim.SGD` for low-precision training, as one pass over every parameter.

    Parameters in FP16 or BF16 are updated through FP32 master weights and momentum, which live in the optimizer's
    state; FP32 and FP64 parameters are updated in place in their own type (Bag of Tricks, arXiv 1812.01187, section
    3). The roundings are those of `torch.optim.SGD(foreach=False)`: with FP32 parameters, `loss_scale=None` and
    `bias_decay=True` the results are equal bit for bit, except where a gradient has been expanded (it has a stride of
    0), which torch's loops round otherwise in places that depend on the processor. Gradients are read and never
    written. One step updates the weight `w` (the FP32 master of a parameter in FP16 or BF16, otherwise the parameter)
    and the momentum buffer `b`; each line is one rounding:

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

    Parameters that share memory are updated one after the other, as `torch.optim.SGD` does, by
    `backend="reference"`; FP16 and BF16 parameters that do are refused. Parameters on `meta` and `FakeTensor`s
    get the state that real ones would. Steps of several threads wait for each other.

    A step in which any gradient element is not finite is skipped where gradients are scanned, that is with a loss
    scale or `max_grad_norm`: it changes nothing but the scale and the counters. `loss_scale=None` works under a
    `torch.amp.GradScaler`, whose unscaling and verdict are taken into the update.

    A low-precision parameter may be written to between steps (under `torch.no_grad()`, by `load_state_dict`, or
    with a new `.data`); the next step continues from the new values. Some writes go unnoticed; call
    `refresh_masters` after them.

    Mistakes that raise no error are warned of, once for each optimizer: a loss scale although `scale` is never
    called; FP16 gradients with neither a loss scale nor a `GradScaler`, where `loss_scale=1.0` states that none is
    wanted; and 25 skipped steps in a row with a static loss scale or with a dynamic one at its floor.

    Args:
        params: Tensors, `(name, tensor)` pairs as of `named_parameters()`, or dicts that define groups.
        lr: Learning rate, a number or a tensor of one element.
        momentum: Momentum factor.
        dampening: Dampening for momentum; it does not apply to a parameter's first update.
        weight_decay: L2 penalty.
        nesterov: Nesterov momentum; needs momentum and no dampening.
        maximize: Ascend instead of descend.
        bias_decay: Whether parameters of one dimension or fewer (biases, norms' γ and β) are decayed as well. False
            is the paper's "no bias decay" (section 3.1), True the behaviour of `torch.optim.SGD`. A group of nothing
            but such parameters that states a `weight_decay` above zero itself means it: it gets
            `bias_decay=True`, unless it states `bias_decay` as well.
        decoupled_weight_decay: True multiplies a weight that decays by `1 - lr * weight_decay` before the update, and
            leaves the gradient alone, as `torch.optim.AdamW` does and, bit for bit, timm's `SGDW`. False adds
            `weight_decay` times the weight to the gradient, as `torch.optim.SGD` does.
        loss_scale: None, a positive number (a static scale), `"dynamic"`, or a `DynamicLossScale`.
        max_grad_norm: Clip gradients to this global L2 norm, as `torch.nn.utils.clip_grad_norm_`, without writing
            to them; `inf` only measures. Squares are summed in FP64 (on a GPU partly in pairs of FP32 numbers that
            keep more than 40 bits), in an order that each backend fixes: the same backend gives the same bits for the
            same gradients, and two backends may, rarely, differ in the last bit of the FP32 norm, and so in the bits of
            what they clip. With FP64 gradients norm and factor are FP64, and backends often differ in their last bits.
        partition_group: The processes among which the model's parameters are partitioned, each with an optimizer of its
            own, as `ZeroRedundancyOptimizer` and pipeline stages have them: an overflow in one of them skips the step
            in all, and they clip by the norm of all their gradients. All of them must then call `step` equally often.
            What is divided as `DTensor`s needs no group: their meshes say with whom to agree.
        backend: `"auto"`, or one of the names that `python -m fused_tricks` lists.
        foreach: Accepted as `torch.optim.SGD` does; chooses nothing.
        fused: Accepted as `torch.optim.SGD` does, though not together with `foreach`; chooses nothing.
        differentiable: Must be False.

    All options up to `decoupled_weight_decay` may differ between groups.

    Raises:
        TypeError: An option has the wrong type.
        ValueError: An option is outside its range, or a group is malformed.
        RuntimeError: The backend is not usable here, `foreach` and `fused` are both True, or the groups are those
            of another FusedSGD with a loss scale, clipping or partition group, which this one would not have.
    """

    # torch.amp.GradScaler hands `grad_scale` and `found_inf` to an optimizer that has this.
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
        """The loss scaling in use: None, the static scale, or the `DynamicLossScale`."""
        self._step_state.scale_was_read = True
        return self._loss_scale

    @property
    def backend(self) -> str:
        """The name of the backend that runs the steps; before the first step, the one asked for, such as `"auto"`."""
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
        """The norm that gradients are clipped to, or None; it may be assigned."""
        return self._max_grad_norm

    @max_grad_norm.setter
    def max_grad_norm(self, max_grad_norm: float | None) -> None:
        check_max_grad_norm(max_grad_norm)
        self._max_grad_norm = max_grad_norm

    def scale(self, loss: Tensor) -> Tensor:
        """The loss times the loss scale, on the device and without a sync; `loss` itself without loss scaling.

        Args:
            loss: A floating-point tensor of any shape. FP16 and BF16 are multiplied in FP32, where the product
                cannot overflow.

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
        # A copy, because the step changes the scale before autograd is through with a retained graph.
        return (loss.float() if loss.dtype in (torch.float16, torch.bfloat16) else loss) * scale.clone()

    # torch.compile would trace the making of a plan, and guard it by every tensor in it.
    @disable_dynamo
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates every parameter that has a gradient.

        Args:
            closure: Reevaluates the model and returns the loss, as in `torch.optim.SGD`.

        Returns:
            What the closure returns, or None.

        Raises:
            RuntimeError: A closure came together with loss scaling, a `GradScaler` together with `loss_scale`,
                or a parameter or gradient that cannot be updated; the message names it. Nothing is changed then.
        """
        try:
            if has_step_hooks(self) and runs_hooks(FusedSGD._own_step, self):
                return self._observed_step() if closure is None else self._observed_step(closure)
            return self._step(closure)
        except BaseException:
            # GradScaler removes what it hands over only after a step that returns, and multiplies what it finds.
            self.__dict__.pop("grad_scale", None)
            self.__dict__.pop("found_inf", None)
            raise

    # The base class would wrap every step in a profiler range, at several times the cost of the step itself.
    step.hooked = True  # type: ignore[attr-defined]
    _own_step = staticmethod(step)

    # torch wraps the step of a class that overrides it in this.
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

    def _fill_or_update(self, request: StepRequest) -> None:
        with self._lock:
            if not self._state and self._has_no_rate() and is_asked_for_state():
                self._fill_state()
            else:
                self._update(request)

    def _has_no_rate(self) -> bool:
        """True if every learning rate is known to be 0, as `torch.distributed.checkpoint` sets it to get state."""
        return all(is_zero(group["lr"]) for group in self.param_groups)

    def _evaluate(self, closure: Callable[[], Any], request: StepRequest) -> Any:
        if request.unscales or "found_inf" in self.__dict__:
            raise RuntimeError(
                "a closure cannot be combined with loss scaling: the optimizer cannot tell whether the closure "
                "scales its loss; call backward() yourself and step() without a closure"
            )
        with torch.enable_grad():
            return closure()

    def _update(self, request: StepRequest) -> None:
        try:
            redistributed: dict[Tensor, Tensor] = {}
            outcome = self._run(request, redistributed)
            if outcome == Outcome.STALE:
                self._prepared = self._prepare()
                outcome = self._run_first(self._prepared, request, redistributed)
        except (KeyError, TypeError, ValueError, OverflowError, RuntimeError):
            # A backend fails on an option that is no number, and knows neither its name nor what is allowed.
            for index, group in enumerate(self.param_groups):
                check_readable(f"group {index}", group)
                check_numbers(group)
                check_range(group)
            raise
        if outcome == Outcome.SKIPPED:
            self._diagnostics.after_skip()
        elif self._prepared is not None and self._prepared.stepper.is_async:
            self._diagnostics.after_launch()

    def _run_first(
        self, prepared: Prepared, request: StepRequest, redistributed: dict[Tensor, Tensor]
    ) -> int:
        """Runs the first step over a new plan, whose new state is withdrawn if the step is refused."""
        applied_steps = self._step_state.read().applied_steps if prepared.plan.placed else 0
        try:
            self._diagnostics.before_update(
                prepared.plan, "found_inf" in self.__dict__, self._partition.group is not None
            )
            outcome = self._run(request, redistributed)
            if outcome == Outcome.STALE:
                raise RuntimeError(
                    "parameters, gradients or state changed while the step was being prepared; leave them alone in "
                    "other threads, and in what the step calls"
                )
        except BaseException:
            if prepared.plan.placed and self._step_state.read().applied_steps == applied_steps:
                prepared.plan.withdraw_state(self._state)
                self._prepared = None
            raise
        return outcome

    def _fill_state(self) -> None:
        """Creates the state of every parameter that has a gradient, as it is before the first update."""
        plan = self._prepare().plan
        for entry in plan.entries:
            if entry.live:
                self._state.setdefault(entry.param, {})
        self._note_progress()

    def _prepare(self) -> Prepared:
        listed = [(name, param) for name, param, _ in named_parameters(self.param_groups)]
        # Those without a gradient do not matter, unless there are no others.
        named = [(name, param) for name, param in listed if param.grad is not None] or listed
        backend = choose_backend(self._backend, named)
        device = device_of([param for _, param in named], self._step_state.block.device)
        reduction = find_reduction([param for _, param in listed], self._partition.group, device)
        former = None if self._prepared is None else self._prepared.plan
        plan = build_plan(
            self.param_groups, self._state, self._step_state, self._new_state, device, former, reduction
        )
        try:
            if plan.is_in_order:
                backend = REFERENCE
            self._step_state.move_to(device)
            stepper = BACKENDS[backend].stepper(plan, self._step_state)
        except BaseException:
            plan.withdraw_state(self._state)
            raise
        # Another thread may have given a parameter other memory, which the plan would not keep.
        plan.is_outdated = not plan.keeps_its_memory()
        self._backend_in_use = backend
        return Prepared(plan, stepper)

    _observed_step = Optimizer.profile_hook_step(_step)

    def _run(self, request: StepRequest, redistributed: dict[Tensor, Tensor]) -> int:
        if self._prepared is None or self._prepared.plan.is_outdated:
            return Outcome.STALE
        plan, stepper = self._prepared
        if not plan.stand_ins:
            return stepper.step(self.param_groups, self._state, request)
        with torch.no_grad(), plan.stand_ins.filled(redistributed) as are_filled:
            if not are_filled:
                return Outcome.STALE
            outcome = stepper.step(self.param_groups, self._state, request)
            if outcome == Outcome.APPLIED:
                plan.stand_ins.write_back()
            return outcome

    def _request(self) -> StepRequest:
        # Not attributes of the class: GradScaler multiplies what it finds under `grad_scale`.
        grad_scale, found_inf = self.__dict__.get("grad_scale"), self.__dict__.get("found_inf")
        return step_request(self._loss_scale, self._max_grad_norm, grad_scale, found_inf)

    @one_at_a_time
    def stats(self) -> StepStats:
        """Returns scale, counters and the last norm. Synchronises with the device, which `step` never does."""
        self._step_state.scale_was_read = True
        reading = self._step_state.read()
        return StepStats.of(reading, self._loss_scale is not None, self._max_grad_norm is not None)

    def _replan(self) -> None:
        """Makes the next step begin with a new plan."""
        if self._prepared is not None:
            self._prepared.plan.is_outdated = True

    @one_at_a_time
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, as `torch.optim.Optimizer.add_param_group`.

        Raises:
            TypeError, ValueError: The group or one of its options is not valid. It is not added then.
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
        """Takes over, into the FP32 masters, values that were written to FP16 and BF16 parameters without notice.

        Call it after a write that does not change the parameter's version counter or address: through `param.data`
        in place, a NumPy array or DLPack tensor over its memory, `param.untyped_storage().copy_()`, another
        `Parameter` over its memory, or by another process. All other writes are noticed by the next step. Elements
        that are the rounding of their master keep it, in FP32. Nothing synchronises. Example:

            model.conv.weight.data.mul_(0.5)
            optimizer.refresh_masters()
        """
        refresh_masters(masters_in_use(self.param_groups, self._state))
