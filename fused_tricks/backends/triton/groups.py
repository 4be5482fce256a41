"""The options of a group, as the update reads them."""

import triton
import triton.language as tl

from .decision import float64
from .records import pointer_to, table_item

# Where an option lies in a group: lr, momentum, 1 - dampening and weight_decay in FP64; then the address of numbers
# that lr is multiplied with (0: none), the position of the last of them, how many updates were applied before the one
# that takes the first of them, and flags.
LR = tl.constexpr(0)
MOMENTUM = tl.constexpr(1)
GRADIENT_WEIGHT = tl.constexpr(2)
WEIGHT_DECAY = tl.constexpr(3)
LR_ADDRESS = tl.constexpr(4)
LR_LAST = tl.constexpr(5)
LR_ORIGIN = tl.constexpr(6)
FLAGS = tl.constexpr(7)
GROUP_WORDS = tl.constexpr(8)
# Flags.
NESTEROV = tl.constexpr(1)
MAXIMIZE = tl.constexpr(2)
BIAS_DECAY = tl.constexpr(4)
LR_IS_DOUBLE = tl.constexpr(8)


@triton.jit
def option_of(groups, index, option: tl.constexpr, GROUPS: tl.constexpr):
    """A number of one group in FP64: from the launch's arguments, or from the table where there are too many groups."""
    if GROUPS == 0:
        return table_item(groups, index * GROUP_WORDS + option).to(tl.float64, bitcast=True)
    else:
        value = float64(groups[0][option])
        for i in tl.static_range(1, GROUPS):
            value = tl.where(index == i, float64(groups[i][option]), value)
        return value


@triton.jit
def word_of(groups, index, option: tl.constexpr, GROUPS: tl.constexpr):
    """As option_of, of an INT64."""
    if GROUPS == 0:
        return table_item(groups, index * GROUP_WORDS + option)
    else:
        value = groups[0][option].to(tl.int64)
        for i in tl.static_range(1, GROUPS):
            value = tl.where(index == i, groups[i][option].to(tl.int64), value)
        return value


@triton.jit
def learning_rate_of(groups, index, flags, applied, GROUPS: tl.constexpr):
    """Of the update that follows ``applied`` others."""
    rate = option_of(groups, index, LR, GROUPS)
    address = word_of(groups, index, LR_ADDRESS, GROUPS)
    if address != 0:
        due = tl.maximum(applied - word_of(groups, index, LR_ORIGIN, GROUPS), 0)
        due = tl.minimum(due, word_of(groups, index, LR_LAST, GROUPS))
        if (flags & LR_IS_DOUBLE) != 0:
            rate *= tl.load(pointer_to(address, tl.float64) + due)
        else:
            rate *= tl.load(pointer_to(address, tl.float32) + due).to(tl.float64)
    return rate
