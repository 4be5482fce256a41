"""Which tensors have memory, and which of those that a step writes share some."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import combinations
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from .._torch import is_fake, is_wrapper_subclass, is_zero_tensor
from ..distributed.sharding import local_part

GRADIENT = "gradient"
PARAMETER = "parameter"
# Types that override nothing.
_PLAIN = (Tensor, Parameter)


class Piece(NamedTuple):
    """A tensor that a step reads or writes.

    Attributes:
        tensor: The part of it that is on this process.
        key: `PARAMETER`, `GRADIENT`, or its key in the parameter's state.
        owner: What errors call the parameter.
        has_master: True where the parameter has a master.
    """

    tensor: Tensor
    key: str
    owner: str
    has_master: bool

    @property
    def name(self) -> str:
        return self.owner if self.key == PARAMETER else f"the {self.key} of {self.owner}"


class _Span(NamedTuple):
    begin: int
    end: int
    piece: Piece


def has_memory(tensor: Tensor) -> bool:
    """True unless a tensor has a shape and no elements: one on `meta`, or a `FakeTensor`."""
    if type(tensor) in _PLAIN:
        return not tensor.is_meta
    local = local_part(tensor)
    return local.device.type != "meta" and not is_fake(local)


def device_of(params: Iterable[Tensor], otherwise: torch.device) -> torch.device:
    """Returns the device of the first tensor that has memory; `otherwise` where none has."""
    return next((param.device for param in params if has_memory(param)), otherwise)


def is_addressable(tensor: Tensor) -> bool:
    """True if a tensor's elements are where its address, shape and strides say."""
    if type(tensor) in _PLAIN:
        return not tensor.is_meta and tensor.layout == torch.strided
    return has_memory(tensor) and not is_wrapper_subclass(tensor) and tensor.layout == torch.strided


def address_of(tensor: Tensor) -> int:
    """Returns the address of a tensor's first element; 0 where a tensor has none."""
    return tensor.data_ptr() if is_addressable(tensor) else 0


def missing_bytes(tensor: Tensor) -> int:
    """Returns how many bytes a tensor's storage lacks for its elements, as after `untyped_storage().resize_(0)`."""
    local = local_part(tensor)
    if not is_addressable(local) or is_zero_tensor(local) or local.numel() == 0:
        return 0
    size = local.element_size()
    return max(0, int(local.storage_offset()) * size + _extent(local) - local.untyped_storage().nbytes())


def overlaps_itself(tensor: Tensor) -> bool:
    """True if two elements of a tensor are at one address, as after `expand`."""
    if not is_addressable(tensor) or tensor.is_contiguous():
        return False
    reach = 0
    for stride, size in sorted(_dimensions(tensor)):
        if stride <= reach:
            return _marked([tensor]) < tensor.numel() * tensor.element_size()
        reach += (size - 1) * stride
    return False


def must_be_in_order(pieces: Sequence[Piece]) -> bool:
    """True if the result of a step depends on the order in which parameters are updated, because they share memory.

    Tensors whose elements only take turns, as the columns of a matrix do, share none.

    Raises:
        RuntimeError: A float16 or bfloat16 parameter shares memory that its master cannot follow, or a gradient lies
            across what its own update writes.
    """
    spans = [
        _Span(address, address + _extent(piece.tensor), piece)
        for piece in pieces
        if is_addressable(piece.tensor) and piece.tensor.numel() and (address := piece.tensor.data_ptr())
    ]
    is_shared = False
    for cluster in _clusters(spans):
        for a, b in _written_pairs(cluster):
            # Where there is an order anyway, the others only matter where they are refused.
            if is_shared and a.owner != b.owner and not (a.has_master or b.has_master):
                continue
            if _have_a_common_element(a, b):
                is_shared = _is_shared(a, b) or is_shared
    return is_shared


def _clusters(spans: list[_Span]) -> Iterator[list[_Span]]:
    """Spans that are connected by overlaps, more than one at a time."""
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
    """Pairs of pieces whose spans overlap, one of which is written; none where all elements only take turns."""
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
    """True where it takes an order to update two pieces with elements in common; raises where none would do."""
    if a.owner == b.owner:
        if not _is_same(a.tensor, b.tensor):
            raise RuntimeError(f"{a.name} and {b.name} overlap without being the same; clone() one of them")
        if {a.key, b.key} == {PARAMETER, GRADIENT}:
            # Each element is read before it is written.
            return False
    if GRADIENT not in (a.key, b.key) and (a.has_master or b.has_master):
        raise RuntimeError(
            f"{a.name} and {b.name} share memory, and the float32 master of a float16 or bfloat16 parameter cannot "
            "follow what is written there by another update; clone() one of them, or pass only one to the optimizer"
        )
    return True


def _is_same(a: Tensor, b: Tensor) -> bool:
    return (a.data_ptr(), a.shape, a.stride(), a.dtype) == (b.data_ptr(), b.shape, b.stride(), b.dtype)


def _dimensions(tensor: Tensor) -> list[tuple[int, int]]:
    """Stride and size of each dimension of more than one element."""
    return [(stride, size) for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1]


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _extent(tensor: Tensor) -> int:
    """Bytes from a tensor's first element to behind its last."""
    if tensor.is_contiguous():
        return _bytes(tensor)
    if not tensor.numel():
        return 0
    last = sum(stride * (size - 1) for stride, size in zip(tensor.stride(), tensor.shape, strict=True))
    return (last + 1) * tensor.element_size()


def _marked(tensors: list[Tensor]) -> int:
    """Bytes that tensors on one device cover together."""
    begin = min(tensor.data_ptr() for tensor in tensors)
    end = max(tensor.data_ptr() + _extent(tensor) for tensor in tensors)
    unit = math.gcd(*(n for t in tensors for n in (t.element_size(), t.data_ptr() - begin)))
    marks = torch.zeros((end - begin) // unit, dtype=torch.bool, device="cpu")
    for tensor in tensors:
        words = tensor.element_size() // unit
        strides = (*(stride * words for stride in tensor.stride()), 1)
        marks.as_strided((*tensor.shape, words), strides, (tensor.data_ptr() - begin) // unit).fill_(True)
    return int(marks.count_nonzero()) * unit
