"""The scan and update kernels over a plan's tables. One program of one warp works on one chunk.

The tables are INT64 on the device; tables.py makes them. Kernels take their addresses as INT64 as well, so that a launch
depends on nothing but numbers.
"""

import triton
import triton.language as tl

from . import IS_INTERPRETED
from .arithmetic import sgd_update, to_bfloat16
from .decision import advance_scale, arrives_last, field, float64, inverse_of, record_decision

# Elements of a chunk.
CHUNK = tl.constexpr(16384)
# What a tensor and its gradient are made of.
FLOAT16 = tl.constexpr(0)
BFLOAT16 = tl.constexpr(1)
FLOAT32 = tl.constexpr(2)
FLOAT64 = tl.constexpr(3)

# The interpreter takes as long for a large tile as for a small one.
_TILES = 64 if IS_INTERPRETED else 1
# Words of 32 bits that a program scans at a time: four 16-byte accesses a thread, or two where squares need registers.
SCAN_TILE = tl.constexpr(512 * _TILES)
MEASURE_TILE = tl.constexpr(256 * _TILES)
# Elements that a program updates at a time.
UPDATE_TILE = tl.constexpr(256 * _TILES)
# The same where 16-byte accesses are not possible. Another size than any above: Triton gives accesses of one shape that
# share a value the same layout.
SCALAR_TILE = tl.constexpr(64 * _TILES)


@triton.jit
def pointer_to(address, dtype: tl.constexpr):
    return address.to(tl.pointer_type(dtype))


@triton.jit
def aligned_pointer_to(address, dtype: tl.constexpr):
    """Of an address that is known to be a multiple of 16."""
    return tl.multiple_of(address.to(tl.pointer_type(dtype)), 16)


@triton.jit
def table_item(table, index):
    return tl.load(pointer_to(table, tl.int64) + index)


@triton.jit
def chunk_at(chunks, index):
    """The tensor of a chunk and the chunk's first element."""
    chunk = table_item(chunks, index)
    return chunk >> 32, (chunk & 0xFFFFFFFF) * CHUNK


@triton.jit
def grad_at(grads, tensor):
    """A gradient's address, and whether it is FP32 beside a 16-bit parameter, which is the address's lowest bit."""
    address = table_item(grads, tensor)
    return address & -2, (address & 1) != 0


@triton.jit
def record_at(tensors, tensor):
    """The address of a tensor's record: param, master, buffer, first step, count, traits."""
    return tensors + tensor * 48


@triton.jit
def count_from(record, begin):
    """Elements in the chunk that begins at ``begin``."""
    return tl.minimum(table_item(record, 4) - begin, CHUNK).to(tl.int32)


# An element is not finite when its exponent bits are all ones: adding one to them, with the sign cleared, carries into
# the sign bit. Two 16-bit elements in one word do not disturb each other.
@triton.jit
def carries(word, kind: tl.constexpr):
    if kind == FLOAT16:
        return ((word & 0x7FFF7FFF) + 0x04000400) & -0x7FFF8000
    elif kind == BFLOAT16:
        return ((word & 0x7FFF7FFF) + 0x00800080) & -0x7FFF8000
    elif kind == FLOAT32:
        return ((word & 0x7FFFFFFF) + 0x00800000) & -0x80000000
    else:
        return ((((word >> 52) & 0x7FF) + 1) >> 11).to(tl.int32)


@triton.jit
def low_half(word, kind: tl.constexpr):
    """The first of the two 16-bit elements in a word, in FP32."""
    if kind == FLOAT16:
        return word.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        return (word << 16).to(tl.float32, bitcast=True)


@triton.jit
def high_half(word, kind: tl.constexpr):
    """The second one."""
    if kind == FLOAT16:
        return (word >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        return (word & -0x10000).to(tl.float32, bitcast=True)


@triton.jit
def squares_in(word, kind: tl.constexpr):
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
def scan_span(address, count, kind: tl.constexpr, measures: tl.constexpr):
    """Whether one of ``count`` elements is not finite, and the sum of their squares."""
    per_word: tl.constexpr = 2 if kind == FLOAT16 or kind == BFLOAT16 else 1
    tile: tl.constexpr = MEASURE_TILE if measures else SCAN_TILE
    found = tl.full((tile,), 0, tl.int32)
    squares = tl.full((tile,), 0, tl.float64)
    vectors = tl.where(address % 16 == 0, count // (4 * per_word), 0)
    if kind != FLOAT64:
        words = aligned_pointer_to(address, tl.int32)
        lane = tl.arange(0, tile)
        for i in range(0, vectors * 4, tile):
            word = tl.load(words + (i + lane), mask=i + lane < vectors * 4, other=0)
            found |= carries(word, kind)
            if measures:
                squares += squares_in(word, kind)
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
        if measures:
            tail_squares += squares_in(word, kind)
    any_found = tl.maximum(tl.max((found != 0).to(tl.int32)), tl.max((tail_found != 0).to(tl.int32)))
    if measures:
        total = tl.sum(squares) + tl.sum(tail_squares)
    else:
        total = float64(0.0)
    return any_found, total


@triton.jit
def inverse_scale_of(state, unscales, grad_scale):
    """``grad_scale`` and ``found_inf`` here and below: the addresses of what a GradScaler handed over, or 0."""
    scale = tl.load(field(state, 0, tl.float32))
    if grad_scale != 0:
        scale = tl.load(pointer_to(grad_scale, tl.float32))
    return tl.where(unscales != 0, inverse_of(scale), 1.0)


@triton.jit
def verdict_of(found_inf):
    found = tl.full((), 0, tl.int32)
    if found_inf != 0:
        found = (tl.load(pointer_to(found_inf, tl.float32)) != 0).to(tl.int32)
    return found


@triton.jit
def scan_kernel(
    chunks, tensors, grads, chunk_count, state, unscales, grad_scale, found_inf,
    partial_squares, max_norm, is_dynamic, scale_rule,
    KINDS: tl.constexpr, CLIPS: tl.constexpr,
):  # fmt: skip
    """Looks for gradients that are not finite and adds up their squares; the last program decides about the step."""
    index = tl.program_id(0)
    if index < chunk_count:
        found = tl.full((), 0, tl.int32)
        squares = float64(0.0)
        tensor, begin = chunk_at(chunks, index)
        address, is_wide = grad_at(grads, tensor)
        if address != 0:
            record = record_at(tensors, tensor)
            count = count_from(record, begin)
            kind = table_item(record, 5) & 3
            if KINDS & 16:
                kind = tl.where(is_wide, FLOAT32, kind)
            if kind == FLOAT16:
                if KINDS & 1:
                    found, squares = scan_span(address + begin * 2, count, FLOAT16, CLIPS)
            elif kind == BFLOAT16:
                if KINDS & 2:
                    found, squares = scan_span(address + begin * 2, count, BFLOAT16, CLIPS)
            elif kind == FLOAT32:
                if KINDS & 20:
                    found, squares = scan_span(address + begin * 4, count, FLOAT32, CLIPS)
            else:
                if KINDS & 8:
                    found, squares = scan_span(address + begin * 8, count, FLOAT64, CLIPS)
        if found != 0:
            tl.atomic_or(field(state, 44, tl.int32), 1, sem="relaxed")
        if CLIPS:
            tl.store(pointer_to(partial_squares, tl.float64) + index, squares)
    if arrives_last(state):
        found = tl.load(field(state, 44, tl.int32), volatile=True) | verdict_of(found_inf)
        inverse_scale = inverse_scale_of(state, unscales, grad_scale)
        clip = tl.full((), 1.0, tl.float32)
        if CLIPS:
            squares = sum_of(partial_squares, chunk_count)
            norm = (tl.sqrt(squares) * inverse_scale.to(tl.float64)).to(tl.float32)
            tl.store(field(state, 12, tl.float32), norm)
            ratio = tl.div_rn(float64(max_norm).to(tl.float32), norm + 1e-6)
            clip = tl.where(ratio < 1.0, ratio, 1.0)
        record_decision(state, found, inverse_scale, clip)
        if is_dynamic != 0:
            advance_scale(state, found, scale_rule)


@triton.jit
def sum_of(partial_squares, count):
    lane = tl.arange(0, SCALAR_TILE)
    total = tl.full((SCALAR_TILE,), 0, tl.float64)
    for i in range(0, count, SCALAR_TILE):
        mask = i + lane < count
        total += tl.load(
            pointer_to(partial_squares, tl.float64) + (i + lane), mask=mask, other=0.0, volatile=True
        )
    return tl.sum(total)


@triton.jit
def option_of(groups, index, option: tl.constexpr, GROUPS: tl.constexpr):
    """A number of one group in FP64: from the launch's arguments, or from the table where there are too many groups."""
    if GROUPS == 0:
        return table_item(groups, index * 6 + option).to(tl.float64, bitcast=True)
    else:
        value = float64(groups[0][option])
        for i in tl.static_range(1, GROUPS):
            value = tl.where(index == i, float64(groups[i][option]), value)
        return value


@triton.jit
def word_of(groups, index, option: tl.constexpr, GROUPS: tl.constexpr):
    """As option_of, of an INT64."""
    if GROUPS == 0:
        return table_item(groups, index * 6 + option)
    else:
        value = groups[0][option].to(tl.int64)
        for i in tl.static_range(1, GROUPS):
            value = tl.where(index == i, groups[i][option].to(tl.int64), value)
        return value


@triton.jit
def learning_rate_of(groups, index, flags, GROUPS: tl.constexpr):
    rate = option_of(groups, index, 0, GROUPS)
    address = word_of(groups, index, 4, GROUPS)
    if address != 0:
        if (flags & 8) != 0:
            rate = tl.load(pointer_to(address, tl.float64))
        else:
            rate = tl.load(pointer_to(address, tl.float32)).to(tl.float64)
    return rate


@triton.jit
def is_first_update(record, begin, number):
    """Whether update ``number`` is the first to write the tensor's buffer.

    The program of the first chunk notes the number; the others read that or none at all, and either says "first".
    """
    noted_at = pointer_to(table_item(record, 3), tl.int64)
    noted = tl.load(noted_at, volatile=True)
    if (noted < 0) & (begin == 0):
        tl.store(noted_at, number)
    return (noted < 0) | (noted == number)


@triton.jit
def update_elements(
    grad, weight, buffer, param, begin, count, has_momentum, rule, kind: tl.constexpr, is_wide: tl.constexpr
):
    """One element a thread and access. ``param`` is the same as ``weight`` where there is no master."""
    lane = tl.arange(0, SCALAR_TILE)
    reads_buffer = has_momentum & (rule[7] == 0)
    for i in range(begin, count, SCALAR_TILE):
        at = i + lane
        mask = at < count
        if kind == FLOAT64:
            dtype: tl.constexpr = tl.float64
        else:
            dtype: tl.constexpr = tl.float32
        if is_wide or kind >= FLOAT32:
            g = tl.load(pointer_to(grad, dtype) + at, mask=mask)
        else:
            word = tl.load(pointer_to(grad, tl.int16) + at, mask=mask).to(tl.int32)
            g = low_half(word, kind)
        w = tl.load(pointer_to(weight, dtype) + at, mask=mask)
        b = tl.load(pointer_to(buffer, dtype) + at, mask=mask & reads_buffer)
        w, b = sgd_update(g, w, b, rule)
        tl.store(pointer_to(weight, dtype) + at, w, mask=mask)
        tl.store(pointer_to(buffer, dtype) + at, b, mask=mask & has_momentum)
        if kind < FLOAT32:
            tl.store(pointer_to(param, tl.int16) + at, rounded_bits(w, kind), mask=mask)


@triton.jit
def rounded_bits(value, kind: tl.constexpr):
    if kind == FLOAT16:
        return value.to(tl.float16).to(tl.int16, bitcast=True)
    else:
        return to_bfloat16(value).to(tl.int16, bitcast=True)


@triton.jit
def update_vectors(
    grad, weight, buffer, param, count, has_momentum, rule, kind: tl.constexpr, is_wide: tl.constexpr
):
    """Sixteen bytes a thread and access; ``count`` is a multiple of 16 and every address one of 16 bytes.

    16-bit elements are loaded and stored in pairs, as words, so that each kind of access gets a layout in which a warp
    touches whole 32-byte sectors; Triton exchanges the elements between the threads.
    """
    lane = tl.arange(0, UPDATE_TILE)
    pair = tl.arange(0, UPDATE_TILE // 2)
    reads_buffer = has_momentum & (rule[7] == 0)
    for i in range(0, count, UPDATE_TILE):
        mask = lane < count - i
        pair_mask = pair < (count - i) // 16 * 8
        # The tile's address first, then the thread's: the second part is then the same for every access.
        weights = aligned_pointer_to(weight, tl.float32) + i + lane
        buffers = aligned_pointer_to(buffer, tl.float32) + i + lane
        if is_wide or kind == FLOAT32:
            grads = aligned_pointer_to(grad, tl.float32) + i + lane
            g = tl.load(grads, mask=mask, eviction_policy="evict_first")
        else:
            words = aligned_pointer_to(grad, tl.int32) + i // 2 + pair
            word = tl.load(words, mask=pair_mask, eviction_policy="evict_first")
            g = tl.interleave(low_half(word, kind), high_half(word, kind))
        w = tl.load(weights, mask=mask, eviction_policy="evict_first")
        b = tl.load(buffers, mask=mask & reads_buffer, eviction_policy="evict_first")
        w, b = sgd_update(g, w, b, rule)
        tl.store(weights, w, mask=mask, cache_modifier=".cs")
        tl.store(buffers, b, mask=mask & has_momentum, cache_modifier=".cs")
        if kind < FLOAT32:
            low, high = tl.split(tl.reshape(rounded_bits(w, kind).to(tl.int32), (UPDATE_TILE // 2, 2)))
            params = aligned_pointer_to(param, tl.int32) + i // 2 + pair
            tl.store(params, (low & 0xFFFF) | (high << 16), mask=pair_mask)


@triton.jit
def update_span(
    grad, weight, buffer, param, count, has_momentum, rule, kind: tl.constexpr, is_wide: tl.constexpr
):
    done = count * 0
    if kind != FLOAT64:
        if (grad | weight | param | tl.where(has_momentum, buffer, 0)) % 16 == 0:
            done = count // 16 * 16
            update_vectors(grad, weight, buffer, param, done, has_momentum, rule, kind, is_wide)
    update_elements(grad, weight, buffer, param, done, count, has_momentum, rule, kind, is_wide)


@triton.jit
def update_kernel(
    chunks, tensors, grads, chunk_count, state, unscales, grad_scale, found_inf,
    is_scanned, groups,
    KINDS: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Updates every tensor that has a gradient, in the reverse order of the scan, whose last reads are in the cache."""
    inverse_scale = tl.load(field(state, 36, tl.float32))
    clip = tl.load(field(state, 40, tl.float32))
    skips = tl.load(field(state, 32, tl.int32))
    number = tl.load(field(state, 16, tl.int64))
    if is_scanned == 0:
        # Every program comes to the same decision by itself.
        inverse_scale = inverse_scale_of(state, unscales, grad_scale)
        clip = tl.full((), 1.0, tl.float32)
        skips = verdict_of(found_inf)
        number += 1
    index = chunk_count - 1 - tl.program_id(0)
    if (index >= 0) & (skips == 0):
        tensor, begin = chunk_at(chunks, index)
        address, is_wide = grad_at(grads, tensor)
        if address != 0:
            record = record_at(tensors, tensor)
            traits = table_item(record, 5)
            kind = traits & 3
            group = traits >> 8
            count = count_from(record, begin)
            param = table_item(record, 0)
            master = table_item(record, 1)
            buffer = table_item(record, 2)
            flags = word_of(groups, group, 5, GROUPS)
            momentum = option_of(groups, group, 1, GROUPS)
            weight_decay = option_of(groups, group, 3, GROUPS)
            minus_lr = -learning_rate_of(groups, group, flags, GROUPS)
            gradient_weight = option_of(groups, group, 2, GROUPS)
            signed_clip = tl.where((flags & 2) != 0, -clip, clip)
            decays = (weight_decay != 0) & (((flags & 4) != 0) | ((traits & 4) != 0))
            # By way of an integer: the interpreter takes a comparison of FP64 numbers for one when it repeats it.
            has_momentum = (momentum != 0).to(tl.int32) != 0
            nesterov = has_momentum & ((flags & 1) != 0)
            replaces = tl.full((), 1, tl.int1)
            if has_momentum:
                replaces = is_first_update(record, begin, number)
            rule = (
                inverse_scale, signed_clip, weight_decay.to(tl.float32), momentum.to(tl.float32),
                gradient_weight.to(tl.float32), minus_lr.to(tl.float32), decays, replaces, nesterov,
            )  # fmt: skip
            if kind == FLOAT64:
                if KINDS & 8:
                    double_rule = (
                        inverse_scale.to(tl.float64), signed_clip.to(tl.float64), weight_decay, momentum,
                        gradient_weight, minus_lr, decays, replaces, nesterov,
                    )  # fmt: skip
                    offset = begin * 8
                    update_span(
                        address + offset,
                        param + offset,
                        buffer + offset,
                        param,
                        count,
                        has_momentum,
                        double_rule,
                        FLOAT64,
                        False,
                    )
            elif kind == FLOAT32:
                if KINDS & 4:
                    offset = begin * 4
                    update_span(
                        address + offset,
                        param + offset,
                        buffer + offset,
                        param + offset,
                        count,
                        has_momentum,
                        rule,
                        FLOAT32,
                        False,
                    )
            else:
                weight = master + begin * 4
                buffer += begin * 4
                param += begin * 2
                if is_wide:
                    address += begin * 4
                else:
                    address += begin * 2
                if kind == FLOAT16:
                    if KINDS & 1:
                        if (KINDS & 16) != 0 and is_wide:
                            update_span(
                                address, weight, buffer, param, count, has_momentum, rule, FLOAT16, True
                            )
                        else:
                            update_span(
                                address, weight, buffer, param, count, has_momentum, rule, FLOAT16, False
                            )
                else:
                    if KINDS & 2:
                        if (KINDS & 16) != 0 and is_wide:
                            update_span(
                                address, weight, buffer, param, count, has_momentum, rule, BFLOAT16, True
                            )
                        else:
                            update_span(
                                address, weight, buffer, param, count, has_momentum, rule, BFLOAT16, False
                            )
    if is_scanned == 0:
        if arrives_last(state):
            record_decision(state, skips, inverse_scale, clip)


@triton.jit
def write_kernel(table, begin, count, words, WORDS: tl.constexpr):
    """Writes the first ``count`` words to the table, from its word ``begin`` on."""
    for i in tl.static_range(WORDS):
        if i < count:
            tl.store(pointer_to(table, tl.int64) + begin + i, words[i].to(tl.int64))
