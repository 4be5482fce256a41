"""The table of the options of a parameter group that the update reads."""

from __future__ import annotations

import math
from typing import NamedTuple


class NumberOption(NamedTuple):
    """An option that is a number.

    Attributes:
        message: The error message for a value outside the range, as in `torch.optim.SGD`.
        takes_negative: True if the value may be negative.
        takes_tensor: True if the value may be a tensor of one element.
        takes_none: True if the value may be None, which switches the option off.
        most: The largest value.
    """

    message: str
    takes_negative: bool = False
    takes_tensor: bool = False
    takes_none: bool = False
    most: float = math.inf

    @property
    def off(self) -> float | None:
        """The value that switches the option off."""
        return None if self.takes_none else 0.0


NUMBERS = {
    "lr": NumberOption("Invalid learning rate: {}", takes_tensor=True),
    "momentum": NumberOption("Invalid momentum value: {}"),
    "dampening": NumberOption("Invalid dampening value: {}", takes_negative=True),
    "weight_decay": NumberOption("Invalid weight_decay value: {}", takes_tensor=True),
    "ema_decay": NumberOption(
        "Invalid ema_decay value: {}; give None or a number from 0 to 1", takes_none=True, most=1.0
    ),
}
"""The numeric options, by name. The update rounds each number once to the dtype of the arithmetic."""

FLAGS = ("nesterov", "maximize", "bias_decay", "decoupled_weight_decay", "ema_warmup")
"""The boolean options."""

NONE = -1.0
"""The number that Triton's kernels read for None, as kNone in csrc/core/group.h."""
