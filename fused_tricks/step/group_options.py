"""The range of every option that a parameter group may set."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from numbers import Rational, Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .._torch import is_flattened_by_fsdp1
from ..distributed.sharding import is_partitioning
from ..validation import as_double, shown
from .device_state import to_float32
from .options import FLAGS, NUMBERS
from .ordinary_tensors import outside_all_modes
from .shared_memory import has_memory, missing_bytes


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
    if not isinstance(group, dict):
        raise TypeError(f"a parameter group must be a dict, got {type(group).__name__}")
    missing = [name for name in (*NUMBERS, *FLAGS) if name not in group]
    if missing:
        raise KeyError(f"a parameter group has no option '{missing[0]}'")
    for name, option in NUMBERS.items():
        value = group[name]
        if isinstance(value, Tensor) and option.takes_tensor:
            if value.numel() != 1:
                raise ValueError(f"Tensor {name} must be 1-element")
            # Not the value itself: reading it would wait for its device.
            if value.device.type != "cpu":
                continue
            value = value.item()
        elif isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError(f"{name} must be a number, got {type(value).__name__}")
        if not math.isfinite(as_double(value)) or (value < 0 and not option.takes_negative):
            raise ValueError(option.message.format(shown(value)) + _unfit(name, value))
    for name in FLAGS:
        value = group[name]
        if _is_array(value) or value not in (False, True):
            raise TypeError(f"{name} must be True or False, got {shown(value)}")
    differentiable = group.get("differentiable")
    if _is_array(differentiable) or differentiable:
        raise ValueError(
            "differentiable=True is not supported; use torch.optim.SGD to differentiate through steps"
        )


def _is_array(value: Any) -> bool:
    """True for what has no truth value of its own."""
    return isinstance(value, Tensor) or getattr(value, "ndim", 0) > 0


def _unfit(name: str, value: Any) -> str:
    is_finite = isinstance(value, Rational)
    return f"; {name} must fit a double" if is_finite and math.isinf(as_double(value)) else ""


def check_readable(where: str, group: dict[str, Any]) -> None:
    """Checks that the tensors among the options of a group have values.

    Args:
        where: The name of the group in errors.
        group: The group, with options that may be any.

    Raises:
        ValueError: A tensor is on ``meta``, or its storage was resized.
    """
    for name, value in group.items():
        if isinstance(value, Tensor) and (value.is_meta or missing_bytes(value)):
            raise ValueError(f"{where} has a {name} without a value: a tensor without memory")


def check_range(group: dict[str, Any]) -> None:
    """Checks that the options of a group fit the type in which its parameters are updated.

    Raises:
        ValueError: An option is infinite in FP32, and a parameter is not FP64.
    """
    if all(param.dtype == torch.float64 for param in group["params"]):
        return
    for name in NUMBERS:
        value = group[name]
        if isinstance(value, Tensor):
            # The value itself would have to be waited for on another device.
            if value.device.type != "cpu":
                continue
            value = value.item()
        if math.isinf(to_float32(as_double(value))):
            raise ValueError(f"{name}={value} does not fit FP32, in which the group's parameters are updated")


def lists_biases_to_decay(group: dict[str, Any], stated: Collection[str]) -> bool:
    """True if a new group lists biases and norms apart in order to decay them.

    Args:
        group: The group with every option filled in.
        stated: The options that it came with, before the optimizer's own filled in the others.
    """
    if "weight_decay" not in stated or "bias_decay" in stated or not group["params"]:
        return False
    weight_decay = group["weight_decay"]
    return (
        (isinstance(weight_decay, Tensor) or weight_decay > 0)
        and all(not is_lazy(param) and param.dim() <= 1 for param in group["params"])
        and not any(is_flattened_by_fsdp1(param) for param in group["params"])
        and not is_partitioning()
    )


def as_float(value: Any) -> float:
    """The number as a Python float.

    Raises:
        TypeError: It is not a number. Text is none, although ``float`` reads it.
    """
    if isinstance(value, str | bytes | bytearray):
        raise TypeError(f"a number is needed, got {type(value).__name__}")
    return float(value)


def is_zero(value: Any) -> bool:
    """True if an option is known to be 0: a number, or a tensor on the CPU, where reading it waits for nothing."""
    if isinstance(value, Tensor):
        if value.device.type != "cpu" or not has_memory(value) or value.numel() != 1:
            return False
        with outside_all_modes():
            return float(value) == 0
    return isinstance(value, Real) and value == 0


def check_max_grad_norm(max_grad_norm: Any) -> None:
    """Raises unless it is None or a positive number."""
    if max_grad_norm is None:
        return
    if isinstance(max_grad_norm, bool) or not isinstance(max_grad_norm, Real):
        raise TypeError(f"max_grad_norm must be a number or None, got {type(max_grad_norm).__name__}")
    if not as_double(max_grad_norm) > 0 or _unfit("max_grad_norm", max_grad_norm):
        raise ValueError(
            f"Invalid max_grad_norm: {shown(max_grad_norm)}; it must be a positive double, or inf to measure only"
        )


def check_params(params: Any, of_group: bool = False) -> None:
    """Checks the ``params`` of a constructor or group for what is often passed in place of a model's parameters.

    Args:
        params: The parameters.
        of_group: True for those of a group, where the message says how to write one.

    Raises:
        TypeError: They are a module, a function that was not called, or a dict, or such an item is among them; the
            message says what to write.
    """
    if isinstance(params, nn.ParameterList | Tensor):
        return
    if isinstance(params, Mapping):
        raise TypeError(
            f"params is of type {type(params).__name__}: write FusedSGD(model.parameters(), ...), or FusedSGD([group], "
            "...) with a list of groups"
        )
    group = "{'params': module.parameters()}" if of_group else ""
    _check_is_no_source("params is", params, group)
    if not isinstance(params, Iterable):
        raise TypeError(f"params must be an iterable of tensors or groups, got {type(params).__name__}")
    if isinstance(params, list | tuple):
        for item in params:
            if isinstance(item, Iterator):
                raise TypeError(
                    "params has an iterator: write a group {'params': module.parameters()} for each module"
                )
            _check_is_no_source(
                "params has", item[1] if isinstance(item, tuple) and len(item) == 2 else item, group
            )


def _check_is_no_source(found: str, value: Any, group: str) -> None:
    """Raises where parameters could have been got from the value; `group` is what to write for one, or empty."""
    write = f"write {group or 'FusedSGD(model.parameters(), ...)'}"
    if isinstance(value, nn.ParameterDict):
        raise TypeError(f"{found} a ParameterDict, which lists names: write FusedSGD(module.values(), ...)")
    if isinstance(value, nn.Module):
        raise TypeError(f"{found} a module, {type(value).__name__}: {write}")
    if callable(value) and not isinstance(value, Iterable | Tensor):
        name = getattr(value, "__name__", type(value).__name__)
        raise TypeError(f"{found} the function {name}, not called: {write}")
