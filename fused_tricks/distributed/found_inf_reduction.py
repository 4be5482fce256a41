"""The reduction of `found_inf` and of the gradient norm over processes with parts of one model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..step.shared_memory import has_memory
from .sharding import is_distributed

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor


@dataclass(frozen=True)
class SharedGroup:
    """A process group that a deep copy of its owner shares, because torch cannot copy process groups."""

    group: ProcessGroup | None

    def __post_init__(self) -> None:
        """Raises TypeError unless the group is None or a process group that this process belongs to."""
        if self.group is None:
            return
        if not torch.distributed.is_available() or not isinstance(self.group, torch.distributed.ProcessGroup):
            raise TypeError(
                "partition_group must be a torch.distributed.ProcessGroup that this process belongs to, or None, "
                f"got {self.group!r}"
            )

    def __deepcopy__(self, memo: dict[int, Any]) -> SharedGroup:
        return self


PARTIALS = ("found_inf", "in_double", "squares")
"""The partials: `found_inf`, 1 if a gradient is FP64, and the sum of squares of the first shard class.

The sums of the other shard classes follow. Same order as in csrc/core/partials.h.
"""
FOUND_INF, IN_DOUBLE, SQUARES = range(len(PARTIALS))


class StepReduction:
    """The reduction of `found_inf` and sums of squares over processes, between scan and update.

    A `DTensor` is sharded over some dimensions of its mesh and replicated over the other dimensions. Squares are summed
    over the sharded dimensions only, so that replicas do not count twice. Parameters with the same sharding are one
    *shard class*. Each shard class has its own sum of squares. `found_inf` is reduced over all dimensions.

    Attributes:
        partials: FP64 tensor of shape (`SQUARES` + `shard_classes`,), written by the scan. The indices are those of
            `PARTIALS`.
        shard_classes: The number of shard classes.
        shard_class_of: The index of the shard class of each parameter.
    """

    def __init__(
        self,
        shard_groups: list[set[str]],
        shard_class_of: list[int],
        groups: dict[str, ProcessGroup],
        partition_group: ProcessGroup | None,
        device: torch.device,
    ) -> None:
        self.shard_classes = max(1, len(shard_groups))
        self.shard_class_of = shard_class_of
        self.partials = torch.zeros(SQUARES + self.shard_classes, dtype=torch.float64, device=device)
        self._partition_group = partition_group
        self._sums: list[tuple[ProcessGroup, slice | Tensor]] = []
        self._spreads: list[tuple[ProcessGroup, slice | Tensor]] = []
        for name, group in groups.items():
            for is_sharded, reductions in ((True, self._sums), (False, self._spreads)):
                fields = [
                    SQUARES + index
                    for index, names in enumerate(shard_groups)
                    if (name in names) == is_sharded
                ]
                if fields:
                    is_all = len(fields) == len(shard_groups)
                    reductions.append(
                        (
                            group,
                            slice(None)
                            if is_all
                            else torch.tensor([FOUND_INF, IN_DOUBLE, *fields], device=device),
                        )
                    )

    def all_reduce(self) -> None:
        """Reduces `partials` in place. A collective: every process must call this method."""
        partials = self.partials
        for group, fields in self._sums:
            partials[fields] = _reduced(partials[fields], torch.distributed.ReduceOp.SUM, group)
        # MAX keeps the equal sums of replicas. A process outside the mesh of a shard class has a sum of 0.
        for group, fields in self._spreads:
            partials[fields] = _reduced(partials[fields], torch.distributed.ReduceOp.MAX, group)
        if self._partition_group is not None:
            # Processes of the partition may have different shard classes, so their sums are added up first.
            partials[SQUARES] = partials[SQUARES:].sum()
            partials[SQUARES + 1 :] = 0
            partials[: SQUARES + 1] = _reduced(
                partials[: SQUARES + 1], torch.distributed.ReduceOp.SUM, self._partition_group
            )


def find_reduction(
    params: Sequence[Tensor], partition_group: ProcessGroup | None, device: torch.device
) -> StepReduction | None:
    """Returns the reduction for the steps of an optimizer; None if this process decides alone.

    A process also decides alone if no parameter has memory, because gradients have no values then. Every process finds
    the same shard classes, whatever gradients and elements the process has.

    Args:
        params: All parameters of an optimizer.
        partition_group: The process group over which the model's parameters are partitioned, or None.
        device: The device of `partials`.
    """
    if params and not any(map(has_memory, params)):
        return None
    classes: dict[Any, int] = {}
    shard_groups: list[set[str]] = []
    groups: dict[str, ProcessGroup] = {}
    shard_class_of = []
    for param in params:
        sharding = (param.device_mesh, _sharded_dimensions(param)) if is_distributed(param) else None
        if sharding not in classes:
            classes[sharding] = len(shard_groups)
            along = [] if sharding is None else _groups_along(*sharding)
            shard_groups.append({group.group_name for group, is_sharded in along if is_sharded})
            groups |= {group.group_name: group for group, _ in along}
        shard_class_of.append(classes[sharding])
    if not groups and partition_group is None:
        return None
    return StepReduction(shard_groups, shard_class_of, groups, partition_group, device)


def _sharded_dimensions(param: DTensor) -> tuple[int, ...]:
    """Returns the mesh dimensions over which a tensor is sharded."""
    return tuple(
        dimension for dimension, placement in enumerate(param.placements) if not placement.is_replicate()
    )


def _groups_along(mesh: DeviceMesh, sharded: tuple[int, ...]) -> list[tuple[ProcessGroup, bool]]:
    """Returns, for each mesh dimension of size above 1, this process's group, and True if the dimension is sharded."""
    if mesh.get_coordinate() is None:
        return []
    return [
        (mesh.get_group(dimension), dimension in sharded)
        for dimension in range(mesh.ndim)
        if mesh.size(dimension) > 1
    ]


def _reduced(values: Tensor, operation: Any, group: ProcessGroup) -> Tensor:
    """Returns `values` reduced over a process group, on the same device. May overwrite `values`."""
    within_reach = values.to(_device_within_reach(group, values.device))
    torch.distributed.all_reduce(within_reach, operation, group)
    return within_reach.to(values.device)


def _device_within_reach(group: ProcessGroup, device: torch.device) -> torch.device:
    """Returns a device on which a process group communicates: `device` if supported, otherwise the accelerator.

    Parameters may be offloaded to the CPU while their process group communicates on GPUs only.
    """
    kinds = [pair.split(":")[0] for pair in torch.distributed.get_backend_config(group).split(",")]
    if device.type in kinds:
        return device
    return torch.device(kinds[0], torch.accelerator.current_device_index())
