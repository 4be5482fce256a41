"""The update kernel, in Triton."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ...step.parameters import EMA_PARAM, MASTER_PARAM, MOMENTUM_BUFFER
from . import IS_INTERPRETED
from .decision import (
    APPLIED_STEPS,
    ARRIVALS,
    CLIP,
    INVERSE_SCALE,
    SKIP,
    arrives_last,
    field,
    float64,
    found_inf_of,
    inverse_scale_of,
    record_decision,
)
from .elements import high_half, low_half, rounded_bits
from .records import (
    FIRST_UPDATE,
    FLOAT32,
    FLOAT64,
    GRAD_KIND,
    GROUP,
    IS_MATRIX,
    KIND,
    KIND_COUNT,
    PARAM,
    aligned_pointer_to,
    chunk_at,
    count_from,
    pointer_to,
    record_of,
    size_of,
    table_item,
    word_of_state,
)
from .sgd_update import average, rounded_rule, rule_of, sgd_update

MASTER = word_of_state(MASTER_PARAM)
BUFFER = word_of_state(MOMENTUM_BUFFER)
EMA = word_of_state(EMA_PARAM)
# Large tiles are faster in the interpreter, whose time hardly depends on the tile's size.
_TILES = 64 if IS_INTERPRETED else 1
# Elements of a tile with 16-byte accesses.
UPDATE_TILE = tl.constexpr(256 * _TILES)
# Elements of a tile without 16-byte accesses. The size must differ from every other tile: Triton gives one layout to
# accesses of one shape that share a value.
SCALAR_TILE = tl.constexpr(64 * _TILES)


class Chunk(NamedTuple):
    """The work of one program: the addresses of the tensors' first elements, and the range of elements of the chunk."""

    grad: Any
    param: Any
    master: Any
    buffer: Any
    ema: Any
    begin: Any
    count: Any
    has_momentum: Any


@triton.jit
def is_first_update(record, tensor: tl.constexpr, begin, number):
    """Returns True if update `number` is the first update of a state tensor, which has word `tensor` of the record.

    The program of the first chunk writes the note. Programs of other chunks read -1 or `number`, depending on timing,
    and both mean "first".
    """
    noted_at = pointer_to(table_item(record, tensor + FIRST_UPDATE), tl.int64)
    noted = tl.load(noted_at, volatile=True)
    if (noted < 0) & (begin == 0):
        tl.atomic_xchg(noted_at, number, sem="relaxed")
    return (noted < 0) | (noted == number)


@triton.jit
def note_master(record, number):
    """Notes update `number` as the first update of a new master."""
    noted_at = table_item(record, MASTER + FIRST_UPDATE)
    if noted_at != 0:
        noted = tl.load(pointer_to(noted_at, tl.int64))
        tl.store(pointer_to(noted_at, tl.int64), tl.where(noted < 0, number, noted))


@triton.jit
def update_elements(
    grad, weight, buffer, ema, param, begin, count, has_momentum, rule,
    kind: tl.constexpr, grad_kind: tl.constexpr, AVERAGES: tl.constexpr,
):  # fmt: skip
    """Updates elements with accesses of one element a thread. Without a master, `weight` is `param`."""
    lane = tl.arange(0, SCALAR_TILE)
    reads_buffer = has_momentum & (rule.replaces == 0)
    for i in range(begin, count, SCALAR_TILE):
        at = i + lane
        mask = at < count
        if kind == FLOAT64:
            dtype: tl.constexpr = tl.float64
        else:
            dtype: tl.constexpr = tl.float32
        if grad_kind >= FLOAT32:
            g = tl.load(pointer_to(grad, dtype) + at, mask=mask)
        else:
            word = tl.load(pointer_to(grad, tl.int16) + at, mask=mask).to(tl.int32)
            g = low_half(word, grad_kind)
        w = tl.load(pointer_to(weight, dtype) + at, mask=mask)
        b = tl.load(pointer_to(buffer, dtype) + at, mask=mask & reads_buffer)
        w, b = sgd_update(g, w, b, rule)
        tl.store(pointer_to(weight, dtype) + at, w, mask=mask)
        tl.store(pointer_to(buffer, dtype) + at, b, mask=mask & has_momentum)
        if AVERAGES:
            e = tl.load(pointer_to(ema, dtype) + at, mask=mask & rule.averages)
            tl.store(pointer_to(ema, dtype) + at, average(w, e, rule), mask=mask & rule.averages)
        if kind < FLOAT32:
            tl.store(pointer_to(param, tl.int16) + at, rounded_bits(w, kind), mask=mask)


@triton.jit
def update_vectors(
    grad, weight, buffer, ema, param, count, has_momentum, rule,
    kind: tl.constexpr, grad_kind: tl.constexpr, AVERAGES: tl.constexpr,
):  # fmt: skip
    """Updates elements with accesses of 16 bytes a thread. `count` and every address must be multiples of 16.

    16-bit elements are loaded and stored in pairs, as 32-bit words. Each kind of access then gets a layout in which a
    warp accesses whole 32-byte sectors. Triton exchanges the elements between the threads.
    """
    lane = tl.arange(0, UPDATE_TILE)
    pair = tl.arange(0, UPDATE_TILE // 2)
    reads_buffer = has_momentum & (rule.replaces == 0)
    for i in range(0, count, UPDATE_TILE):
        mask = lane < count - i
        pair_mask = pair < (count - i) // 16 * 8
        # Adding `i` before `lane` makes the thread's offset the same in all accesses.
        weights = aligned_pointer_to(weight, tl.float32) + i + lane
        buffers = aligned_pointer_to(buffer, tl.float32) + i + lane
        if grad_kind == FLOAT32:
            grads = aligned_pointer_to(grad, tl.float32) + i + lane
            g = tl.load(grads, mask=mask, eviction_policy="evict_first")
        else:
            words = aligned_pointer_to(grad, tl.int32) + i // 2 + pair
            word = tl.load(words, mask=pair_mask, eviction_policy="evict_first")
            g = tl.interleave(low_half(word, grad_kind), high_half(word, grad_kind))
        w = tl.load(weights, mask=mask, eviction_policy="evict_first")
        b = tl.load(buffers, mask=mask & reads_buffer, eviction_policy="evict_first")
        w, b = sgd_update(g, w, b, rule)
        tl.store(weights, w, mask=mask, cache_modifier=".cs")
        tl.store(buffers, b, mask=mask & has_momentum, cache_modifier=".cs")
        if AVERAGES:
            # The average is loaded late, because all loads together would need more than 64 registers.
            averages = aligned_pointer_to(ema, tl.float32) + i + lane
            e = tl.load(averages, mask=mask & rule.averages, eviction_policy="evict_first")
            tl.store(averages, average(w, e, rule), mask=mask & rule.averages, cache_modifier=".cs")
        if kind < FLOAT32:
            low, high = tl.split(tl.reshape(rounded_bits(w, kind).to(tl.int32), (UPDATE_TILE // 2, 2)))
            params = aligned_pointer_to(param, tl.int32) + i // 2 + pair
            tl.store(params, (low & 0xFFFF) | (high << 16), mask=pair_mask)


@triton.jit
def update_chunk(chunk, rule, kind: tl.constexpr, grad_kind: tl.constexpr, AVERAGES: tl.constexpr):
    state_size: tl.constexpr = 8 if kind == FLOAT64 else 4
    grad = chunk.grad + chunk.begin * size_of(grad_kind)
    buffer = chunk.buffer + chunk.begin * state_size
    ema = chunk.ema + chunk.begin * state_size
    param = chunk.param + chunk.begin * size_of(kind)
    if kind < FLOAT32:
        weight = chunk.master + chunk.begin * state_size
    else:
        weight = param
    done = chunk.count * 0
    if kind != FLOAT64:
        addresses = grad | weight | param | tl.where(chunk.has_momentum, buffer, 0)
        if AVERAGES:
            addresses |= tl.where(rule.averages, ema, 0)
        if addresses % 16 == 0:
            done = chunk.count // 16 * 16
            update_vectors(
                grad, weight, buffer, ema, param, done, chunk.has_momentum, rule, kind, grad_kind, AVERAGES
            )
    update_elements(
        grad,
        weight,
        buffer,
        ema,
        param,
        done,
        chunk.count,
        chunk.has_momentum,
        rule,
        kind,
        grad_kind,
        AVERAGES,
    )


@triton.jit
def update_kernel(
    chunks, tensors, grads, chunk_count, state, unscales, grad_scale, found_inf,
    is_scanned, groups,
    KINDS: tl.constexpr, GROUPS: tl.constexpr, AVERAGES: tl.constexpr,
):  # fmt: skip
    """Updates every tensor that has a gradient.

    The order of chunks is the reverse of the scan, because the last reads of the scan are still in the cache.
    """
    inverse_scale = tl.load(field(state, INVERSE_SCALE, tl.float32))
    clip = tl.load(field(state, CLIP, tl.float64))
    skips = tl.load(field(state, SKIP, tl.int32))
    number = tl.load(field(state, APPLIED_STEPS, tl.int64))
    if is_scanned == 0:
        # Without a scan, every program computes the same decision.
        inverse_scale = inverse_scale_of(state, unscales, grad_scale)
        clip = float64(1.0)
        skips = found_inf_of(found_inf)
        number += 1
    index = chunk_count - 1 - tl.program_id(0)
    if (index >= 0) & (skips == 0):
        tensor, begin = chunk_at(chunks, index)
        grad = table_item(grads, tensor)
        if grad != 0:
            record = record_of(tensors, tensor)
            kind = table_item(record, KIND)
            grad_kind = table_item(record, GRAD_KIND)
            group = table_item(record, GROUP)
            is_matrix = table_item(record, IS_MATRIX)
            rule = rule_of(groups, group, is_matrix, number - 1, inverse_scale, clip, GROUPS)
            has_momentum = (rule.momentum != 0).to(tl.int32) != 0
            replaces = rule.replaces
            if has_momentum:
                replaces = is_first_update(record, BUFFER, begin, number)
            replaces_average = rule.replaces_average
            if AVERAGES:
                if rule.averages:
                    replaces_average = is_first_update(record, EMA, begin, number)
            chunk = Chunk(
                grad=grad,
                param=table_item(record, PARAM),
                master=table_item(record, MASTER),
                buffer=table_item(record, BUFFER),
                ema=table_item(record, EMA),
                begin=begin,
                count=count_from(record, begin),
                has_momentum=has_momentum,
            )
            single_rule = rounded_rule(rule, replaces, replaces_average, tl.float32)
            # With averages FP64 comes first: its rule occupies many registers, and is dead afterwards.
            for a in tl.static_range(
                KIND_COUNT - 1 if AVERAGES else 0, -1 if AVERAGES else KIND_COUNT, -1 if AVERAGES else 1
            ):
                for b in tl.static_range(KIND_COUNT):
                    if (KINDS >> (KIND_COUNT * a + b)) & 1:
                        if (kind == a) & (grad_kind == b):
                            if a == FLOAT64:
                                double_rule = rounded_rule(rule, replaces, replaces_average, tl.float64)
                                update_chunk(chunk, double_rule, a, b, AVERAGES)
                            else:
                                update_chunk(chunk, single_rule, a, b, AVERAGES)
            if begin == 0:
                note_master(record, number)
    if is_scanned == 0:
        if arrives_last(state):
            # Computing the value again saves a register during the update.
            inverse_scale = inverse_scale_of(state, unscales, grad_scale)
            record_decision(state, found_inf_of(found_inf), inverse_scale, float64(1.0))
    elif tl.program_id(0) == 0:
        # The scan is over. Two scans of different sizes that overlap by mistake leave a wrong count, which this resets.
        tl.store(field(state, ARRIVALS, tl.int32), 0)
