"""The layout of the device tables, which tables.py fills, and functions that read them.

Kernels take the addresses of the tables as INT64, so that every argument of a launch is a number.
"""

import triton
import triton.language as tl

from ...step.parameters import STATE_TENSORS
from . import IS_INTERPRETED

# Elements of a chunk, the work of one program of one warp.
CHUNK = tl.constexpr(16384)
# The kinds of elements.
FLOAT16 = tl.constexpr(0)
BFLOAT16 = tl.constexpr(1)
FLOAT32 = tl.constexpr(2)
FLOAT64 = tl.constexpr(3)
KINDS = 4
# The interpreter cannot combine the variable of a loop with a constexpr.
KIND_COUNT = KINDS if IS_INTERPRETED else tl.constexpr(KINDS)
# The words of a tensor's record. An address is 0 if the tensor is missing.
PARAM = tl.constexpr(0)
STATE = tl.constexpr(1)  # the first of STATE_TENSORS; the others follow
# The distance from the word of a state tensor to the address of the note of the update that first wrote the tensor.
FIRST_UPDATE = tl.constexpr(len(STATE_TENSORS))
COUNT = tl.constexpr(STATE.value + 2 * len(STATE_TENSORS))
KIND = tl.constexpr(COUNT.value + 1)
GRAD_KIND = tl.constexpr(COUNT.value + 2)
# 1 if the parameter has more than one dimension, and so decays even without bias_decay.
IS_MATRIX = tl.constexpr(COUNT.value + 3)
GROUP = tl.constexpr(COUNT.value + 4)
SHARD_CLASS = tl.constexpr(COUNT.value + 5)
RECORD_WORDS = tl.constexpr(COUNT.value + 6)


def word_of_state(key: str) -> tl.constexpr:
    """Returns the word of a state tensor in a record."""
    return tl.constexpr(STATE.value + STATE_TENSORS.index(key))


@triton.jit
def pointer_to(address, dtype: tl.constexpr):
    return address.to(tl.pointer_type(dtype))


@triton.jit
def aligned_pointer_to(address, dtype: tl.constexpr):
    """Returns a pointer that the compiler may treat as aligned to 16 bytes."""
    return tl.multiple_of(address.to(tl.pointer_type(dtype)), 16)


@triton.jit
def table_item(table, index):
    return tl.load(pointer_to(table, tl.int64) + index)


@triton.jit
def chunk_at(chunks, index):
    """Returns the index of a chunk's tensor, and the index of the chunk's first element."""
    chunk = table_item(chunks, index)
    return chunk >> 32, (chunk & 0xFFFFFFFF) * CHUNK


@triton.jit
def record_of(tensors, tensor):
    """Returns the address of a tensor's record."""
    return tensors + tensor * (RECORD_WORDS * 8)


@triton.jit
def shard_class_of(tensors, tensor):
    """Returns the shard classes of tensors."""
    return tl.load(pointer_to(tensors, tl.int64) + (tensor * RECORD_WORDS + SHARD_CLASS))


@triton.jit
def count_from(record, begin):
    """Returns the number of elements in the chunk that begins at `begin`."""
    return tl.minimum(table_item(record, COUNT) - begin, CHUNK).to(tl.int32)


@triton.jit
def size_of(kind: tl.constexpr):
    """Returns the number of bytes of an element."""
    return 8 if kind == FLOAT64 else 4 if kind == FLOAT32 else 2


@triton.jit
def write_kernel(table, begin, count, words, WORDS: tl.constexpr):
    """Writes the first `count` of `words` to the table, starting at word `begin` of the table."""
    for i in tl.static_range(WORDS):
        if i < count:
            tl.store(pointer_to(table, tl.int64) + begin + i, words[i].to(tl.int64))
