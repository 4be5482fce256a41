"""SGD with FP32 master weights, loss scaling, clipping and bias-excluded weight decay in one fused update."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Callable
from copy import copy, deepcopy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.optim import Optimizer

from .agreement import SharedGroup, find_agreement
from .applied_rate import write_rates_as_numbers
from .backends import BACKENDS, Stepper, check_backend, stepper_class
from .backends.request import Outcome, StepRequest
from .checkpoint import COUNTERS, SCALE_KEYS, import_state, is_asked_for_state
from .hyper_parameters import check_group, check_max_grad_norm, check_numbers
from .loss_scale import DynamicLossScale, check_count, parse_loss_scale
from .parameters import MOMENTUM_BUFFER, named_parameters
from .plan import Plan, build_plan
from .sharding import check_flattened, local_part
from .shared_memory import device_of, has_memory
from .step_hooks import is_observed, runs_hooks, with_hooks
from .step_lock import StepLock, one_at_a_time
from .step_state import StepState
from .step_stats import StepStats

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class FusedSGD(Optimizer):
    """``torch.optim.SGD`` for low-precision training, as one pass over every parameter.

    Parameters in FP16 or BF16 are updated through FP32 master weights and momentum, which live in the optimizer's
    state; FP32 and FP64 parameters are updated in place in their own type (Bag of Tricks, arXiv 1812.01187, section
    3). The roundings are those of ``torch.optim.SGD(foreach=False)``: with FP32 parameters, ``loss_scale=None`` and
    ``bias_decay=True`` the results are equal bit for bit, except where a gradient has been expanded (it has a stride of
    0), which torch's loops round otherwise in places that depend on the processor. Gradients are read and never
    written.

    Parameters that share memory are updated one after the other, as ``torch.optim.SGD`` does, by
    ``backend="reference"``; FP16 and BF16 parameters that do are refused. Parameters on ``meta`` and ``FakeTensor``s
    get the state that real ones would. Steps of several threads wait for each other.

    A step in which any gradient element is not finite is skipped where gradients are scanned, that is with a loss
    scale or ``max_grad_norm``: it changes nothing but the scale and the counters. ``loss_scale=None`` works under a
    ``torch.amp.GradScaler``, whose unscaling and verdict are taken into the update.

    A low-precision parameter may be written to between steps (under ``torch.no_grad()``, by ``load_state_dict``, or
    with a new ``.data``); the next step continues from the new values. Writing through ``param.data`` in place is
    not noticed.

    Args:
        params: Tensors, ``(name, tensor)`` pairs as of ``named_parameters()``, or dicts that define groups.
        lr: Learning rate, a number or a tensor of one element.
        momentum: Momentum factor.
        dampening: Dampening for momentum; it does not apply to a parameter's first update.
        weight_decay: L2 penalty.
        nesterov: Nesterov momentum; needs momentum and no dampening.
        maximize: Ascend instead of descend.
        bias_decay: Whether parameters of one dimension or fewer (biases, norms' γ and β) are decayed as well. False
            is the paper's "no bias decay" (section 3.1), True the behaviour of ``torch.optim.SGD``.
        loss_scale: None, a positive number (a static scale), ``"dynamic"``, or a :class:`DynamicLossScale`.
        max_grad_norm: Clip gradients to this global L2 norm, as ``torch.nn.utils.clip_grad_norm_``, without writing
            to them; ``inf`` only measures. Squares are summed in FP64 in an order that each backend fixes: the same
            backend gives the same bits for the same gradients, and two backends may, rarely, differ in the last bit
            of the FP32 norm, and so in the bits of what they clip.
        partition_group: The processes among which the model's parameters are partitioned, each with an optimizer of its
            own, as ``ZeroRedundancyOptimizer`` and pipeline stages have them: an overflow in one of them skips the step
            in all, and they clip by the norm of all their gradients. All of them must then call ``step`` equally often.
            What is divided as ``DTensor``s needs no group: their meshes say with whom to agree.
        backend: ``"auto"``, or one of the names that ``python -m fused_tricks`` lists.
        foreach: Accepted as ``torch.optim.SGD`` does; chooses nothing.
        fused: Accepted as ``torch.optim.SGD`` does; chooses nothing.
        differentiable: Must be False.

    All options up to ``bias_decay`` may differ between groups.

    Raises:
        TypeError: An option has the wrong type.
        ValueError: An option is outside its range, or a group is malformed.
        RuntimeError: The backend is not usable here.
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
        loss_scale: float | str | DynamicLossScale | None = None,
        max_grad_norm: float | None = None,
        partition_group: ProcessGroup | None = None,
        backend: str = "auto",
        foreach: bool | None = None,
        fused: bool | None = None,
        differentiable: bool = False,
    ) -> None:
        check_backend(backend)
        check_max_grad_norm(max_grad_norm)
        loss_scale = parse_loss_scale(loss_scale)
        self._max_grad_norm = max_grad_norm
        self._loss_scale = loss_scale
        self._partition = SharedGroup(partition_group)
        self._backend = backend
        self._stepper: Stepper | None = None
        self._plan: Plan | None = None
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
                "foreach": foreach,
                "differentiable": differentiable,
                "fused": fused,
            },
        )
        if isinstance(loss_scale, DynamicLossScale):
            self._step_state = loss_scale.bind(self)
        else:
            self._step_state = StepState(scale=1.0 if loss_scale is None else loss_scale)
        params = [param for group in self.param_groups for param in group["params"]]
        self._step_state.move_to(device_of(params, self._step_state.block.device))

    @property
    def loss_scale(self) -> float | DynamicLossScale | None:
        """The loss scaling in use: None, the static scale, or the :class:`DynamicLossScale`."""
        return self._loss_scale

    @property
    def max_grad_norm(self) -> float | None:
        """The norm that gradients are clipped to, or None; it may be assigned."""
        return self._max_grad_norm

    @max_grad_norm.setter
    def max_grad_norm(self, max_grad_norm: float | None) -> None:
        check_max_grad_norm(max_grad_norm)
        self._max_grad_norm = max_grad_norm

    def scale(self, loss: Tensor) -> Tensor:
        """The loss times the loss scale, on the device and without a sync; ``loss`` itself without loss scaling.

        Args:
            loss: A floating-point tensor of any shape. FP16 and BF16 are multiplied in FP32, where the product
                cannot overflow.

        Raises:
            TypeError: ``loss`` is not a floating-point tensor.
        """
        if not isinstance(loss, Tensor) or not loss.is_floating_point():
            raise TypeError(f"loss must be a floating-point tensor, got {torch.typename(loss)}")
        if self._loss_scale is None:
            return loss
        scale = self._step_state.scale
        if not torch.compiler.is_compiling() and not has_memory(loss):
            scale = loss.new_ones((), dtype=torch.float32)
        if scale.device != loss.device:
            scale = scale.to(loss.device, non_blocking=True)
        # A copy, because the step changes the scale before autograd is through with a retained graph.
        return (loss.float() if loss.dtype in (torch.float16, torch.bfloat16) else loss) * scale.clone()

    # torch.compile would trace the making of a plan, and guard it by every tensor in it. torch.compiler.disable does
    # the same, but imports the compiler here and now.
    @_disable_dynamo
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates every parameter that has a gradient.

        Args:
            closure: Reevaluates the model and returns the loss, as in ``torch.optim.SGD``.

        Returns:
            What the closure returns, or None.

        Raises:
            RuntimeError: A closure came together with loss scaling, a ``GradScaler`` together with ``loss_scale``,
                or a parameter or gradient that cannot be updated; the message names it. Nothing is changed then.
        """
        try:
            if is_observed(self) and runs_hooks(FusedSGD.step, self):
                return self._observed_step() if closure is None else self._observed_step(closure)
            return self._step(closure)
        except BaseException:
            # GradScaler removes what it hands over only after a step that returns, and multiplies what it finds.
            self.__dict__.pop("grad_scale", None)
            self.__dict__.pop("found_inf", None)
            raise

    # The base class would wrap every step in a profiler range, at several times the cost of the step itself.
    step.hooked = True  # type: ignore[attr-defined]

    # torch wraps the step of a class that overrides it in this.
    profile_hook_step = staticmethod(with_hooks)

    def _step(self, closure: Callable[[], Any] | None = None) -> Any:
        request = self._request()
        loss = None
        if closure is not None:
            loss = self._evaluate(closure, request)
        with self._lock:
            if not self.__dict__["state"] and is_asked_for_state():
                self._fill_state()
            else:
                self._update(request)
        return loss

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
            placed: dict[Tensor, Tensor] = {}
            outcome = self._run(request, placed)
            if outcome is Outcome.STALE:
                self._stepper, self._plan = self._prepare()
                outcome = self._run(request, placed)
        except (KeyError, TypeError, ValueError, RuntimeError):
            # A backend fails on an option that is no number, and knows neither its name nor what is allowed.
            for group in self.param_groups:
                check_numbers(group)
            raise
        if outcome is Outcome.STALE:
            raise RuntimeError(
                "parameters, gradients or state changed while the step was being prepared; leave them alone in other "
                "threads, and in what the step calls"
            )
        if outcome is Outcome.APPLIED and self._plan is not None and self._plan.new:
            assert self._stepper is not None
            if not self._stepper.answers_late:
                self._publish()

    def _publish(self) -> None:
        """Puts new masters and buffers into the state, once they are known to be written."""
        plan, stepper = self._plan, self._stepper
        if plan is not None and plan.new and stepper is not None:
            plan.publish(self.param_groups, self.__dict__["state"], self._step_state, stepper.written_state)

    def _fill_state(self) -> None:
        """Gives the state of every parameter that has a gradient, as it is before the first update."""
        _, plan = self._prepare()
        for entry in plan.entries:
            if entry.live:
                self.__dict__["state"][entry.param] = entry.own_state()
                if entry.buffer is not None:
                    self._step_state.unwritten[entry.own_state()[MOMENTUM_BUFFER]] = True
        self._stepper = self._plan = None
        self._note_progress()

    @property
    def state(self) -> defaultdict[Any, Any]:
        """What ``torch.optim.Optimizer.state`` is.

        Synchronises where a GPU has yet to tell whether the first steps were skipped.
        """
        if self._stepper is not None and self._stepper.answers_late:
            with self._lock:
                self._publish()
        state: defaultdict[Any, Any] = self.__dict__["state"]
        return state

    @state.setter
    def state(self, state: defaultdict[Any, Any]) -> None:
        self.__dict__["state"] = state

    def _prepare(self) -> tuple[Stepper, Plan]:
        listed = [(name, param) for name, param, _ in named_parameters(self.param_groups)]
        # Those without a gradient do not matter, unless there are no others.
        named = [(name, param) for name, param in listed if param.grad is not None] or listed
        stepper = stepper_class(self._backend, named)
        device = device_of([param for _, param in named], self._step_state.block.device)
        agreement = find_agreement([param for _, param in listed], self._partition.group, device)
        arguments = (self.param_groups, self.__dict__["state"], self._step_state)
        plan = build_plan(*arguments, self._plan, agreement)
        reference = BACKENDS["reference"].stepper
        if plan.is_in_order:
            stepper = reference
        if stepper is reference and self._stepper is not None and self._stepper.answers_late:
            # A device that answers late may have written what the host takes for new.
            self._publish()
            plan = build_plan(*arguments, self._plan, agreement)
        self._step_state.move_to(device)
        return stepper(plan, self._step_state), plan

    _observed_step = Optimizer.profile_hook_step(_step)

    def _run(self, request: StepRequest, placed: dict[Tensor, Tensor]) -> Outcome:
        stepper, plan = self._stepper, self._plan
        if stepper is None or plan is None or plan.is_outdated:
            return Outcome.STALE
        if not plan.staged:
            return stepper.step(self.param_groups, self.__dict__["state"], request)
        with torch.no_grad():
            if not plan.stage(placed):
                return Outcome.STALE
            outcome = stepper.step(self.param_groups, self.__dict__["state"], request)
            plan.unstage(updated=outcome is Outcome.APPLIED)
            return outcome

    def _request(self) -> StepRequest:
        grad_scale = self.__dict__.get("grad_scale")
        found_inf = self.__dict__.get("found_inf")
        loss_scale = self._loss_scale
        if found_inf is None:
            rule = loss_scale.rule() if isinstance(loss_scale, DynamicLossScale) else None
            return StepRequest(loss_scale is not None, None, None, self._max_grad_norm, rule)
        if loss_scale is not None:
            raise RuntimeError(
                "this FusedSGD scales its own loss (loss_scale is set) and was stepped by a GradScaler; use "
                "optimizer.scale(loss).backward() and optimizer.step() without the GradScaler, or loss_scale=None"
            )
        # GradScaler sums the verdicts of its devices, and says 0 where there was no gradient on any.
        verdict = found_inf if isinstance(found_inf, Tensor) else None
        return StepRequest(grad_scale is not None, grad_scale, verdict, self._max_grad_norm, None)

    @one_at_a_time
    def stats(self) -> StepStats:
        """Scale, counters and the last norm. Synchronises with the device, which ``step`` never does."""
        scale, _, _, grad_norm, applied, skipped, last_skipped = self._step_state.read()
        return StepStats(
            scale=None if self._loss_scale is None else scale,
            applied_steps=applied,
            skipped_steps=skipped,
            grad_norm=None if self.max_grad_norm is None else grad_norm,
            last_step_skipped=last_skipped,
        )

    def _replan(self) -> None:
        """Makes the next step begin with a new plan."""
        if self._plan is not None:
            self._plan.is_outdated = True

    @one_at_a_time
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, as ``torch.optim.Optimizer.add_param_group``.

        Raises:
            TypeError, ValueError: The group or one of its options is not valid. It is not added then.
        """
        if isinstance(param_group, dict):
            check_group({**self.defaults, **param_group})
        super().add_param_group(param_group)
        try:
            self._check_flattened(len(self.param_groups) - 1)
        except ValueError:
            self.param_groups.pop()
            raise
        if self._stepper is not None and self._stepper.answers_late:
            self._publish()
        self._stepper = self._plan = None

    def _check_flattened(self, index: int) -> None:
        listed = named_parameters(self.param_groups)
        decides = self._loss_scale is not None or self._max_grad_norm is not None
        check_flattened(
            [(name, param) for name, param, group in listed if group == index],
            self.param_groups[index],
            decides and self._partition.group is None,
        )

    @one_at_a_time
    def state_dict(self) -> dict[str, Any]:
        """The state in the format of ``torch.optim.SGD``, which can load it.

        ``state`` has ``momentum_buffer`` where there is momentum and ``master_param`` beside FP16 and BF16
        parameters, both FP32 (FP64 beside FP64 parameters), once the parameter was updated. Each group also carries
        ``applied_steps``, ``skipped_steps`` and, with a loss scale, ``loss_scale``, ``growth_tracker`` and
        ``hysteresis_tracker``: there they survive tools that keep only ``state`` and ``param_groups``. They stay in
        ``optimizer.param_groups`` as well, without following the steps, for tools that load no option that is not
        there, as ``torch.distributed.checkpoint`` with ``flatten_optimizer_state_dict=True``. Synchronises.
        """
        self._note_progress()
        hooks = self._optimizer_state_dict_post_hooks
        # Before those of others, which may put anything in its place.
        self._optimizer_state_dict_post_hooks = OrderedDict({-1: write_rates_as_numbers, **hooks})
        try:
            return super().state_dict()
        finally:
            self._optimizer_state_dict_post_hooks = hooks

    def _note_progress(self) -> None:
        scale, growth_tracker, hysteresis_tracker, _, applied, skipped, _ = self._step_state.read()
        extra: dict[str, float] = {"applied_steps": applied, "skipped_steps": skipped}
        if self._loss_scale is not None:
            extra |= {
                "loss_scale": scale,
                "growth_tracker": growth_tracker,
                "hysteresis_tracker": hysteresis_tracker,
            }
        for group in self.param_groups:
            group.update(extra)

    @one_at_a_time
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state of this class or of ``torch.optim.SGD``.

        FP32 state stays FP32 beside an FP16 parameter, where ``torch.optim.Optimizer`` would cast it. Tensors are
        copied. Options that the state lacks, and the scale where it has none, keep their values. So does a static
        ``loss_scale``: only a :class:`DynamicLossScale` takes over a saved scale, within its floor and ceiling.

        Raises:
            KeyError, TypeError, ValueError: The state does not fit the optimizer. Nothing is changed then.
        """
        state_dict = state_dict.copy()
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            replacement = pre_hook(self, state_dict)
            if replacement is not None:
                state_dict = replacement
        groups = deepcopy(state_dict["param_groups"])
        state = import_state(state_dict["state"], groups, self.param_groups)
        progress = [{key: group.pop(key) for key in SCALE_KEYS if key in group} for group in groups]
        for group, current in zip(groups, self.param_groups, strict=True):
            for key in self.defaults:
                group.setdefault(key, current[key])
            if "param_names" in current:
                group.setdefault("param_names", current["param_names"])
            group["params"] = current["params"]
            check_numbers(group)
        self._restore_progress(progress[0] if progress else {})
        self.__setstate__({"state": state, "param_groups": groups})
        self._note_progress()
        if progress and progress[0].get("applied_steps") == 0:
            self._note_unwritten()
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def _note_unwritten(self) -> None:
        """No update was applied yet, and a buffer of zeros is one that was made in advance."""
        for _, param, _ in named_parameters(self.param_groups):
            buffer = self.__dict__["state"].get(param, {}).get(MOMENTUM_BUFFER)
            if buffer is not None and not local_part(buffer).any():
                self._step_state.unwritten[buffer] = True

    def _restore_progress(self, saved: dict[str, Any]) -> None:
        counters = {key: saved[key] for key in COUNTERS if key in saved}
        for key, value in counters.items():
            check_count(key, value, 0, 2**63 - 1)
        if isinstance(self._loss_scale, DynamicLossScale) and "loss_scale" in saved:
            self._loss_scale.restore(
                saved["loss_scale"],
                saved.get("growth_tracker", 0),
                saved.get("hysteresis_tracker", self._loss_scale.hysteresis),
            )
        if "applied_steps" in counters:
            self._step_state.applied_steps.fill_(counters["applied_steps"])
            self._step_state.skipped_steps.fill_(counters.get("skipped_steps", 0))

    def __getstate__(self) -> dict[str, Any]:
        return {
            **super().__getstate__(),
            "_max_grad_norm": self._max_grad_norm,
            "_backend": self._backend,
            "_partition": self._partition,
            "_loss_scale": self._loss_scale,
            "_step_state": self._step_state,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.setdefault("_lock", StepLock())
        super().__setstate__(state)
        self._stepper = self._plan = None
        if "_step_state" in state:
            # A shallow copy shares parameters and state with the original, but takes steps of its own.
            self._step_state = copy(self._step_state)
            if isinstance(self._loss_scale, DynamicLossScale) and not self._loss_scale.is_free_for(self):
                self._loss_scale = copy(self._loss_scale)
        if isinstance(self._loss_scale, DynamicLossScale):
            self._step_state = self._loss_scale.bind(self)
