"""Stand-ins: dense tensors that the kernels use in place of parameters that are not flat arrays.

A stand-in is an alias of the local part of a `DTensor`, or a contiguous copy of a parameter that has gaps or whose
gradient has other strides.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .._torch import is_zero_tensor
from ..distributed.sharding import is_distributed, local_part, placed_like
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

    def __len__(self) -> int:
        return len(self._entries)

    @contextmanager
    def filled(self, redistributed: dict[Tensor, Tensor]) -> Iterator[bool]:
        """Copies values and gradients into the stand-ins for one step. Drops the gradients afterwards.

        Args:
            redistributed: The local parts of gradients, by parameter. Missing parts are added. Redistributing a
                gradient can be a collective, so a retry with a new plan must reuse the parts.

        Yields:
            True if the stand-ins are filled; False if the plan is stale.
        """
        try:
            yield all(_fill(entry, redistributed) for entry in self._entries)
        finally:
            for entry in self._entries:
                entry.source.grad = None

    def write_back(self) -> None:
        """Copies the updated stand-ins back into their parameters."""
        for entry in self._entries:
            if entry.source.grad is None:
                continue
            param = local_part(entry.param)
            if entry.is_copy:
                param.copy_(entry.source)
            if param is not entry.param:
                torch.autograd.graph.increment_version((entry.param, param))
            entry.identity = identity_of(entry.param, param)


def _fill(entry: Entry, redistributed: dict[Tensor, Tensor]) -> bool:
    source, grad = entry.source, entry.param.grad
    source.grad = None
    if grad is None:
        return True
    param = local_part(entry.param)
    if entry.master is not None and identity_of(entry.param, param) != entry.identity:
        return False
    if is_distributed(grad) != (param is not entry.param):
        return False
    if entry.param not in redistributed:
        redistributed[entry.param] = local_part(placed_like(grad, entry.param))
    grad = redistributed[entry.param]
    if grad.shape != source.shape or grad.dtype != entry.grad_dtype or not _is_alike(param, source):
        return False
    if missing_bytes(param) or missing_bytes(grad):
        return False
    if entry.is_copy:
        source.copy_(param)
        grad = grad.resolve_neg().clone(memory_format=torch.contiguous_format)
    elif address_of(param) != address_of(source) or param.stride() != source.stride() or param.is_neg():
        return False
    elif not same_strides(grad, source) or grad.is_neg() or is_zero_tensor(grad):
        grad = torch.empty_like(source, dtype=grad.dtype).copy_(grad)
    source.grad_dtype = grad.dtype
    source.grad = grad
    return True


def identity_of(param: Tensor, local: Tensor) -> tuple[int, ...]:
    """Returns the address and version counters, which change when a parameter is written or its memory is replaced."""
    return address_of(local), param._version, local._version


def same_strides(a: Tensor, b: Tensor) -> bool:
    """True if both tensors have the same strides, dimensions of one element ignored."""
    return all(m == n for m, n, size in zip(a.stride(), b.stride(), a.shape, strict=True) if size > 1)


def _is_alike(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device
