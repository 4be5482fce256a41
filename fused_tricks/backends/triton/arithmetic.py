"""Roundings that Triton's interpreter does not have."""

import triton
import triton.language as tl

from . import IS_INTERPRETED


@triton.jit
def fma_with_two_roundings_undone(a, b, c):
    """`a * b + c` with one rounding by additions and multiplications, for FP32 and FP64 (Boldo and Melquiond 2008).

    The sum is first rounded to odd in FP64, which keeps the second rounding from seeing a false tie.
    """
    if c.dtype == tl.float32:
        product = a.to(tl.float64) * b.to(tl.float64)
        return rounded_to_odd(product, c.to(tl.float64)).to(tl.float32)
    product = a * b
    error = product_error(a, b, product)
    low_sum, low_error = two_sum(c, error)
    high_sum, high_error = two_sum(product, low_sum)
    exact = high_sum + rounded_to_odd(high_error, low_error)
    # The error terms lose the sign of zero, and infinities and NaN have none.
    exact = tl.where(exact != 0, exact, product + c)
    return tl.where(tl.abs(exact) < float("inf"), exact, product + c)


@triton.jit
def two_sum(a, b):
    """The rounded sum and its error, exactly."""
    total = a + b
    virtual = total - a
    return total, (a - (total - virtual)) + (b - virtual)


@triton.jit
def product_error(a, b, product):
    """What FP64 rounding took from `a * b`, by splitting each factor into halves of 26 bits."""
    a_high = high_half(a)
    b_high = high_half(b)
    a_low = a - a_high
    b_low = b - b_high
    return ((a_high * b_high - product) + a_high * b_low + a_low * b_high) + a_low * b_low


@triton.jit
def high_half(a):
    scaled = a * 134217729.0  # 2**27 + 1 (Veltkamp)
    return scaled - (scaled - a)


@triton.jit
def rounded_to_odd(a, b):
    """The FP64 sum of two FP64 numbers; where it is not exact, the neighbour whose last bit is one."""
    total, error = two_sum(a, b)
    bits = total.to(tl.int64, bitcast=True)
    inexact = (error != 0) & (tl.abs(total) < float("inf")) & ((bits & 1) == 0)
    # Away from zero where the error has the sum's sign, else towards it.
    step = tl.where((error > 0) == (total > 0), 1, -1)
    return tl.where(inexact, bits + step, bits).to(tl.float64, bitcast=True)


@triton.jit
def to_bfloat16_by_integers(value):
    """Rounds FP32 to nearest even."""
    bits = value.to(tl.int32, bitcast=True)
    rounded = bits + 0x7FFF + ((bits >> 16) & 1)
    rounded = tl.where(value != value, 0x7FC00000, rounded)
    return (rounded >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)


@triton.jit
def to_bfloat16_by_hardware(value):
    return value.to(tl.bfloat16)


# The interpreter rounds the product of `tl.fma` before it adds, and cuts FP32 off where it should round to bfloat16.
fma = fma_with_two_roundings_undone if IS_INTERPRETED else tl.fma
to_bfloat16 = to_bfloat16_by_integers if IS_INTERPRETED else to_bfloat16_by_hardware
