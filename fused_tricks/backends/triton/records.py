"""What kernels read of a plan: INT64 tables on the device, which tables.py makes.

Kernels take the tables' addresses as INT64, too, so that a launch depends on nothing but numbers.
"""

import triton
import triton.language as tl

from ...step.parameters import MASTER_PARAM, MOMENTUM_BUFFER, STATE_TENSORS
from . import IS_INTERPRETED

# Elements of a chunk, which one program of one warp works on.
CHUNK = tl.constexpr(16384)
# The kinds of elements.
FLOAT16 = tl.constexpr(0)
BFLOAT16 = tl.constexpr(1)
FLOAT32 = tl.constexpr(2)
FLOAT64 = tl.constexpr(3)
KINDS = 4
# The interpreter cannot combine the variable of a loop with a constexpr.
KIND_COUNT = KINDS if IS_INTERPRETED else tl.constexpr(KINDS)
# The words of a tensor's record. Addresses are 0 where there is none.
PARAM = tl.constexpr(0)
STATE = tl.constexpr(1)  # the first of STATE_TENSORS; the others follow
MASTER = tl.constexpr(STATE.value + STATE_TENSORS.index(MASTER_PARAM))
BUFFER = tl.constexpr(STATE.value + STATE_TENSORS.index(MOMENTUM_BUFFER))
FIRST_UPDATE = tl.constexpr(
    STATE.value + len(STATE_TENSORS)
)  # the address of the number of the update that first wrote the buffer
COUNT = tl.constexpr(FIRST_UPDATE.value + 1)
KIND = tl.constexpr(FIRST_UPDATE.value + 2)
GRAD_KIND = tl.constexpr(FIRST_UPDATE.value + 3)
IS_MATRIX = tl.constexpr(FIRST_UPDATE.value + 4)  # more than one dimension: decays whatever bias_decay is
GROUP = tl.constexpr(FIRST_UPDATE.value + 5)
SHARD_CLASS = tl.constexpr(FIRST_UPDATE.value + 6)
RECORD_WORDS = tl.constexpr(FIRST_UPDATE.value + 7)


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
def record_of(tensors, tensor):
    """The address of a tensor's record."""
    return tensors + tensor * (RECORD_WORDS * 8)


@triton.jit
def shard_class_of(tensors, tensor):
    """The shard class of tensors: which of the partials' sums of squares their gradients belong to."""
    return tl.load(pointer_to(tensors, tl.int64) + (tensor * RECORD_WORDS + SHARD_CLASS))


@triton.jit
def count_from(record, begin):
    """Elements in the chunk that begins at `begin`."""
    return tl.minimum(table_item(record, COUNT) - begin, CHUNK).to(tl.int32)


@triton.jit
def size_of(kind: tl.constexpr):
    """Bytes of an element."""
    return 8 if kind == FLOAT64 else 4 if kind == FLOAT32 else 2


@triton.jit
def write_kernel(table, begin, count, words, WORDS: tl.constexpr):
    """Writes the first `count` words to the table, from its word `begin` on."""
    for i in tl.static_range(WORDS):
        if i < count:
            tl.store(pointer_to(table, tl.int64) + begin + i, words[i].to(tl.int64))
