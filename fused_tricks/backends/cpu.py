"""The compiled CPU backend."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..extension import load_extension, missing_because
from ..step.device_state import StepState
from ..step.plan import Plan
from ..step.request import StepRequest
from .compiled import CompiledPlanGuard

if TYPE_CHECKING:
    from .. import _extension


def unavailable_because() -> str | None:
    """Returns the reason why this backend is unusable here; None if it is usable."""
    return missing_because()


class CpuStepper:
    """The stepper of the compiled CPU backend."""

    is_async = False
    reads_shards = True

    def __init__(self, plan: Plan, step_state: StepState) -> None:
        extension = load_extension()
        self._guard = CompiledPlanGuard(extension, plan, step_state, reads_lr=False)
        self._step: _extension.CpuStep = extension.CpuStep(self._guard.handle)

    def step(self, groups: list[dict[str, Any]], state: dict[Any, Any], request: StepRequest) -> int:
        """Implements `Stepper.step`."""
        return self._step.run(self._guard.handle, groups, state, request)
