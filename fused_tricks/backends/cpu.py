"""The compiled CPU backend."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..extension import load_extension, missing_because
from ..plan import Plan
from ..step_state import StepState
from .request import Outcome, StepRequest

if TYPE_CHECKING:
    from .. import _extension


_OUTCOMES = tuple(Outcome)


def unavailable_because() -> str | None:
    """Why this backend cannot be used here; None when it can."""
    return missing_because()


class CpuStepper:
    """Runs steps over a plan in the extension, whose copy of the plan notices when it is out of date."""

    def __init__(self, plan: Plan, step_state: StepState) -> None:
        extension = load_extension()
        aliases = [entry.param.detach() if entry.live and not entry.is_staged else None for entry in plan.entries]
        # A second owner in C++ halves the time that torch needs to bump a version counter, as the Python object's
        # own reference count then need not follow every use of the tensor.
        self._second_owners = [None if alias is None else _owner_of(alias) for alias in aliases]
        self._compiled: _extension.Plan = extension.Plan(
            [
                (
                    entry.param,
                    entry.source,
                    alias,
                    entry.live,
                    entry.master,
                    entry.buffer,
                    entry.first,
                    entry.master is not None and not entry.is_staged,
                )
                for entry, alias in zip(plan.entries, aliases, strict=True)
            ],
            step_state.block,
        )
        self._watches_state = False

    def step(self, groups: list[dict[str, Any]], state: dict[Any, Any], request: StepRequest) -> Outcome:
        if not self._watches_state:
            self._compiled.watch_state(state)
            self._watches_state = True
        return _OUTCOMES[self._compiled.cpu_step(groups, state, *request)]


def _owner_of(tensor: Tensor) -> Tensor:
    owner = tensor.detach()
    owner.grad = tensor
    return owner
