"""The part of the optimizer that makes plans and runs steps over them."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from .._torch import is_asked_for_state
from ..backends import BACKENDS, REFERENCE, choose_backend
from ..distributed.found_inf_reduction import find_reduction
from ..validation import check_numbers, check_range, check_readable, is_zero
from .options import NUMBERS
from .parameters import named_parameters
from .plan import build_plan
from .request import Outcome, StepRequest, step_request
from .saved_state import Prepared, SavedState
from .shared_memory import device_of

_PLAIN = (Real, Tensor, str, type(None))


class PlannedSteps(SavedState):
    """The base class of `FusedSGD` that makes plans and runs steps."""

    def _fill_or_update(self, request: StepRequest) -> None:
        with self._lock:
            if not self._state and self._has_no_rate() and is_asked_for_state():
                self._fill_state()
            else:
                self._update(request)

    def _has_no_rate(self) -> bool:
        """True if every learning rate is 0, as in the dummy step of `torch.distributed.checkpoint`."""
        return all(is_zero(group["lr"]) for group in self.param_groups)

    def _evaluate(self, closure: Callable[[], Any], request: StepRequest) -> Any:
        if request.unscales or "found_inf" in self.__dict__:
            raise RuntimeError(
                "a closure cannot be combined with loss scaling, because the closure may or may not scale its loss; "
                "scale the loss, call backward(), and then call step() without a closure"
            )
        with torch.enable_grad():
            return closure()

    def _update(self, request: StepRequest) -> None:
        try:
            redistributed: dict[Tensor, Tensor] = {}
            outcome = self._run(request, redistributed)
            if outcome == Outcome.STALE:
                # A new plan changes state, so that a malformed option must be refused before. The conversion of other
                # objects may run user code, which belongs to the step.
                if all(
                    isinstance(group.get(name), _PLAIN) for group in self.param_groups for name in NUMBERS
                ):
                    self._check_options()
                with _garbage_collector_paused():
                    self._prepared = self._prepare()
                outcome = self._run_first(self._prepared, request, redistributed)
        except (KeyError, TypeError, ValueError, OverflowError, RuntimeError):
            # Backends raise on a malformed option without naming it. These checks raise a message with the name.
            self._check_options()
            raise
        if outcome == Outcome.SKIPPED:
            self._diagnostics.after_skip()
        elif self._prepared is not None and self._prepared.stepper.is_async:
            self._diagnostics.after_launch()

    def _check_options(self) -> None:
        for index, group in enumerate(self.param_groups):
            check_readable(f"group {index}", group)
            check_numbers(group)
            check_range(group)

    def _run_first(
        self, prepared: Prepared, request: StepRequest, redistributed: dict[Tensor, Tensor]
    ) -> int:
        """Runs the first step over a new plan. Withdraws the new state if the step raises."""
        applied_steps = self._step_state.read().applied_steps if prepared.plan.placed else 0
        try:
            self._diagnostics.before_update(
                prepared.plan, "found_inf" in self.__dict__, self._partition.group is not None
            )
            outcome = self._run(request, redistributed)
            if outcome == Outcome.STALE:
                raise RuntimeError(
                    "parameters, gradients or state changed while the step was being prepared; do not change them in "
                    "other threads, or in code that the step calls"
                )
        except BaseException:
            if prepared.plan.placed and self._step_state.read().applied_steps == applied_steps:
                prepared.plan.withdraw_state(self._state)
                self._prepared = None
            raise
        return outcome

    def _fill_state(self) -> None:
        """Creates the state of every parameter that has a gradient, without an update."""
        plan = self._prepare().plan
        for entry in plan.entries:
            if entry.live:
                self._state.setdefault(entry.param, {})
        self._note_progress()

    def _prepare(self) -> Prepared:
        self._check_has_its_weights()
        listed = [(name, param) for name, param, _ in named_parameters(self.param_groups)]
        # Parameters without a gradient matter only if no parameter has one.
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
        # Another thread may have replaced the memory of a parameter after the plan was built.
        plan.is_outdated = not plan.keeps_its_memory()
        self._backend_in_use = backend
        return Prepared(plan, stepper)

    def _run(self, request: StepRequest, redistributed: dict[Tensor, Tensor]) -> int:
        if self._prepared is None or self._prepared.plan.is_outdated:
            return Outcome.STALE
        plan, stepper = self._prepared
        if not plan.stand_ins:
            return stepper.step(self.param_groups, self._state, request)
        if stepper.reads_shards and plan.stand_ins.has_shards:
            outcome = self._run_filled(self._prepared, request, redistributed, with_shards=False)
            if outcome != Outcome.STALE:
                return outcome
        return self._run_filled(self._prepared, request, redistributed, with_shards=True)

    def _run_filled(
        self,
        prepared: Prepared,
        request: StepRequest,
        redistributed: dict[Tensor, Tensor],
        *,
        with_shards: bool,
    ) -> int:
        stand_ins = prepared.plan.stand_ins
        with torch.no_grad(), stand_ins.filled(redistributed, with_shards=with_shards) as are_filled:
            if not are_filled:
                return Outcome.STALE
            outcome = prepared.stepper.step(self.param_groups, self._state, request)
            if outcome == Outcome.APPLIED:
                stand_ins.write_back()
            return outcome

    def _request(self) -> StepRequest:
        # The class must not have these attributes, because GradScaler multiplies an existing `grad_scale`.
        grad_scale, found_inf = self.__dict__.get("grad_scale"), self.__dict__.get("found_inf")
        return step_request(self._loss_scale, self._max_grad_norm, grad_scale, found_inf)

    def _replan(self) -> None:
        """Marks the plan as stale, so that the next step builds a new plan."""
        if self._prepared is not None:
            self._prepared.plan.is_outdated = True


@contextmanager
def _garbage_collector_paused() -> Iterator[None]:
    # A plan has about 20 Python containers for each parameter, and none of them is garbage. Collections in between
    # would visit all objects of the process several times: a third of the time of a plan of 10,000 parameters.
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
