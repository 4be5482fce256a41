"""The stepper of the Triton backend."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...extension import load_extension, missing_because
from ...loss_scale import ScaleRule
from ...step.device_state import StepState
from ...step.parameters import EMA_PARAM, is_in_use
from ...step.plan import Plan
from ...step.request import Outcome, StepRequest
from ..compiled import CompiledPlanGuard, Gradients
from ..gpu import GpuStepper, current_stream, is_capturing
from .launch import MAX_GROUPS, decide_source, launch, load, scan_source, update_source
from .plan_guard import PlanGuard
from .tables import GROUP_WORDS, DeviceTables, GroupWords, StepTable, group_words, table_words

_NO_SCALE_RULE = ScaleRule(1.0, 1.0, 0.0, 0.0, 0, 0)


class TritonStepper(GpuStepper):
    """The stepper of the Triton backend. A step never waits for the device.

    A step has one launch, two with a scan, and three with a scan and a reduction over processes. Additional launches
    write gradient addresses, and a table of groups, only if they have changed.
    """

    def __init__(self, plan: Plan, step_state: StepState) -> None:
        super().__init__(plan, step_state)
        self._guard = self._make_guard(plan)
        self.reads_shards = isinstance(self._guard, CompiledPlanGuard)
        self._tables = DeviceTables(plan, self._device)
        self._grads = StepTable(len(plan.entries), self._device)
        self._groups: StepTable | None = None
        tables = self._tables
        self._memory += [tables.tensors, tables.chunks, tables.partial_squares, self._grads.table]
        self._loaded: set[tuple[int, int, bool]] = set()

    def _make_guard(self, plan: Plan) -> PlanGuard | CompiledPlanGuard:
        """Returns the plan guard of the extension if available, which is several times faster."""
        if missing_because() is None:
            return CompiledPlanGuard(load_extension(), plan, self._step_state, reads_lr=True)
        return PlanGuard(plan)

    def step(self, groups: list[dict[str, Any]], state: dict[Any, Any], request: StepRequest) -> int:
        """Implements `Stepper.step`."""
        gradients = self._guard.gradients(groups, state)
        if gradients is None:
            return Outcome.STALE
        try:
            self._launch(groups, request, gradients)
        finally:
            self._guard.release_gradients()
        return Outcome.APPLIED

    def _launch(
        self,
        groups: list[dict[str, Any]],
        request: StepRequest,
        gradients: Gradients,
    ) -> None:
        words = tuple(group_words(group, self._device) for group in groups)
        grad_scale, found_inf = self._on_device(request.grad_scale), self._on_device(request.found_inf)
        tables = self._tables
        # Without chunks, one program still decides and counts the step.
        programs = max(1, tables.chunk_count)
        walked = (
            tables.chunks.data_ptr(),
            tables.tensors.data_ptr(),
            self._grads.address_of(gradients.addresses),
            tables.chunk_count,
        )
        requested = (
            self._step_state.block.data_ptr(),
            int(request.unscales),
            _address(grad_scale),
            _address(found_inf),
        )
        by_value = len(words) <= MAX_GROUPS
        averages = any(is_in_use(EMA_PARAM, group) for group in groups)
        update_constants = (tables.kinds, len(words) if by_value else 0, averages)
        if update_constants not in self._loaded:
            load(self._device, update_source, update_constants, programs)
            self._loaded.add(update_constants)
        group_argument = words if by_value else self._group_table(words)
        if request.scans:
            reduction = self._reduction
            wants_norm = request.max_norm is not None
            shard_classes = 0 if reduction is None else reduction.shard_classes
            partials = 0 if reduction is None else reduction.partials.data_ptr()
            rules = (
                request.max_norm or 0.0,
                int(gradients.in_double),
                int(request.scale_rule is not None),
                request.scale_rule or _NO_SCALE_RULE,
            )
            squares = tables.partial_squares.data_ptr()
            constants = (tables.grad_kinds, wants_norm, shard_classes)
            launch(
                self._device, scan_source, constants, programs, *walked, *requested, squares, partials, *rules
            )
            if reduction is not None:
                reduction.all_reduce()
                launch(
                    self._device, decide_source, (wants_norm, shard_classes), 1, *requested, partials, *rules
                )
        launch(
            self._device,
            update_source,
            update_constants,
            programs,
            *walked,
            *requested,
            int(request.scans),
            group_argument,
        )
        self._streams.add(current_stream(self._device))
        if is_capturing(self._device):
            self._keep(groups, tables, self._grads, self._groups)
        self._guard.mark_updated()

    def _group_table(self, words: tuple[GroupWords, ...]) -> int:
        if self._groups is None:
            self._groups = StepTable(len(words) * GROUP_WORDS, self._device)
            self._memory.append(self._groups.table)
        return self._groups.address_of(table_words(words))


def _address(scalar: Tensor | None) -> int:
    return 0 if scalar is None else scalar.data_ptr()
