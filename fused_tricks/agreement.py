"""How processes that hold parts of one model decide together whether to skip a step, and by which norm to clip."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .sharding import is_distributed

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


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
        verdict: FP64 tensor of (1 + ``parts``,), written by the scan: whether a gradient is not finite, then the sum of
            squares of each part.
        parts: How many.
        part_of: For each parameter, which part it belongs to.
    """

    def __init__(
        self,
        parts: dict[tuple[str, ...], int],
        part_of: list[int],
        groups: dict[str, ProcessGroup],
        partition_group: ProcessGroup | None,
        device: torch.device,
    ) -> None:
        self.parts = max(1, len(parts))
        self.part_of = part_of
        self.verdict = torch.zeros(1 + self.parts, dtype=torch.float64, device=device)
        self._partition_group = partition_group
        self._sums: list[tuple[ProcessGroup, slice | Tensor]] = []
        for name, group in groups.items():
            fields = [0, *(1 + part for names, part in parts.items() if name in names)]
            whole = len(fields) == 1 + self.parts
            self._sums.append((group, slice(None) if whole else torch.tensor(fields, device=device)))

    def reach(self) -> None:
        """Makes ``verdict`` that of all processes together. All of them must call it."""
        verdict = self.verdict
        for group, fields in self._sums:
            verdict[fields] = _added(verdict[fields], group)
        if self._partition_group is not None:
            # Processes of other parts of the model may divide theirs otherwise.
            whole = torch.stack((verdict[0], verdict[1:].sum()))
            verdict.zero_()[:2] = _added(whole, self._partition_group)


def find_agreement(
    params: Sequence[Tensor], partition_group: ProcessGroup | None, device: torch.device
) -> Agreement | None:
    """What the process that has these parameters must agree upon with others; None where it decides alone.

    Every process of a mesh finds the same, whichever gradients and elements it has.

    Args:
        params: All parameters of an optimizer.
        partition_group: The group over which the parameters of the model are partitioned, if they are.
        device: Where the verdict is needed.
    """
    parts: dict[tuple[str, ...], int] = {}
    groups: dict[str, ProcessGroup] = {}
    part_of = []
    for param in params:
        dividing = []
        for group, divides in _groups_of(param) if is_distributed(param) else ():
            groups.setdefault(group.group_name, group)
            if divides:
                dividing.append(group.group_name)
        part_of.append(parts.setdefault(tuple(dividing), len(parts)))
    if not groups and partition_group is None:
        return None
    return Agreement(parts, part_of, groups, partition_group, device)


def _groups_of(param: Any) -> list[tuple[ProcessGroup, bool]]:
    """The processes along each dimension of a ``DTensor``'s mesh, and whether it is divided over them."""
    mesh = param.device_mesh
    if mesh.get_coordinate() is None:
        return []
    return [
        (mesh.get_group(dimension), not placement.is_replicate())
        for dimension, placement in enumerate(param.placements)
        if mesh.size(dimension) > 1
    ]


def _added(values: Tensor, group: ProcessGroup) -> Tensor:
    """The sum over the group's processes, where ``values`` are; they may be lost."""
    within_reach = values.to(_device_within_reach(group, values.device))
    torch.distributed.all_reduce(within_reach, group=group)
    return within_reach.to(values.device)


def _device_within_reach(group: ProcessGroup, device: torch.device) -> torch.device:
    """Where the group can communicate: on ``device``, if it can, which may be that of offloaded parameters."""
    kinds = [pair.split(":")[0] for pair in torch.distributed.get_backend_config(group).split(",")]
    if device.type in kinds:
        return device
    return torch.device(kinds[0], torch.accelerator.current_device_index())
