"""The plan guard of the extension, and the records that it reads."""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..distributed.sharding import is_distributed
from ..step.device_lr import device_lr_of
from ..step.device_state import StepState
from ..step.parameters import STATE_TENSORS
from ..step.plan import Plan

if TYPE_CHECKING:
    from .. import _extension


class CompiledEntry(NamedTuple):
    """An entry of a plan, as csrc/python/plan_guard.cpp reads it by the names of its fields.

    Attributes:
        group: The index of the parameter's group.
        param: The parameter, as listed in the group.
        source: The tensor whose `.grad` the kernels use.
        home: The tensor whose memory the kernels write.
        spec: The `DTensorSpec` of a `DTensor` whose local part is `home`; None for any other parameter. If `source` has
            no gradient, the guard reads the local part of the gradient of the `DTensor`.
        counted: The tensors whose version counters an update increments, at most two.
        watched: The tensors whose changed version counters make the plan stale: none, or one for each of `counted`.
        live: True if the plan can update the parameter.
        grad_dtype: The dtype of the gradients.
        state: The local parts of the state tensors, in the order of `STATE_TENSORS`; None for a missing one.
        first_update: The notes of the numbers of the updates that first write the state tensors, in the order of
            `STATE_TENSORS`; None for a missing tensor.
        shard_class: The index of the shard class.
    """

    group: int
    param: Tensor
    source: Tensor
    home: Tensor
    spec: object
    counted: tuple[Tensor, ...]
    watched: tuple[Tensor, ...]
    live: bool
    grad_dtype: torch.dtype | None
    state: tuple[Tensor | None, ...]
    first_update: tuple[Tensor | None, ...]
    shard_class: int


class CompiledLR(NamedTuple):
    """A learning rate that follows the applied steps, as csrc/python/plan_guard.cpp reads it by its fields' names."""

    lr: Tensor
    base: float
    factors: Tensor
    origin: int


class Gradients(NamedTuple):
    """The gradients of one step.

    Attributes:
        addresses: The address of each entry's gradient; 0 for an entry without a gradient or elements.
        in_double: True if a gradient with elements is FP64.
    """

    addresses: list[int]
    in_double: bool


class CompiledPlanGuard:
    """The plan guard in C++, which checks whether a plan is stale, and reads the gradients of each step.

    Args:
        extension: The extension module.
        plan: The plan.
        step_state: The optimizer's step state.
        reads_lr: True if the kernels read a tensor `lr` on the device, without a host sync.
    """

    def __init__(
        self,
        extension: ModuleType,
        plan: Plan,
        step_state: StepState,
        *,
        reads_lr: bool,
    ) -> None:
        # An alias shares the version counter, and torch accesses it faster than the parameter.
        counted = [
            (entry.param.detach(),) if len(entry.counted) == 1 else entry.counted for entry in plan.entries
        ]
        # A second C++ reference halves the time of an access to a tensor: with one reference, torch updates the
        # reference count of the Python object at every access.
        accessed = [tensor for tensors in counted for tensor in tensors if not is_distributed(tensor)]
        state = [tensor for entry in plan.entries for tensor in entry.local_state.values()]
        self._second_owners = [_owner_of(tensor) for tensor in (*accessed, *state)]
        self._step_state = step_state
        self._reduction = plan.reduction
        # The extension borrows these objects. References in C++ would be invisible to the garbage collector.
        self._specified = [
            CompiledEntry(
                group=entry.group,
                param=entry.param,
                source=entry.source,
                home=entry.home,
                spec=entry.spec,
                counted=tensors,
                watched=entry.counted if entry.master is not None else (),
                live=entry.live,
                grad_dtype=entry.grad_dtype,
                state=tuple(map(entry.local_state.get, STATE_TENSORS)),
                first_update=tuple(map(entry.first_updates.get, STATE_TENSORS)),
                shard_class=entry.shard_class,
            )
            for entry, tensors in zip(plan.entries, counted, strict=True)
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
        """Reads the gradients of this step, and keeps them alive until `release_gradients`.

        Args:
            groups: The optimizer's groups.
            state: The optimizer's state.

        Returns:
            The gradients; None if the plan is stale.
        """
        found = self.handle.gradient_addresses(groups, state)
        return None if found is None else Gradients(*found)

    def release_gradients(self) -> None:
        """Drops the gradients that were read last."""
        self.handle.release_gradients()

    def mark_updated(self) -> None:
        """Increments the version counters of the updated parameters, for autograd."""
        self.handle.mark_updated()


def _compiled_lr(lr: Any, device: torch.device) -> CompiledLR | None:
    rate = device_lr_of(lr)
    return None if rate is None else CompiledLR(lr, rate.base, rate.factors.on(device), rate.origin)


def _owner_of(tensor: Tensor) -> Tensor:
    owner = tensor.detach()
    owner.grad = tensor
    return owner
