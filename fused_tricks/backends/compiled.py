"""The plan guard of the extension."""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..step.device_lr import device_lr_of
from ..step.device_state import StepState
from ..step.parameters import STATE_TENSORS
from ..step.plan import Plan

if TYPE_CHECKING:
    from .. import _extension


class CompiledEntry(NamedTuple):
    """An entry of a plan, as csrc/python/plan_guard.cpp reads it by the names of its fields.

    Attributes:
        state: The local parts of the state's tensors, in the order of `STATE_TENSORS`.
        alias: A tensor that shares the parameter's version counter; None where the caller writes the parameter.
        watches_version: True where a new version of the parameter means that user code wrote to it.
        first_update: Where the kernels note the number of the update that first writes `buffer`.
    """

    group: int
    param: Tensor
    source: Tensor
    alias: Tensor | None
    live: bool
    grad_dtype: torch.dtype | None
    state: tuple[Tensor | None, ...]
    watches_version: bool
    first_update: Tensor | None
    shard_class: int


class CompiledLR(NamedTuple):
    """A learning rate that follows the updates applied, as csrc/python/plan_guard.cpp reads it by its fields' names."""

    lr: Tensor
    base: float
    factors: Tensor
    origin: int


class Gradients(NamedTuple):
    """The gradients of one step.

    Attributes:
        addresses: The address of each entry's gradient; 0 where an entry has none.
        in_double: True if one of them is FP64.
    """

    addresses: list[int]
    in_double: bool


class CompiledPlanGuard:
    """The plan guard in C++: it notices that a plan no longer holds, and reads each step's gradients.

    Args:
        extension: The extension module.
        plan: The plan.
        step_state: The optimizer's state on the device.
        reads_lr: True if the kernels read a learning rate that is a tensor, so that the host need not wait for it.
    """

    def __init__(
        self,
        extension: ModuleType,
        plan: Plan,
        step_state: StepState,
        *,
        reads_lr: bool,
    ) -> None:
        aliases = [
            entry.param.detach() if entry.live and not entry.is_staged else None for entry in plan.entries
        ]
        # A second owner in C++ halves the time that torch needs to look at a tensor: the Python object's own reference
        # count then need not follow every use of it.
        state = [tensor for entry in plan.entries for tensor in entry.local_state.values()]
        self._second_owners = [_owner_of(tensor) for tensor in (*aliases, *state) if tensor is not None]
        self._step_state = step_state
        self._reduction = plan.reduction
        # The extension only borrows these, so that the garbage collector sees who holds what.
        self._specified = [
            CompiledEntry(
                group=entry.group,
                param=entry.param,
                source=entry.source,
                alias=alias,
                live=entry.live,
                grad_dtype=entry.grad_dtype,
                state=tuple(map(entry.local_state.get, STATE_TENSORS)),
                watches_version=entry.master is not None and not entry.is_staged,
                first_update=entry.first_update,
                shard_class=entry.shard_class,
            )
            for entry, alias in zip(plan.entries, aliases, strict=True)
        ]
        self._rates = [_compiled_lr(lr, step_state.block.device) for lr in plan.lrs]
        self.handle: _extension.PlanGuard = extension.PlanGuard(
            self._specified,
            step_state.block,
            reads_lr=reads_lr,
            rates=self._rates,
            reduction=plan.reduction,
        )

    def gradients(self, groups: list[dict[str, Any]], state: dict[Any, Any]) -> Gradients | None:
        """As `gradients`."""
        found = self.handle.gradient_addresses(groups, state)
        return None if found is None else Gradients(*found)

    def release_gradients(self) -> None:
        """As `release_gradients`."""
        self.handle.release_gradients()

    def mark_updated(self) -> None:
        """After an update: tells autograd that the parameters changed."""
        self.handle.mark_updated()


def _compiled_lr(lr: Any, device: torch.device) -> CompiledLR | None:
    rate = device_lr_of(lr)
    return None if rate is None else CompiledLR(lr, rate.base, rate.factors.on(device), rate.origin)


def _owner_of(tensor: Tensor) -> Tensor:
    owner = tensor.detach()
    owner.grad = tensor
    return owner
