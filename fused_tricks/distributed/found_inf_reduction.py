"""How processes that hold parts of one model decide together whether to skip a step, and by which norm to clip."""

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
    """A process group, which a copy of its owner shares: torch cannot copy one."""

    group: ProcessGroup | None

    def __post_init__(self) -> None:
        """Raises TypeError unless it is one that this process belongs to, or None."""
        if self.group is None:
            return
        if not torch.distributed.is_available() or not isinstance(self.group, torch.distributed.ProcessGroup):
            raise TypeError(
                "partition_group must be a torch.distributed.ProcessGroup that this process belongs to, or None, "
                f"got {self.group!r}"
            )

    def __deepcopy__(self, memo: dict[int, Any]) -> SharedGroup:
        return self


class Agreement:
    """Adds up what each process has found, between the scan and the update, without waiting for a device.

    A ``DTensor`` is divided over some dimensions of its mesh and repeated over the others. Squares are added over the
    former only, so that a replica is not counted twice; parameters that are divided alike are a *part*, with a sum of
    squares of its own. An overflow counts wherever it was found.

    Attributes:
        verdict: FP64 tensor of (2 + ``parts``,), written by the scan: whether a gradient is not finite, whether one is
            FP64, then the sum of squares of each part.
        parts: How many.
        part_of: For each parameter, which part it belongs to.
    """

    def __init__(
        self,
        parts: list[set[str]],
        part_of: list[int],
        groups: dict[str, ProcessGroup],
        partition_group: ProcessGroup | None,
        device: torch.device,
    ) -> None:
        self.parts = max(1, len(parts))
        self.part_of = part_of
        self.verdict = torch.zeros(2 + self.parts, dtype=torch.float64, device=device)
        self._partition_group = partition_group
        self._sums: list[tuple[ProcessGroup, slice | Tensor]] = []
        self._spreads: list[tuple[ProcessGroup, slice | Tensor]] = []
        for name, group in groups.items():
            for is_divided, reductions in ((True, self._sums), (False, self._spreads)):
                fields = [2 + part for part, dividing in enumerate(parts) if (name in dividing) == is_divided]
                if fields:
                    is_all = len(fields) == len(parts)
                    reductions.append(
                        (group, slice(None) if is_all else torch.tensor([0, 1, *fields], device=device))
                    )

    def reach(self) -> None:
        """Makes ``verdict`` that of all processes together. All of them must call it."""
        verdict = self.verdict
        for group, fields in self._sums:
            verdict[fields] = _reduced(verdict[fields], torch.distributed.ReduceOp.SUM, group)
        # Replicas have the same sum already. Processes that have no part of it, not even an empty one, have nothing.
        for group, fields in self._spreads:
            verdict[fields] = _reduced(verdict[fields], torch.distributed.ReduceOp.MAX, group)
        if self._partition_group is not None:
            # Processes of other parts of the model may divide theirs otherwise.
            whole = torch.stack((verdict[0], verdict[1], verdict[2:].sum()))
            verdict.zero_()[:3] = _reduced(whole, torch.distributed.ReduceOp.SUM, self._partition_group)


def find_agreement(
    params: Sequence[Tensor], partition_group: ProcessGroup | None, device: torch.device
) -> Agreement | None:
    """What the process that has these parameters must agree upon with others; None where it decides alone.

    It does so where no parameter has memory, and so no gradient has values.

    Every process finds the same parts, whichever gradients and elements it has.

    Args:
        params: All parameters of an optimizer.
        partition_group: The group over which the parameters of the model are partitioned, if they are.
        device: Where the verdict is needed.
    """
    if params and not any(map(has_memory, params)):
        return None
    places: dict[Any, int] = {}
    parts: list[set[str]] = []
    groups: dict[str, ProcessGroup] = {}
    part_of = []
    for param in params:
        place = (param.device_mesh, _divided_dimensions(param)) if is_distributed(param) else None
        if place not in places:
            places[place] = len(parts)
            along = [] if place is None else _groups_along(*place)
            parts.append({group.group_name for group, is_divided in along if is_divided})
            groups |= {group.group_name: group for group, _ in along}
        part_of.append(places[place])
    if not groups and partition_group is None:
        return None
    return Agreement(parts, part_of, groups, partition_group, device)


def _divided_dimensions(param: DTensor) -> tuple[int, ...]:
    """The dimensions of its mesh over which a tensor is divided."""
    return tuple(
        dimension for dimension, placement in enumerate(param.placements) if not placement.is_replicate()
    )


def _groups_along(mesh: DeviceMesh, divided: tuple[int, ...]) -> list[tuple[ProcessGroup, bool]]:
    """The processes along each dimension of a mesh to which this one belongs, and whether that is a divided one."""
    if mesh.get_coordinate() is None:
        return []
    return [
        (mesh.get_group(dimension), dimension in divided)
        for dimension in range(mesh.ndim)
        if mesh.size(dimension) > 1
    ]


def _reduced(values: Tensor, operation: Any, group: ProcessGroup) -> Tensor:
    """The sum or maximum over the group's processes, where ``values`` are; they may be lost."""
    within_reach = values.to(_device_within_reach(group, values.device))
    torch.distributed.all_reduce(within_reach, operation, group)
    return within_reach.to(values.device)


def _device_within_reach(group: ProcessGroup, device: torch.device) -> torch.device:
    """Where the group can communicate: on ``device``, if it can, which may be that of offloaded parameters."""
    kinds = [pair.split(":")[0] for pair in torch.distributed.get_backend_config(group).split(",")]
    if device.type in kinds:
        return device
    return torch.device(kinds[0], torch.accelerator.current_device_index())
