"""Exact `fma` and rounding to BF16, which Triton's interpreter lacks."""

import triton
import triton.language as tl

from . import IS_INTERPRETED


@triton.jit
def fma_with_two_roundings_undone(a, b, c):
    """Returns `a * b + c` with one rounding, in FP32 or FP64, from additions and multiplications.

    The sum is first rounded to odd in FP64, so that the second rounding meets no false tie (Boldo and Melquiond 2008).
    """
    if c.dtype == tl.float32:
        product = a.to(tl.float64) * b.to(tl.float64)
        return rounded_to_odd(product, c.to(tl.float64)).to(tl.float32)
    product = a * b
    error = product_error(a, b, product)
    low_sum, low_error = two_sum(c, error)
    high_sum, high_error = two_sum(product, low_sum)
    exact = high_sum + rounded_to_odd(high_error, low_error)
    # The error terms lose the sign of zero, and are NaN for infinities and NaN.
    exact = tl.where(exact != 0, exact, product + c)
    return tl.where(tl.abs(exact) < float("inf"), exact, product + c)


@triton.jit
def two_sum(a, b):
    """Returns the rounded sum and its exact rounding error."""
    total = a + b
    virtual = total - a
    return total, (a - (total - virtual)) + (b - virtual)


@triton.jit
def product_error(a, b, product):
    """Returns the FP64 rounding error of `product`, computed from halves of the factors (Dekker)."""
    a_high = rounded_to_26_bits(a)
    b_high = rounded_to_26_bits(b)
    a_low = a - a_high
    b_low = b - b_high
    return ((a_high * b_high - product) + a_high * b_low + a_low * b_high) + a_low * b_low


@triton.jit
def rounded_to_26_bits(a):
    """Returns FP64 numbers rounded to their 26 leading bits (Veltkamp)."""
    scaled = a * 134217729.0  # 2**27 + 1
    return scaled - (scaled - a)


@triton.jit
def rounded_to_odd(a, b):
    """Returns the FP64 sum rounded to odd: an inexact sum becomes the FP64 neighbour whose last bit is 1."""
    total, error = two_sum(a, b)
    bits = total.to(tl.int64, bitcast=True)
    inexact = (error != 0) & (tl.abs(total) < float("inf")) & ((bits & 1) == 0)
    # The step goes away from zero if error and sum have the same sign, otherwise towards zero.
    step = tl.where((error > 0) == (total > 0), 1, -1)
    return tl.where(inexact, bits + step, bits).to(tl.float64, bitcast=True)


@triton.jit
def to_bfloat16_by_integers(value):
    """Returns FP32 numbers rounded to BF16, to nearest with ties to even."""
    bits = value.to(tl.int32, bitcast=True)
    rounded = bits + 0x7FFF + ((bits >> 16) & 1)
    rounded = tl.where(value != value, 0x7FC00000, rounded)
    return (rounded >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)


@triton.jit
def to_bfloat16_by_hardware(value):
    return value.to(tl.bfloat16)


# The interpreter's tl.fma rounds twice, and its conversion to bfloat16 truncates.
fma = fma_with_two_roundings_undone if IS_INTERPRETED else tl.fma
to_bfloat16 = to_bfloat16_by_integers if IS_INTERPRETED else to_bfloat16_by_hardware
