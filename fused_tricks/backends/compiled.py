"""A plan as the extension holds it, which notices by itself when it is out of date."""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..applied_rate import applied_rate_of
from ..plan import Plan
from ..step_state import StepState
from .request import Outcome

if TYPE_CHECKING:
    from .. import _extension

# What the extension answers is a position in it.
OUTCOMES = tuple(Outcome)


class CompiledPlan:
    """Hands a plan to the extension and keeps alive what it only borrows.

    Args:
        extension: The extension module.
        plan: The plan.
        step_state: The optimizer's state on the device.
        first_steps: For each entry where the kernels note the first update of its buffer, if they do.
        compared: Up to how many elements the kernels see by themselves that others wrote to a parameter.
    """

    def __init__(
        self,
        extension: ModuleType,
        plan: Plan,
        step_state: StepState,
        first_steps: list[Tensor | None] | None = None,
        compared: int = 0,
    ) -> None:
        aliases = [
            entry.param.detach() if entry.live and not entry.is_staged else None for entry in plan.entries
        ]
        # A second owner in C++ halves the time that torch needs to look at a tensor: the Python object's own reference
        # count then need not follow every use of it.
        state = [tensor for entry in plan.entries for tensor in (entry.master, entry.buffer)]
        self._second_owners = [_owner_of(tensor) for tensor in (*aliases, *state) if tensor is not None]
        self._step_state = step_state
        self._agreement = plan.agreement
        # The extension only borrows these, so that the garbage collector sees who holds what.
        self._specification = [
            (
                entry.group,
                entry.param,
                entry.source,
                alias,
                entry.live,
                entry.master,
                entry.buffer,
                entry.first,
                entry.master is not None and not entry.is_staged,
                first_step,
                entry.part,
            )
            for entry, alias, first_step in zip(
                plan.entries, aliases, first_steps or [None] * len(plan.entries), strict=True
            )
        ]
        self._rates = [_specified(lr, step_state.block.device) for lr in plan.lrs]
        self.handle: _extension.Plan = extension.Plan(
            self._specification,
            step_state.block,
            reads_lr=first_steps is not None,
            compared=compared,
            rates=self._rates,
            agreement=plan.agreement,
        )


class CompiledWatch(CompiledPlan):
    """A plan for kernels that Python launches: the extension notices whether it holds, and reads the gradients."""

    def gradients(
        self, groups: list[dict[str, Any]], state: dict[Any, Any]
    ) -> tuple[list[int], bool, bool] | None:
        """As :meth:`fused_tricks.backends.triton.watch.PlanWatch.gradients`."""
        return self.handle.gradient_addresses(groups, state)

    def release_gradients(self) -> None:
        """As :meth:`fused_tricks.backends.triton.watch.PlanWatch.release_gradients`."""
        self.handle.release_gradients()

    def mark_updated(self) -> None:
        """After an update: tells autograd that the parameters changed."""
        self.handle.mark_updated()


def _specified(lr: Any, device: torch.device) -> tuple[Tensor, float, Tensor, int] | None:
    """What the extension must know of a learning rate that follows the updates applied."""
    rate = applied_rate_of(lr)
    return None if rate is None else (lr, rate.base, rate.factors.on(device), rate.origin)


def _owner_of(tensor: Tensor) -> Tensor:
    owner = tensor.detach()
    owner.grad = tensor
    return owner
