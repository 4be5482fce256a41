"""The compiled CPU backend."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..extension import load_extension, missing_because
from ..plan import Entry, Plan, applied_state
from ..step_state import StepState
from .compiled import CompiledPlan
from .request import StepRequest

if TYPE_CHECKING:
    from .. import _extension


def unavailable_because() -> str | None:
    """Why this backend cannot be used here; None when it can."""
    return missing_because()


class CpuStepper:
    """Runs steps over a plan."""

    answers_late = False

    def __init__(self, plan: Plan, step_state: StepState) -> None:
        extension = load_extension()
        self._plan = CompiledPlan(extension, plan, step_state)
        self._step: _extension.CpuStep = extension.CpuStep(self._plan.handle)
        self._positions = {id(entry): index for index, entry in enumerate(plan.entries) if entry.is_new}

    def written_state(self, entry: Entry, has_momentum: bool) -> tuple[dict[str, Tensor], bool]:
        return applied_state(entry, has_momentum, self._plan.handle.had_gradient(self._positions[id(entry)]))

    def step(self, groups: list[dict[str, Any]], state: dict[Any, Any], request: StepRequest) -> int:
        return self._step.run(self._plan.handle, groups, state, request)
