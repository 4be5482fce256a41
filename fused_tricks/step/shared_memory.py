"""Checks of the memory of tensors: presence, size, and overlaps between the tensors of a step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import combinations
from typing import NamedTuple

import torch
from torch import Tensor

from .._torch import is_fake, is_wrapper_subclass, is_zero_tensor
from ..distributed.sharding import PLAIN, local_part

GRADIENT = "gradient"
PARAMETER = "parameter"


class Piece(NamedTuple):
    """A tensor that a step reads or writes.

    Attributes:
        tensor: The local part of the tensor.
        key: `PARAMETER`, `GRADIENT`, or the tensor's key in the parameter's state.
        owner: The name of the parameter in errors.
        has_master: True if the parameter has a master.
    """

    tensor: Tensor
    key: str
    owner: str
    has_master: bool

    @property
    def name(self) -> str:
        """The name of the tensor in errors."""
        return self.owner if self.key == PARAMETER else f"the {self.key} of {self.owner}"


class _Span(NamedTuple):
    begin: int
    end: int
    piece: Piece


def has_memory(tensor: Tensor) -> bool:
    """True if a tensor has memory for its elements. False on `meta` and for a `FakeTensor`."""
    if type(tensor) in PLAIN:
        return not tensor.is_meta
    local = local_part(tensor)
    return local.device.type != "meta" and not is_fake(local)


def device_of(params: Iterable[Tensor], otherwise: torch.device) -> torch.device:
    """Returns the device of the first tensor that has memory; `otherwise` if no tensor has memory."""
    return next((param.device for param in params if has_memory(param)), otherwise)


def is_addressable(tensor: Tensor) -> bool:
    """True if address, shape and strides of a tensor give the location of its elements."""
    if type(tensor) in PLAIN:
        return not tensor.is_meta and tensor.layout == torch.strided
    return has_memory(tensor) and not is_wrapper_subclass(tensor) and tensor.layout == torch.strided


def address_of(tensor: Tensor) -> int:
    """Returns the address of a tensor's first element; 0 if the tensor is not addressable."""
    return tensor.data_ptr() if is_addressable(tensor) else 0


def missing_bytes(tensor: Tensor) -> int:
    """Returns the number of bytes that a storage is too small for its tensor, as after `storage.resize_(0)`."""
    local = local_part(tensor)
    if not is_addressable(local) or is_zero_tensor(local) or local.numel() == 0:
        return 0
    end = int(local.storage_offset()) * local.element_size() + _extent(local)
    return max(0, end - local.untyped_storage().nbytes())


def overlaps_itself(tensor: Tensor) -> bool:
    """True if two elements of a tensor overlap in memory, as after `expand`."""
    if not is_addressable(tensor) or tensor.is_contiguous():
        return False
    reach = 0
    for stride, size in sorted(_dimensions(tensor)):
        if stride <= reach:
            return _marked([tensor]) < tensor.numel() * tensor.element_size()
        reach += (size - 1) * stride
    return False


def must_be_in_order(pieces: Sequence[Piece]) -> bool:
    """True if the result of a step depends on the order of the updates, because parameters share memory.

    Interleaved tensors without a common element, such as the columns of a matrix, share no memory.

    Raises:
        RuntimeError: An FP16 or BF16 parameter, its master or its buffer shares memory with another tensor that a step
            writes, or two tensors of one update overlap without being the same.
    """
    spans = [
        _Span(address, address + _extent(piece.tensor), piece)
        for piece in pieces
        if is_addressable(piece.tensor) and piece.tensor.numel() and (address := piece.tensor.data_ptr())
    ]
    is_shared = False
    for cluster in _clusters(spans):
        for a, b in _written_pairs(cluster):
            # Once an order is required, only pairs that are refused still matter.
            if is_shared and a.owner != b.owner and not (a.has_master or b.has_master):
                continue
            if _have_a_common_element(a, b):
                is_shared = _is_shared(a, b) or is_shared
    return is_shared


def _clusters(spans: list[_Span]) -> Iterator[list[_Span]]:
    """Yields the lists of two or more spans that are connected by overlaps."""
    spans.sort(key=lambda span: span.begin)
    cluster: list[_Span] = []
    end = 0
    for span in spans:
        if span.begin >= end:
            if len(cluster) > 1:
                yield cluster
            cluster = []
        cluster.append(span)
        end = max(end, span.end)
    if len(cluster) > 1:
        yield cluster


def _written_pairs(cluster: list[_Span]) -> Iterator[tuple[Piece, Piece]]:
    """Yields the pairs of pieces whose spans overlap, at least one of them written. Skips interleaved tensors."""
    if all(span.piece.key == GRADIENT for span in cluster):
        return
    tensors = [span.piece.tensor for span in cluster]
    if _marked(tensors) == sum(map(_bytes, tensors)):
        return
    for a, b in combinations(cluster, 2):
        if b.begin < a.end and not a.piece.key == b.piece.key == GRADIENT:
            yield a.piece, b.piece


def _have_a_common_element(a: Piece, b: Piece) -> bool:
    return _marked([a.tensor, b.tensor]) < _marked([a.tensor]) + _marked([b.tensor])


def _is_shared(a: Piece, b: Piece) -> bool:
    """True if two pieces with a common element require an order. Raises RuntimeError if no order is correct."""
    if a.owner == b.owner:
        if not _is_same(a.tensor, b.tensor):
            raise RuntimeError(
                f"{a.name} and {b.name} overlap without being the same tensor; clone() one of them"
            )
        if {a.key, b.key} == {PARAMETER, GRADIENT}:
            # Each element is read before it is written.
            return False
    if GRADIENT not in (a.key, b.key) and (a.has_master or b.has_master):
        raise RuntimeError(
            f"{a.name} and {b.name} share memory, and the float32 master of a float16 or bfloat16 parameter cannot "
            "follow writes of another update; clone() one of them, or pass only one to the optimizer"
        )
    return True


def _is_same(a: Tensor, b: Tensor) -> bool:
    return (a.data_ptr(), a.shape, a.stride(), a.dtype) == (b.data_ptr(), b.shape, b.stride(), b.dtype)


def _dimensions(tensor: Tensor) -> list[tuple[int, int]]:
    """Returns stride and size of each dimension of more than one element."""
    return [(stride, size) for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1]


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _extent(tensor: Tensor) -> int:
    """Returns the number of bytes from the start of a tensor's first element to the end of its last element."""
    if tensor.is_contiguous():
        return _bytes(tensor)
    if not tensor.numel():
        return 0
    last = sum(stride * (size - 1) for stride, size in zip(tensor.stride(), tensor.shape, strict=True))
    return (last + 1) * tensor.element_size()


def _marked(tensors: list[Tensor]) -> int:
    """Returns the number of bytes in the union of tensors on one device."""
    begin = min(tensor.data_ptr() for tensor in tensors)
    end = max(tensor.data_ptr() + _extent(tensor) for tensor in tensors)
    unit = math.gcd(*(n for t in tensors for n in (t.element_size(), t.data_ptr() - begin)))
    marks = torch.zeros((end - begin) // unit, dtype=torch.bool, device="cpu")
    for tensor in tensors:
        words = tensor.element_size() // unit
        strides = (*(stride * words for stride in tensor.stride()), 1)
        marks.as_strided((*tensor.shape, words), strides, (tensor.data_ptr() - begin) // unit).fill_(True)
    return int(marks.count_nonzero()) * unit
