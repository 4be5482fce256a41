"""The range of every option that a parameter group may set."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

from torch import Tensor

_MESSAGES = {
    "lr": "Invalid learning rate: {}",
    "momentum": "Invalid momentum value: {}",
    "dampening": "Invalid dampening value: {}",
    "weight_decay": "Invalid weight_decay value: {}",
}
_FLAGS = ("nesterov", "maximize", "bias_decay")


def check_group(group: dict[str, Any]) -> None:
    """Checks a new group with every option filled in, with the messages of ``torch.optim.SGD``.

    Raises:
        TypeError, ValueError: As :func:`check_numbers`, or Nesterov momentum without what it needs.
    """
    check_numbers(group)
    if group["nesterov"] and (group["momentum"] <= 0 or group["dampening"] != 0):
        raise ValueError("Nesterov momentum requires a momentum and zero dampening")


def check_numbers(group: dict[str, Any]) -> None:
    """Checks the options of a group one by one, which a schedule may have changed since it was new.

    Raises:
        KeyError: An option is missing.
        TypeError: An option is not a number (or, for lr and weight_decay, a tensor of one element), or a flag not a
            bool.
        ValueError: An option is outside its range.
    """
    missing = [name for name in (*_MESSAGES, *_FLAGS) if name not in group]
    if missing:
        raise KeyError(f"a parameter group has no option '{missing[0]}'")
    for name, message in _MESSAGES.items():
        value = group[name]
        if isinstance(value, Tensor) and name in ("lr", "weight_decay"):
            if value.numel() != 1:
                raise ValueError(f"Tensor {name} must be 1-element")
            # Not the value itself: reading it would wait for its device.
            if value.device.type != "cpu":
                continue
            value = value.item()
        elif isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError(f"{name} must be a number, got {type(value).__name__}")
        if not math.isfinite(value) or (value < 0 and name != "dampening"):
            raise ValueError(message.format(value))
    for name in _FLAGS:
        if group[name] not in (False, True):
            raise TypeError(f"{name} must be True or False, got {group[name]!r}")
    if group.get("differentiable"):
        raise ValueError(
            "differentiable=True is not supported; use torch.optim.SGD to differentiate through steps"
        )


def as_float(value: Any) -> float:
    """The number as a Python float.

    Raises:
        TypeError: It is not a number. Text is none, although ``float`` reads it.
    """
    if isinstance(value, str | bytes | bytearray):
        raise TypeError(f"a number is needed, got {type(value).__name__}")
    return float(value)


def check_max_grad_norm(max_grad_norm: Any) -> None:
    """Raises unless it is None or a positive number."""
    if max_grad_norm is None:
        return
    if isinstance(max_grad_norm, bool) or not isinstance(max_grad_norm, Real):
        raise TypeError(f"max_grad_norm must be a number or None, got {type(max_grad_norm).__name__}")
    if not float(max_grad_norm) > 0:
        raise ValueError(
            f"Invalid max_grad_norm: {max_grad_norm}; it must be positive, or inf to measure only"
        )
