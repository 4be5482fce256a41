"""The options of a group, as the update kernel reads them."""

import triton
import triton.language as tl

from ...step.options import FLAGS as FLAG_NAMES
from ...step.options import NUMBERS
from .decision import float64
from .records import pointer_to, table_item

# The words of a group and their types: FP64 or INT64. `lr_address` is the address of the factors of `lr`, or 0. The
# first factor belongs to the update after `lr_origin` updates. The last factor has index `lr_last`.
WORD_TYPES = dict.fromkeys(NUMBERS, "fp64") | dict.fromkeys(
    ("lr_address", "lr_last", "lr_origin", "flags"), "i64"
)
FLAG_BITS = {name: 1 << index for index, name in enumerate((*FLAG_NAMES, "lr_is_double"))}

_INDEX = {name: index for index, name in enumerate(WORD_TYPES)}
LR = tl.constexpr(_INDEX["lr"])
LR_ADDRESS = tl.constexpr(_INDEX["lr_address"])
LR_LAST = tl.constexpr(_INDEX["lr_last"])
LR_ORIGIN = tl.constexpr(_INDEX["lr_origin"])
FLAGS = tl.constexpr(_INDEX["flags"])
GROUP_WORDS = tl.constexpr(len(WORD_TYPES))
LR_IS_DOUBLE = tl.constexpr(FLAG_BITS["lr_is_double"])


def index_of(option: str) -> tl.constexpr:
    """Returns the index of the word of a numeric option."""
    return tl.constexpr(_INDEX[option])


def bit_of(option: str) -> tl.constexpr:
    """Returns the bit of a boolean option in the word `flags`."""
    return tl.constexpr(FLAG_BITS[option])


@triton.jit
def option_of(groups, index, option: tl.constexpr, GROUPS: tl.constexpr):
    """Returns an FP64 option of one group, from the kernel's arguments or, if `GROUPS` is 0, from the table."""
    if GROUPS == 0:
        return table_item(groups, index * GROUP_WORDS + option).to(tl.float64, bitcast=True)
    else:
        value = float64(groups[0][option])
        for i in tl.static_range(1, GROUPS):
            value = tl.where(index == i, float64(groups[i][option]), value)
        return value


@triton.jit
def word_of(groups, index, option: tl.constexpr, GROUPS: tl.constexpr):
    """Returns an INT64 word of one group, from the kernel's arguments or, if `GROUPS` is 0, from the table."""
    if GROUPS == 0:
        return table_item(groups, index * GROUP_WORDS + option)
    else:
        value = groups[0][option].to(tl.int64)
        for i in tl.static_range(1, GROUPS):
            value = tl.where(index == i, groups[i][option].to(tl.int64), value)
        return value


@triton.jit
def learning_rate_of(groups, index, flags, applied, GROUPS: tl.constexpr):
    """Returns the learning rate of the update that follows `applied` updates."""
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
