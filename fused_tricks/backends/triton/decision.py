"""The decision of a step, in Triton. csrc/core/step_state.h has the same rules in C++."""

import triton
import triton.language as tl

from ...loss_scale import ScaleRule
from ...step.device_state import OFFSETS

# The offsets of the fields of the StepState, in bytes.
SCALE = tl.constexpr(OFFSETS["scale"])
GROWTH_TRACKER = tl.constexpr(OFFSETS["growth_tracker"])
HYSTERESIS_TRACKER = tl.constexpr(OFFSETS["hysteresis_tracker"])
FOUND_INF = tl.constexpr(OFFSETS["found_inf"])
APPLIED_STEPS = tl.constexpr(OFFSETS["applied_steps"])
SKIPPED_STEPS = tl.constexpr(OFFSETS["skipped_steps"])
SKIP = tl.constexpr(OFFSETS["skip"])
INVERSE_SCALE = tl.constexpr(OFFSETS["inverse_scale"])
CLIP = tl.constexpr(OFFSETS["clip"])
ARRIVALS = tl.constexpr(OFFSETS["arrivals"])
SKIPPED_IN_A_ROW = tl.constexpr(OFFSETS["skipped_in_a_row"])
GRAD_NORM = tl.constexpr(OFFSETS["grad_norm"])
# The indices of the numbers of a ScaleRule.
GROWTH_FACTOR = tl.constexpr(ScaleRule._fields.index("growth_factor"))
BACKOFF_FACTOR = tl.constexpr(ScaleRule._fields.index("backoff_factor"))
MIN_SCALE = tl.constexpr(ScaleRule._fields.index("min_scale"))
MAX_SCALE = tl.constexpr(ScaleRule._fields.index("max_scale"))
GROWTH_INTERVAL = tl.constexpr(ScaleRule._fields.index("growth_interval"))
HYSTERESIS = tl.constexpr(ScaleRule._fields.index("hysteresis"))


@triton.jit
def field(state, offset: tl.constexpr, dtype: tl.constexpr):
    """Returns a pointer to a field of the StepState (fused_tricks/step/device_state.py) at the address `state`."""
    return (state + offset).to(tl.pointer_type(dtype))


@triton.jit
def float64(number):
    """Returns an FP64 argument of a kernel as a tensor. The interpreter passes a Python number."""
    return tl.full((), number, tl.float64)


@triton.jit
def inverse_of(scale):
    return tl.div_rn(tl.full((), 1.0, tl.float32), scale)


@triton.jit
def advance_scale(state, found, scale_rule):
    """Adjusts the scale by GradScaler's rule with Apex's hysteresis, then clamps it to floor and ceiling."""
    scale = tl.load(field(state, SCALE, tl.float32))
    good_steps = tl.minimum(tl.load(field(state, GROWTH_TRACKER, tl.int32)), 0x7FFFFFFE) + 1
    overflows_left = tl.maximum(tl.load(field(state, HYSTERESIS_TRACKER, tl.int32)) - 1, 0)
    grows = (found == 0) & (good_steps >= scale_rule[GROWTH_INTERVAL])
    tolerated = (found != 0) & (overflows_left > 0)
    grown = (scale.to(tl.float64) * float64(scale_rule[GROWTH_FACTOR])).to(tl.float32)
    backed_off = (scale.to(tl.float64) * float64(scale_rule[BACKOFF_FACTOR])).to(tl.float32)
    moved = tl.where(found != 0, backed_off, tl.where(grows & (grown < float("inf")), grown, scale))
    floor = float64(scale_rule[MIN_SCALE]).to(tl.float32)
    ceiling = float64(scale_rule[MAX_SCALE]).to(tl.float32)
    clamped = tl.minimum(tl.maximum(moved, floor), ceiling)
    tl.store(field(state, SCALE, tl.float32), tl.where(tolerated, scale, clamped))
    tl.store(field(state, GROWTH_TRACKER, tl.int32), tl.where((found != 0) | grows, 0, good_steps))
    tl.store(
        field(state, HYSTERESIS_TRACKER, tl.int32),
        tl.where(found != 0, overflows_left, scale_rule[HYSTERESIS]),
    )


@triton.jit
def decide(
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
    WANTS_NORM: tl.constexpr,
):
    """Decides about the step after a scan: skip, clip factor, next scale, counters.

    Args:
        found: Nonzero if a gradient is not finite.
        squares: The sum of the squares of all gradient elements before unscaling, if `WANTS_NORM`.
        in_double: Nonzero if a gradient is FP64. The norm is then computed in FP64.
        grad_scale: The address of the `grad_scale` of a `GradScaler`, or 0.
        found_inf: The address of the `found_inf` of a `GradScaler`, or 0.
    """
    found = found | found_inf_of(found_inf)
    inverse_scale = inverse_scale_of(state, unscales, grad_scale)
    clip = float64(1.0)
    if WANTS_NORM:
        norm = tl.sqrt(squares) * inverse_scale.to(tl.float64)
        rounded = norm.to(tl.float32)
        ratio = float64(max_norm) / (norm + float64(1e-6))
        rounded_ratio = tl.div_rn(float64(max_norm).to(tl.float32), rounded + 1e-6)
        tl.store(field(state, GRAD_NORM, tl.float64), tl.where(in_double != 0, norm, rounded.to(tl.float64)))
        ratio = tl.where(in_double != 0, ratio, rounded_ratio.to(tl.float64))
        clip = tl.where(ratio < 1.0, ratio, 1.0)
    record_decision(state, found, inverse_scale, clip)
    if is_dynamic != 0:
        advance_scale(state, found, scale_rule)


@triton.jit
def record_decision(state, found, inverse_scale, clip):
    """Stores the decision for the update, counts the step, and clears `found_inf` of the scan."""
    tl.store(field(state, FOUND_INF, tl.int32), 0)
    tl.store(
        field(state, APPLIED_STEPS, tl.int64),
        tl.load(field(state, APPLIED_STEPS, tl.int64)) + tl.where(found != 0, 0, 1),
    )
    tl.store(
        field(state, SKIPPED_STEPS, tl.int64),
        tl.load(field(state, SKIPPED_STEPS, tl.int64)) + tl.where(found != 0, 1, 0),
    )
    tl.store(field(state, SKIP, tl.int32), tl.where(found != 0, 1, 0))
    tl.store(field(state, INVERSE_SCALE, tl.float32), inverse_scale)
    tl.store(field(state, CLIP, tl.float64), clip)
    skipped_in_a_row = tl.minimum(tl.load(field(state, SKIPPED_IN_A_ROW, tl.int32)), 2**31 - 2) + 1
    tl.store(field(state, SKIPPED_IN_A_ROW, tl.int32), tl.where(found != 0, skipped_in_a_row, 0))


@triton.jit
def arrives_last(state):
    """Returns True in the last program of the launch that calls this function.

    The earlier writes of all other programs are visible to the last program. The last program subtracts the arrivals
    of one launch from the counter, so that the counter is correct after two launches of one size that overlap by
    mistake.
    """
    programs = tl.num_programs(0)
    arrivals = tl.atomic_add(field(state, ARRIVALS, tl.int32), 1, sem="acq_rel") + 1
    is_last = arrivals % programs == 0
    if is_last:
        tl.atomic_add(field(state, ARRIVALS, tl.int32), -programs, sem="relaxed")
    return is_last


@triton.jit
def inverse_scale_of(state, unscales, grad_scale):
    """Returns the factor that unscales gradients; 1 without unscaling.

    The factor is the inverse of the number at address `grad_scale`, or of the own scale if the address is 0.
    """
    scale = tl.load(field(state, SCALE, tl.float32))
    if grad_scale != 0:
        scale = tl.load(field(grad_scale, 0, tl.float32))
    return tl.where(unscales != 0, inverse_of(scale), 1.0)


@triton.jit
def found_inf_of(found_inf):
    """Returns 1 if the `found_inf` of a `GradScaler` at this address is nonzero; 0 if the address is 0."""
    found = tl.full((), 0, tl.int32)
    if found_inf != 0:
        found = (tl.load(field(found_inf, 0, tl.float32)) != 0).to(tl.int32)
    return found
