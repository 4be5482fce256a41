"""The scan kernel, in Triton: the check for non-finite gradients, the gradient norm, and the decision."""

import triton
import triton.language as tl

from ...distributed.found_inf_reduction import PARTIALS
from . import IS_INTERPRETED
from .arithmetic import fma, two_sum
from .decision import (
    FOUND_INF,
    arrives_last,
    decide,
    field,
    float64,
)
from .elements import high_half, low_half
from .records import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    FLOAT64,
    GRAD_KIND,
    KIND_COUNT,
    aligned_pointer_to,
    chunk_at,
    count_from,
    pointer_to,
    record_of,
    shard_class_of,
    size_of,
    table_item,
)

# Indices in the partials.
PARTIAL_FOUND_INF = tl.constexpr(PARTIALS.index("found_inf"))
IN_DOUBLE = tl.constexpr(PARTIALS.index("in_double"))
SQUARES = tl.constexpr(PARTIALS.index("squares"))
# Large tiles are faster in the interpreter, whose time hardly depends on the tile's size.
_TILES = 64 if IS_INTERPRETED else 1
# 32-bit words of a tile: four 16-byte accesses a thread, or two where the squares use registers.
SCAN_TILE = tl.constexpr(512 * _TILES)
NORM_TILE = tl.constexpr(256 * _TILES)
# Elements of a tile without 16-byte accesses.
SCALAR_TILE = tl.constexpr(64 * _TILES)
# The range in which a sum of squares from pairs of FP32 numbers is accurate.
LEAST_IN_FP32 = tl.constexpr(2.0**-90)
MOST_IN_FP32 = tl.constexpr(2.0**126)


@triton.jit
def carries(word, kind: tl.constexpr):
    """Returns nonzero if an element in `word` is not finite.

    The exponent bits of an element that is not finite are all ones. With the sign cleared, adding 1 to the exponent
    carries into the sign bit. Two 16-bit elements in one word do not affect each other.
    """
    if kind == FLOAT16:
        return ((word & 0x7FFF7FFF) + 0x04000400) & -0x7FFF8000
    elif kind == BFLOAT16:
        return ((word & 0x7FFF7FFF) + 0x00800080) & -0x7FFF8000
    elif kind == FLOAT32:
        return ((word & 0x7FFFFFFF) + 0x00800000) & -0x80000000
    else:
        return ((((word >> 52) & 0x7FF) + 1) >> 11).to(tl.int32)


@triton.jit
def squares_in(word, kind: tl.constexpr):
    """Returns the sum of the squares of the elements in `word`, in FP64."""
    if kind == FLOAT64:
        value = word.to(tl.float64, bitcast=True)
        return value * value
    elif kind == FLOAT32:
        value = word.to(tl.float32, bitcast=True).to(tl.float64)
        return value * value
    else:
        low = low_half(word, kind).to(tl.float64)
        high = high_half(word, kind).to(tl.float64)
        return low * low + high * high


@triton.jit
def with_square(high, low, value, is_exact: tl.constexpr):
    """Adds a square to a sum of two FP32 numbers. Most GPUs have few FP64 units.

    Args:
        is_exact: True if FP32 represents the square exactly, as for a 16-bit element.
    """
    square = value * value
    total, error = two_sum(high, square)
    if not is_exact:
        error += fma(value, value, square * -1.0)
    return total, low + error


@triton.jit
def with_squares_in(high, low, word, kind: tl.constexpr):
    """Adds the squares of the elements in `word` to a sum of two FP32 numbers."""
    if kind == FLOAT32:
        return with_square(high, low, word.to(tl.float32, bitcast=True), False)
    else:
        high, low = with_square(high, low, low_half(word, kind), True)
        return with_square(high, low, high_half(word, kind), True)


@triton.jit
def scan_span(address, count, kind: tl.constexpr, wants_norm: tl.constexpr):
    """Returns 1 if any of `count` elements is not finite, otherwise 0; and the sum of squares if `wants_norm`."""
    per_word: tl.constexpr = 2 if kind == FLOAT16 or kind == BFLOAT16 else 1
    tile: tl.constexpr = NORM_TILE if wants_norm else SCAN_TILE
    found = tl.full((tile,), 0, tl.int32)
    total = float64(0.0)
    vectors = tl.where(address % 16 == 0, count // (4 * per_word), 0)
    if kind != FLOAT64:
        words = aligned_pointer_to(address, tl.int32)
        lane = tl.arange(0, tile)
        high = tl.full((tile,), 0, tl.float32)
        low = tl.full((tile,), 0, tl.float32)
        for i in range(0, vectors * 4, tile):
            word = tl.load(words + (i + lane), mask=i + lane < vectors * 4, other=0)
            found |= carries(word, kind)
            if wants_norm:
                high, low = with_squares_in(high, low, word, kind)
        if wants_norm:
            total = tl.sum(high.to(tl.float64)) + tl.sum(low.to(tl.float64))
            # Outside this range, squares may overflow or underflow in FP32. NaN also takes this branch.
            if not ((total >= LEAST_IN_FP32) & (total <= MOST_IN_FP32)):
                total = squares_in_fp64(words, vectors * 4, kind)
    else:
        vectors = vectors * 0
    tail_found = tl.full((SCALAR_TILE,), 0, tl.int32)
    tail_squares = tl.full((SCALAR_TILE,), 0, tl.float64)
    lane = tl.arange(0, SCALAR_TILE)
    for i in range(vectors * (4 * per_word), count, SCALAR_TILE):
        mask = i + lane < count
        if kind == FLOAT64:
            word = tl.load(pointer_to(address, tl.int64) + (i + lane), mask=mask, other=0)
        elif kind == FLOAT32:
            word = tl.load(pointer_to(address, tl.int32) + (i + lane), mask=mask, other=0)
        else:
            element = tl.load(pointer_to(address, tl.int16) + (i + lane), mask=mask, other=0)
            word = element.to(tl.int32) & 0xFFFF
        tail_found |= carries(word, kind)
        if wants_norm:
            tail_squares += squares_in(word, kind)
    any_found = tl.maximum(tl.max((found != 0).to(tl.int32)), tl.max((tail_found != 0).to(tl.int32)))
    if wants_norm:
        total += tl.sum(tail_squares)
    return any_found, total


@triton.jit
def squares_in_fp64(words, count, kind: tl.constexpr):
    """Returns the sum of the squares of the elements in `count` words, computed in FP64."""
    lane = tl.arange(0, SCALAR_TILE)
    squares = tl.full((SCALAR_TILE,), 0, tl.float64)
    for i in range(0, count, SCALAR_TILE):
        squares += squares_in(tl.load(words + (i + lane), mask=i + lane < count, other=0), kind)
    return tl.sum(squares)


@triton.jit
def scan_kernel(
    chunks, tensors, grads, chunk_count, state, unscales, grad_scale, found_inf,
    partial_squares, partials, max_norm, in_double, is_dynamic, scale_rule,
    GRAD_KINDS: tl.constexpr, WANTS_NORM: tl.constexpr, SHARD_CLASSES: tl.constexpr,
):  # fmt: skip
    """Checks the gradients for elements that are not finite, and sums their squares if `WANTS_NORM`.

    If `SHARD_CLASSES` is 0, the last program decides about the step. Otherwise the last program writes `partials`, with
    one sum of squares for each shard class, for the reduction over processes.
    """
    index = tl.program_id(0)
    if index < chunk_count:
        found = tl.full((), 0, tl.int32)
        squares = float64(0.0)
        tensor, begin = chunk_at(chunks, index)
        grad = table_item(grads, tensor)
        if grad != 0:
            record = record_of(tensors, tensor)
            count = count_from(record, begin)
            grad_kind = table_item(record, GRAD_KIND)
            for kind in tl.static_range(KIND_COUNT):
                if (GRAD_KINDS >> kind) & 1:
                    if grad_kind == kind:
                        found, squares = scan_span(grad + begin * size_of(kind), count, kind, WANTS_NORM)
        if found != 0:
            tl.atomic_or(field(state, FOUND_INF, tl.int32), 1, sem="relaxed")
        if WANTS_NORM:
            tl.store(pointer_to(partial_squares, tl.float64) + index, squares)
    if arrives_last(state):
        found = tl.load(field(state, FOUND_INF, tl.int32), volatile=True)
        total = float64(0.0)
        if SHARD_CLASSES == 0:
            if WANTS_NORM:
                total = sum_of(partial_squares, chunks, tensors, chunk_count, None)
            decide(
                state,
                found,
                total,
                unscales,
                grad_scale,
                found_inf,
                max_norm,
                in_double,
                is_dynamic,
                scale_rule,
                WANTS_NORM,
            )
        else:
            for shard_class in tl.static_range(SHARD_CLASSES):
                if WANTS_NORM:
                    total = sum_of(partial_squares, chunks, tensors, chunk_count, shard_class)
                tl.store(pointer_to(partials, tl.float64) + SQUARES + shard_class, total)
            tl.store(pointer_to(partials, tl.float64) + PARTIAL_FOUND_INF, found.to(tl.float64))
            tl.store(pointer_to(partials, tl.float64) + IN_DOUBLE, in_double.to(tl.float64))
            tl.store(field(state, FOUND_INF, tl.int32), 0)


@triton.jit
def decide_kernel(
    state, unscales, grad_scale, found_inf, partials, max_norm, in_double, is_dynamic, scale_rule,
    WANTS_NORM: tl.constexpr, SHARD_CLASSES: tl.constexpr,
):  # fmt: skip
    """Decides about the step, after `partials` were reduced over the processes."""
    found = (tl.load(pointer_to(partials, tl.float64) + PARTIAL_FOUND_INF) != 0).to(tl.int32)
    in_double = (tl.load(pointer_to(partials, tl.float64) + IN_DOUBLE) != 0).to(tl.int32)
    squares = float64(0.0)
    for shard_class in tl.static_range(SHARD_CLASSES):
        squares += tl.load(pointer_to(partials, tl.float64) + SQUARES + shard_class)
    decide(
        state,
        found,
        squares,
        unscales,
        grad_scale,
        found_inf,
        max_norm,
        in_double,
        is_dynamic,
        scale_rule,
        WANTS_NORM,
    )


@triton.jit
def sum_of(partial_squares, chunks, tensors, count, shard_class: tl.constexpr):
    """Returns the sum of `partial_squares` over the chunks of a shard class; over all chunks if None."""
    lane = tl.arange(0, SCALAR_TILE)
    total = tl.full((SCALAR_TILE,), 0, tl.float64)
    for i in range(0, count, SCALAR_TILE):
        mask = i + lane < count
        if shard_class is not None:
            tensor = tl.load(pointer_to(chunks, tl.int64) + (i + lane), mask=mask, other=0) >> 32
            mask &= shard_class_of(tensors, tensor) == shard_class
        total += tl.load(
            pointer_to(partial_squares, tl.float64) + (i + lane), mask=mask, other=0.0, volatile=True
        )
    return tl.sum(total)
