"""The options of a parameter group that the update reads: one table, from which everything else is derived."""

from __future__ import annotations

from typing import NamedTuple


class NumberOption(NamedTuple):
    """An option that is a number.

    Attributes:
        message: The text of the error for a value outside the range, in the words of `torch.optim.SGD`.
        takes_negative: True if the value may be below zero.
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
"""By name. The update rounds each once to the type of its arithmetic."""

FLAGS = ("nesterov", "maximize", "bias_decay", "decoupled_weight_decay")
"""Options that are True or False."""
