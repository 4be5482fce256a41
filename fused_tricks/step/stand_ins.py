"""Stand-ins: dense tensors that the kernels use in place of parameters that are not flat arrays.

A stand-in is an alias of the local part of a `DTensor` or of a parameter whose gradient has other strides, or a
contiguous copy of a parameter that has gaps.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .._torch import copy_all, is_zero_tensor
from ..distributed.sharding import is_distributed, is_shard_of, local_part, placed_like
from .shared_memory import address_of, missing_bytes

if TYPE_CHECKING:
    from .entry import Entry


class StandIns:
    """The stand-ins of a plan.

    Args:
        entries: The entries of the plan.
    """

    def __init__(self, entries: Iterable[Entry]) -> None:
        self._entries = [entry for entry in entries if entry.is_staged]
        # A plan guard may read the local parts of the others itself.
        self._unreadable = [entry for entry in self._entries if entry.spec is None]
        self._copies = [entry for entry in self._entries if entry.is_copy]

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def has_shards(self) -> bool:
        """True if a plan guard may read a gradient without its stand-in."""
        return len(self._unreadable) < len(self._entries)

    @contextmanager
    def filled(self, redistributed: dict[Tensor, Tensor], *, with_shards: bool) -> Iterator[bool]:
        """Copies values and gradients into the stand-ins for one step. Drops the gradients afterwards.

        Args:
            redistributed: The local parts of gradients, by parameter. Missing parts are added. Redistributing a
                gradient can be a collective, so a retry with a new plan must reuse the parts.
            with_shards: False leaves out the entries with a `spec`.

        Yields:
            True if the stand-ins are filled; False if the plan is stale.
        """
        entries = self._entries if with_shards else self._unreadable
        copies = _Copies([], [])
        try:
            are_filled = all(_fill(entry, redistributed, copies) for entry in entries)
            copies.run()
            yield are_filled
        finally:
            for entry in entries:
                entry.source.grad = None

    def write_back(self) -> None:
        """Copies the updated copies back into their parameters."""
        updated = [entry for entry in self._copies if entry.source.grad is not None]
        params = [local_part(entry.param) for entry in updated]
        copies = _Copies([], [])
        for entry, param in zip(updated, params, strict=True):
            copies.add(param, entry.source)
        copies.run()
        for entry, param in zip(updated, params, strict=True):
            if param is not entry.param:
                torch.autograd.graph.increment_version((entry.param, param))
            entry.identity = identity_of(entry.param, param)


class _Copies(NamedTuple):
    """The copies of one step, which run in one call."""

    targets: list[Tensor]
    values: list[Tensor]

    def add(self, target: Tensor, value: Tensor) -> None:
        if target.is_neg():
            # torch refuses the target in a list.
            target.copy_(value)
            return
        self.targets.append(target)
        self.values.append(value)

    def run(self) -> None:
        if self.targets:
            copy_all(self.targets, self.values)


def _fill(entry: Entry, redistributed: dict[Tensor, Tensor], copies: _Copies) -> bool:
    source, grad = entry.source, entry.param.grad
    if grad is None:
        return True
    if entry.is_copy:
        if not _is_as_copied(entry):
            return False
        copies.add(source, local_part(entry.param))
    elif not _is_where_it_was(entry):
        return False
    if is_distributed(grad) != (entry.local is not entry.param):
        return False
    if entry.local is not entry.param:
        if entry.param not in redistributed:
            redistributed[entry.param] = local_part(placed_like(grad, entry.param))
        grad = redistributed[entry.param]
    if (grad.dtype, grad.shape, grad.device) != (entry.grad_dtype, source.shape, source.device):
        return False
    if missing_bytes(grad):
        return False
    if grad.stride() != source.stride() or grad.is_neg() or is_zero_tensor(grad):
        value, grad = grad, torch.empty_like(source, dtype=grad.dtype)
        copies.add(grad, value)
    if source.grad_dtype != grad.dtype:
        source.grad_dtype = grad.dtype
    source.grad = grad
    return True


def _is_where_it_was(entry: Entry) -> bool:
    """True if a `DTensor` still has the local part of its plan. A plan guard checks any other parameter."""
    if entry.spec is not None:
        return is_shard_of(entry.param, entry.local, entry.spec)
    return entry.local is entry.param or address_of(local_part(entry.param)) == address_of(entry.local)


def _is_as_copied(entry: Entry) -> bool:
    """True if a copied parameter is as in its plan."""
    param, source = local_part(entry.param), entry.source
    if entry.master is not None and identity_of(entry.param, param) != entry.identity:
        return False
    return (
        param.shape == source.shape
        and param.dtype == source.dtype
        and param.device == source.device
        and not missing_bytes(param)
    )


def identity_of(param: Tensor, local: Tensor) -> tuple[int, ...]:
    """Returns the address and version counters, which change when a parameter is written or its memory is replaced."""
    return address_of(local), param._version, local._version


def same_strides(a: Tensor, b: Tensor) -> bool:
    """True if both tensors have the same strides, dimensions of one element ignored."""
    return all(m == n for m, n, size in zip(a.stride(), b.stride(), a.shape, strict=True) if size > 1)
