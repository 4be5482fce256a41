"""The table of the options of a parameter group that the update reads."""

from __future__ import annotations

from typing import NamedTuple


class NumberOption(NamedTuple):
    """An option that is a number.

    Attributes:
        message: The error message for a value outside the range, as in `torch.optim.SGD`.
        takes_negative: True if the value may be negative.
        takes_tensor: True if the value may be a tensor of one element.
    """

    message: str
    takes_negative: bool = False
    takes_tensor: bool = False


NUMBERS = {
    "lr": NumberOption("Invalid learning rate: {}", takes_tensor=True),
    "momentum": NumberOption("Invalid momentum value: {}"),
    "dampening": NumberOption("Invalid dampening value: {}", takes_negative=True),
    "weight_decay": NumberOption("Invalid weight_decay value: {}", takes_tensor=True),
}
"""The numeric options, by name. The update rounds each number once to the dtype of the arithmetic."""

FLAGS = ("nesterov", "maximize", "bias_decay", "decoupled_weight_decay")
"""The boolean options."""
