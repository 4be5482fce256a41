"""Conversion between 16-bit elements, two in a 32-bit word, and FP32."""

import triton
import triton.language as tl

from .arithmetic import to_bfloat16
from .records import FLOAT16


@triton.jit
def low_half(word, kind: tl.constexpr):
    """Returns the first of two 16-bit elements in a word, in FP32."""
    if kind == FLOAT16:
        return word.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        return (word << 16).to(tl.float32, bitcast=True)


@triton.jit
def high_half(word, kind: tl.constexpr):
    """Returns the second of two 16-bit elements in a word, in FP32."""
    if kind == FLOAT16:
        return (word >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        return (word & -0x10000).to(tl.float32, bitcast=True)


@triton.jit
def rounded_bits(value, kind: tl.constexpr):
    """Returns FP32 numbers rounded to a 16-bit kind, as INT16 bit patterns."""
    if kind == FLOAT16:
        return value.to(tl.float16).to(tl.int16, bitcast=True)
    else:
        return to_bfloat16(value).to(tl.int16, bitcast=True)
