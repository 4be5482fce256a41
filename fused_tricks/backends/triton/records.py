"""What kernels read of a plan: INT64 tables on the device, which tables.py makes.

Kernels take the tables' addresses as INT64, too, so that a launch depends on nothing but numbers.
"""

import triton
import triton.language as tl

# Elements of a chunk, which one program of one warp works on.
CHUNK = tl.constexpr(16384)
# What a tensor is made of.
FLOAT16 = tl.constexpr(0)
BFLOAT16 = tl.constexpr(1)
FLOAT32 = tl.constexpr(2)
FLOAT64 = tl.constexpr(3)
# Bits that say which of them a launch meets, and whether some gradient is FP32 beside a 16-bit parameter.
HAS_FLOAT16 = tl.constexpr(1)
HAS_BFLOAT16 = tl.constexpr(2)
HAS_FLOAT32 = tl.constexpr(4)
HAS_FLOAT64 = tl.constexpr(8)
HAS_WIDE = tl.constexpr(16)


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
    """The address of a tensor's record: param, master, buffer, first step, count, traits, part."""
    return tensors + tensor * 56


@triton.jit
def part_of(tensors, tensor):
    """Which of the verdict's sums of squares the tensors' gradients belong to."""
    return tl.load(pointer_to(tensors, tl.int64) + (tensor * 7 + 6))


@triton.jit
def count_from(record, begin):
    """Elements in the chunk that begins at ``begin``."""
    return tl.minimum(table_item(record, 4) - begin, CHUNK).to(tl.int32)


@triton.jit
def write_kernel(table, begin, count, words, WORDS: tl.constexpr):
    """Writes the first ``count`` words to the table, from its word ``begin`` on."""
    for i in tl.static_range(WORDS):
        if i < count:
            tl.store(pointer_to(table, tl.int64) + begin + i, words[i].to(tl.int64))
