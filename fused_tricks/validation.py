"""Checks of arguments and options. Every error names what it refuses, says what is needed, and shows what it got."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from numbers import Integral, Rational, Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ._torch import is_flattened_by_fsdp1
from .distributed.sharding import is_partitioning
from .step.device_state import to_float32
from .step.options import FLAGS, NUMBERS
from .step.ordinary_tensors import outside_all_modes
from .step.shared_memory import has_memory, missing_bytes


def integer(name: str, value: Any, least: float = -math.inf, most: float = math.inf) -> int:
    """Returns the value as an `int`.

    Raises:
        TypeError: The value is not an integer; bools and floats are refused.
        ValueError: The value is outside `[least, most]`.
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an integer, got {shown(value)}")
    number = int(value)
    if number < least:
        raise ValueError(f"{name} must be at least {least}, got {shown(value)}")
    if number > most:
        raise ValueError(f"{name} must be at most {most}, got {shown(value)}")
    return number


def check_number(name: str, value: Any) -> None:
    """Raises TypeError unless a value is a real number; a bool is refused."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {shown(value)}")


def real(name: str, value: Any, least: float, most: float = math.inf) -> float:
    """Returns the value as a `float`.

    Raises:
        TypeError: The value is not a real number, or a bool.
        ValueError: The value is NaN, infinite, or outside `[least, most]`.
    """
    check_number(name, value)
    number = as_double(value)
    if not (math.isfinite(number) and least <= number <= most):
        bounds = f"at least {least:g}" if most == math.inf else f"between {least:g} and {most:g}"
        raise ValueError(f"{name} must be finite and {bounds}, got {shown(value)}")
    return number


def as_double(value: Any) -> float:
    """Returns the number as a `float`; infinity where it is beyond the range of one, as `10**400` is."""
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def shown(value: Any) -> str:
    """Returns `repr(value)`, shortened where it is very long; Python refuses to print a very long integer at all."""
    if isinstance(value, Integral) and abs(int(value)) >= 10**40:
        return f"an integer of {int(value).bit_length()} bits"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}…"


def check_module(model: Any) -> None:
    """Raises TypeError unless a model is a `torch.nn.Module`."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")


def check_group(group: dict[str, Any]) -> None:
    """Checks a new group with every option filled in, with the messages of `torch.optim.SGD`.

    Raises:
        TypeError, ValueError: As `check_numbers`, or Nesterov momentum without what it needs.
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
        else:
            check_number(name, value)
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
        ValueError: A tensor is on `meta`, or its storage was resized.
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
        TypeError: It is not a number. Text is none, although `float` reads it.
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
    check_number("max_grad_norm", max_grad_norm)
    if not as_double(max_grad_norm) > 0 or _unfit("max_grad_norm", max_grad_norm):
        raise ValueError(
            f"Invalid max_grad_norm: {shown(max_grad_norm)}; it must be a positive double, or inf to measure only"
        )


def check_params(params: Any, of_group: bool = False) -> None:
    """Checks the `params` of a constructor or group for what is often passed in place of a model's parameters.

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
