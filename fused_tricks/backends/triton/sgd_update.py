"""The update of one element, in Triton. csrc/core/sgd_update.h has the same lines in C++."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .arithmetic import fma
from .groups import FLAGS, bit_of, index_of, learning_rate_of, option_of, word_of

MOMENTUM = index_of("momentum")
DAMPENING = index_of("dampening")
WEIGHT_DECAY = index_of("weight_decay")
NESTEROV = bit_of("nesterov")
MAXIMIZE = bit_of("maximize")
BIAS_DECAY = bit_of("bias_decay")
DECOUPLED = bit_of("decoupled_weight_decay")
EMA_DECAY = index_of("ema_decay")
EMA_WARMUP = bit_of("ema_warmup")


class Rule(NamedTuple):
    """The hyper-parameters of one tensor in one step, in FP64 or rounded once to FP32.

    Attributes:
        inverse_scale: 1 / loss scale; 1 without unscaling.
        clip: The clip factor, with a negative sign if the group maximizes.
        weight_decay: The coefficient of coupled weight decay.
        weight_factor: The factor of the weight: `1 - lr * weight_decay` with decoupled decay, otherwise 1.
        momentum: The momentum factor.
        gradient_weight: `1 - dampening`.
        minus_lr: The negative learning rate.
        decays: True if the parameter decays and the decay is coupled.
        replaces: True if the gradient replaces the buffer: in the first update of a buffer, or without momentum.
        nesterov: True for Nesterov momentum.
        averages: True if the update moves an average of the weights.
        replaces_average: True if the weight replaces the average: in the first update of an average.
        ema_weight: `1 - ema_decay`; `-ema_decay` if `from_weight`.
        from_weight: True if the average starts at the weight: `torch.lerp` starts at the nearer end.
    """

    inverse_scale: Any
    clip: Any
    weight_decay: Any
    weight_factor: Any
    momentum: Any
    gradient_weight: Any
    minus_lr: Any
    decays: Any
    replaces: Any
    nesterov: Any
    averages: Any
    replaces_average: Any
    ema_weight: Any
    from_weight: Any


@triton.jit
def rule_of(groups, group, is_matrix, applied, inverse_scale, clip, GROUPS: tl.constexpr):
    """Returns the rule of the update that follows `applied` updates, in FP64, with both `replaces` true."""
    flags = word_of(groups, group, FLAGS, GROUPS)
    momentum = option_of(groups, group, MOMENTUM, GROUPS)
    weight_decay = option_of(groups, group, WEIGHT_DECAY, GROUPS)
    lr = learning_rate_of(groups, group, flags, applied, GROUPS)
    decays = (weight_decay != 0) & (((flags & BIAS_DECAY) != 0) | (is_matrix != 0))
    is_decoupled = (flags & DECOUPLED) != 0
    ema_decay = option_of(groups, group, EMA_DECAY, GROUPS)
    # Via int32: the interpreter mis-types a broadcast FP64 comparison.
    has_momentum = (momentum != 0).to(tl.int32) != 0
    averages = (ema_decay >= 0).to(tl.int32) != 0  # false for NONE and NaN
    updates = (applied + 1).to(tl.float64)
    ramp = (1.0 + updates) / (10.0 + updates)
    ema_decay = tl.where(((flags & EMA_WARMUP) != 0) & (ramp < ema_decay), ramp, ema_decay)
    # Multiplying by -1 negates a zero correctly. Triton 3.6 compiles unary minus to `0 - x`, which loses the sign.
    return Rule(
        inverse_scale=inverse_scale.to(tl.float64),
        clip=tl.where((flags & MAXIMIZE) != 0, clip * -1.0, clip),
        weight_decay=weight_decay,
        weight_factor=tl.where(decays & is_decoupled, 1.0 - lr * weight_decay, 1.0),
        momentum=momentum,
        gradient_weight=1.0 - option_of(groups, group, DAMPENING, GROUPS),
        minus_lr=lr * -1.0,
        decays=decays & (is_decoupled == 0),
        replaces=tl.full((), 1, tl.int1),
        nesterov=has_momentum & ((flags & NESTEROV) != 0),
        averages=averages,
        replaces_average=tl.full((), 1, tl.int1),
        ema_weight=1.0 - ema_decay,
        from_weight=tl.full((), 0, tl.int1),
    )


@triton.jit
def rounded_rule(rule, replaces, replaces_average, dtype: tl.constexpr):
    """Returns the rule with every number in `dtype`."""
    ema_weight = rule.ema_weight.to(dtype)
    from_weight = ema_weight >= 0.5
    return Rule(
        inverse_scale=rule.inverse_scale.to(dtype),
        clip=rule.clip.to(dtype),
        weight_decay=rule.weight_decay.to(dtype),
        weight_factor=rule.weight_factor.to(dtype),
        momentum=rule.momentum.to(dtype),
        gradient_weight=rule.gradient_weight.to(dtype),
        minus_lr=rule.minus_lr.to(dtype),
        decays=rule.decays,
        replaces=replaces,
        nesterov=rule.nesterov,
        averages=rule.averages,
        replaces_average=replaces_average,
        ema_weight=tl.where(from_weight, ema_weight - 1.0, ema_weight),
        from_weight=from_weight,
    )


@triton.jit
def sgd_update(g, w, b, rule):
    """Returns the new weight and buffer."""
    # Unused factors are 1, which changes no bit. The sign of `clip` implements maximize.
    g = g * rule.inverse_scale * rule.clip
    w = w * rule.weight_factor
    g = tl.where(rule.decays, fma(rule.weight_decay, w, g), g)
    b = tl.where(rule.replaces, g, fma(rule.gradient_weight, g, rule.momentum * b))
    d = tl.where(rule.nesterov, fma(rule.momentum, b, g), b)
    return fma(rule.minus_lr, d, w), b


@triton.jit
def average(w, e, rule):
    """Returns the new average, rounded as in `torch.lerp`."""
    moved = fma(rule.ema_weight, w - e, tl.where(rule.from_weight, w, e))
    return tl.where(rule.replaces_average, w, moved)
