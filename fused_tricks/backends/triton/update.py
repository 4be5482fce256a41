"""The update of every tensor that has a gradient."""

import triton
import triton.language as tl

from . import IS_INTERPRETED
from .arithmetic import sgd_update
from .decision import (
    APPLIED_STEPS,
    ARRIVALS,
    CLIP,
    INVERSE_SCALE,
    SKIP,
    arrives_last,
    field,
    float64,
    inverse_scale_of,
    record_decision,
    verdict_of,
)
from .elements import high_half, low_half, rounded_bits
from .groups import (
    BIAS_DECAY,
    FLAGS,
    GRADIENT_WEIGHT,
    MAXIMIZE,
    MOMENTUM,
    NESTEROV,
    WEIGHT_DECAY,
    learning_rate_of,
    option_of,
    word_of,
)
from .records import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    FLOAT64,
    HAS_BFLOAT16,
    HAS_FLOAT16,
    HAS_FLOAT32,
    HAS_FLOAT64,
    HAS_WIDE,
    aligned_pointer_to,
    chunk_at,
    count_from,
    grad_at,
    pointer_to,
    record_at,
    table_item,
)

# The interpreter takes as long for a large tile as for a small one.
_TILES = 64 if IS_INTERPRETED else 1
# Elements at a time.
UPDATE_TILE = tl.constexpr(256 * _TILES)
# The same where 16-byte accesses are not possible. Not the size of any other tile: Triton gives accesses of one shape
# that share a value the same layout.
SCALAR_TILE = tl.constexpr(64 * _TILES)


@triton.jit
def is_first_update(record, begin, number):
    """Whether update ``number`` is the first to write the tensor's buffer.

    The program of the first chunk notes the number; the others read that or none at all, and either says "first".
    """
    noted_at = pointer_to(table_item(record, 3), tl.int64)
    noted = tl.load(noted_at, volatile=True)
    if (noted < 0) & (begin == 0):
        tl.atomic_xchg(noted_at, number, sem="relaxed")
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
def update_chunk(chunk, rule, kind: tl.constexpr, is_wide: tl.constexpr):
    grad, param, master, buffer, begin, count, has_momentum = chunk
    size: tl.constexpr = 8 if kind == FLOAT64 else 4 if kind == FLOAT32 else 2
    state_size: tl.constexpr = 8 if kind == FLOAT64 else 4
    grad += begin * (4 if is_wide else size)
    buffer += begin * state_size
    param += begin * size
    if kind < FLOAT32:
        weight = master + begin * state_size
    else:
        weight = param
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
    inverse_scale = tl.load(field(state, INVERSE_SCALE, tl.float32))
    clip = tl.load(field(state, CLIP, tl.float64))
    skips = tl.load(field(state, SKIP, tl.int32))
    number = tl.load(field(state, APPLIED_STEPS, tl.int64))
    if is_scanned == 0:
        # Every program comes to the same decision by itself.
        inverse_scale = inverse_scale_of(state, unscales, grad_scale)
        clip = float64(1.0)
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
            flags = word_of(groups, group, FLAGS, GROUPS)
            momentum = option_of(groups, group, MOMENTUM, GROUPS)
            weight_decay = option_of(groups, group, WEIGHT_DECAY, GROUPS)
            # Not by a unary minus, which Triton 3.6 takes for `0 - x`: zero would lose its sign.
            minus_lr = learning_rate_of(groups, group, flags, number - 1, GROUPS) * -1.0
            gradient_weight = option_of(groups, group, GRADIENT_WEIGHT, GROUPS)
            signed_clip = tl.where((flags & MAXIMIZE) != 0, clip * -1.0, clip)
            decays = (weight_decay != 0) & (((flags & BIAS_DECAY) != 0) | ((traits & 4) != 0))
            # By way of an integer: the interpreter takes a comparison of FP64 numbers for one when it repeats it.
            has_momentum = (momentum != 0).to(tl.int32) != 0
            nesterov = has_momentum & ((flags & NESTEROV) != 0)
            replaces = tl.full((), 1, tl.int1)
            if has_momentum:
                replaces = is_first_update(record, begin, number)
            chunk = (address, param, master, buffer, begin, count, has_momentum)
            rule = (
                inverse_scale, signed_clip.to(tl.float32), weight_decay.to(tl.float32), momentum.to(tl.float32),
                gradient_weight.to(tl.float32), minus_lr.to(tl.float32), decays, replaces, nesterov,
            )  # fmt: skip
            if kind == FLOAT16:
                if HAS_FLOAT16 & KINDS:
                    if (HAS_WIDE & KINDS) != 0 and is_wide:
                        update_chunk(chunk, rule, FLOAT16, True)
                    else:
                        update_chunk(chunk, rule, FLOAT16, False)
            elif kind == BFLOAT16:
                if HAS_BFLOAT16 & KINDS:
                    if (HAS_WIDE & KINDS) != 0 and is_wide:
                        update_chunk(chunk, rule, BFLOAT16, True)
                    else:
                        update_chunk(chunk, rule, BFLOAT16, False)
            elif kind == FLOAT32:
                if HAS_FLOAT32 & KINDS:
                    update_chunk(chunk, rule, FLOAT32, False)
            else:
                if HAS_FLOAT64 & KINDS:
                    double_rule = (
                        inverse_scale.to(tl.float64), signed_clip, weight_decay, momentum,
                        gradient_weight, minus_lr, decays, replaces, nesterov,
                    )  # fmt: skip
                    update_chunk(chunk, double_rule, FLOAT64, False)
    if is_scanned == 0:
        if arrives_last(state):
            record_decision(state, skips, inverse_scale, clip)
    elif tl.program_id(0) == 0:
        # The scan is over. Heals a counter that two overlapping scans of different sizes left wrong.
        tl.store(field(state, ARRIVALS, tl.int32), 0)
