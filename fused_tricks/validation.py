"""Checks of arguments and options. Errors contain the name, the requirement and the value."""

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
        TypeError: The value is not an integer. Bools and floats are refused.
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
    """Raises TypeError unless a value is a real number. Bools are refused."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {shown(value)}")


def real(name: str, value: Any, least: float, most: float = math.inf) -> float:
    """Returns the value as a `float`.

    Raises:
        TypeError: The value is not a real number. Bools are refused.
        ValueError: The value is NaN, infinite, or outside `[least, most]`.
    """
    check_number(name, value)
    number = as_double(value)
    if not (math.isfinite(number) and least <= number <= most):
        bounds = f"at least {least:g}" if most == math.inf else f"between {least:g} and {most:g}"
        raise ValueError(f"{name} must be finite and {bounds}, got {shown(value)}")
    return number


def as_double(value: Any) -> float:
    """Returns the number as a `float`; infinity if the number is beyond the range of a double, such as `10**400`."""
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def shown(value: Any) -> str:
    """Returns `repr(value)`, shortened if long. Python refuses to print a very long integer."""
    if isinstance(value, Integral) and abs(int(value)) >= 10**40:
        return f"an integer of {int(value).bit_length()} bits"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}…"


def check_module(model: Any) -> None:
    """Raises TypeError unless a model is a `torch.nn.Module`."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")


def check_group(group: dict[str, Any]) -> None:
    """Checks a new group that has every option, with the messages of `torch.optim.SGD`.

    Raises:
        KeyError, TypeError, ValueError: As in `check_numbers`.
        ValueError: The group has Nesterov momentum without momentum, or with dampening.
    """
    check_numbers(group)
    if group["nesterov"] and (group["momentum"] <= 0 or group["dampening"] != 0):
        raise ValueError("Nesterov momentum requires a momentum and zero dampening")


def check_numbers(group: dict[str, Any]) -> None:
    """Checks each option of a group by itself. A schedule or user code may have changed the options of an old group.

    Raises:
        KeyError: An option is missing.
        TypeError: The group is not a dict, a numeric option is not a number, or a flag is not a bool. `lr` and
            `weight_decay` may be tensors of one element.
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
            if not is_readable(value):
                continue
            value = _value_of(value)
        elif value is None and option.takes_none:
            continue
        elif option.takes_none and (isinstance(value, bool) or not isinstance(value, Real)):
            raise TypeError(f"{name} must be None or a number, got {shown(value)}")
        else:
            check_number(name, value)
        number = as_double(value)
        if not math.isfinite(number) or number > option.most or (value < 0 and not option.takes_negative):
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
    """True for a tensor or an array with dimensions, which has no single truth value."""
    return isinstance(value, Tensor) or getattr(value, "ndim", 0) > 0


def _unfit(name: str, value: Any) -> str:
    is_finite = isinstance(value, Rational)
    return f"; {name} must fit a double" if is_finite and math.isinf(as_double(value)) else ""


def check_readable(where: str, group: dict[str, Any]) -> None:
    """Checks that the tensors among the options of a group have values.

    Args:
        where: The name of the group in errors.
        group: The group. Options may have any value.

    Raises:
        ValueError: A tensor is on `meta`, or its storage was resized.
    """
    for name, value in group.items():
        if isinstance(value, Tensor) and (value.is_meta or missing_bytes(value)):
            raise ValueError(
                f"{where} has a {name} without a value, a tensor without memory; assign a number"
            )


def check_range(group: dict[str, Any]) -> None:
    """Checks that the options of a group fit the dtype in which the group's parameters are updated.

    Raises:
        ValueError: An option is infinite in FP32, and a parameter is updated in FP32.
    """
    if all(param.dtype == torch.float64 for param in group["params"]):
        return
    for name in NUMBERS:
        value = group[name]
        if isinstance(value, Tensor):
            if not is_readable(value):
                continue
            value = _value_of(value)
        if value is not None and math.isinf(to_float32(as_double(value))):
            raise ValueError(f"{name}={value} does not fit FP32, in which the group's parameters are updated")


def lists_biases_to_decay(group: dict[str, Any], stated: Collection[str]) -> bool:
    """True if a new group has only biases and norm parameters, and states a `weight_decay` above 0 itself.

    False if the group states `bias_decay` as well.

    Args:
        group: The group, with every option.
        stated: The options that user code states. The optimizer's defaults are the other options.
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
    """Returns the number as a Python float.

    Raises:
        TypeError: The value is not a number. Text is refused, although `float` accepts it.
    """
    if isinstance(value, str | bytes | bytearray):
        raise TypeError(f"an option must be a number, got {type(value).__name__}")
    return float(value)


def is_zero(value: Any) -> bool:
    """True if an option is 0 and readable without a sync: a number, or a tensor on the CPU."""
    if isinstance(value, Tensor):
        return is_readable(value) and _value_of(value) == 0
    return isinstance(value, Real) and value == 0


def is_readable(tensor: Tensor) -> bool:
    """True if a tensor has one element that the host can read without a sync."""
    return tensor.device.type == "cpu" and has_memory(tensor) and tensor.numel() == 1


def _value_of(tensor: Tensor) -> float:
    with outside_all_modes():
        return float(tensor)


def check_max_grad_norm(max_grad_norm: Any) -> None:
    """Raises TypeError or ValueError unless the argument is None or a positive number."""
    if max_grad_norm is None:
        return
    check_number("max_grad_norm", max_grad_norm)
    if not as_double(max_grad_norm) > 0 or _unfit("max_grad_norm", max_grad_norm):
        raise ValueError(
            f"max_grad_norm must be a positive double, or inf to measure only, got {shown(max_grad_norm)}"
        )


def check_params(params: Any, of_group: bool = False) -> None:
    """Checks the `params` of an optimizer or a group for objects that are often passed by mistake.

    Args:
        params: The parameters.
        of_group: True for the parameters of a group. The message then shows a group.

    Raises:
        TypeError: `params` is or contains a module or a function that was not called, is a dict, or is not iterable.
            The message shows correct code.
    """
    if isinstance(params, nn.ParameterList | Tensor):
        return
    if isinstance(params, Mapping):
        raise TypeError(
            f"params must be tensors or groups, got {type(params).__name__}; write FusedSGD(model.parameters(), ...), "
            "or FusedSGD([group], ...) with a list of groups"
        )
    group = "{'params': module.parameters()}" if of_group else ""
    _check_is_no_source("params must be tensors or groups, got", params, group)
    if not isinstance(params, Iterable):
        raise TypeError(f"params must be an iterable of tensors or groups, got {type(params).__name__}")
    if isinstance(params, list | tuple):
        for item in params:
            if isinstance(item, Iterator):
                raise TypeError(
                    "params must be tensors or groups, got a list with an iterator; write a group {'params': "
                    "module.parameters()} for each module"
                )
            _check_is_no_source(
                "params must be tensors or groups, got a list with",
                item[1] if isinstance(item, tuple) and len(item) == 2 else item,
                group,
            )


def _check_is_no_source(found: str, value: Any, group: str) -> None:
    """Raises TypeError if `value` is an object with parameters instead of the parameters.

    Args:
        found: The start of the message.
        value: The object.
        group: The code of a group for the message, or empty.
    """
    write = f"write {group or 'FusedSGD(model.parameters(), ...)'}"
    if isinstance(value, nn.ParameterDict):
        raise TypeError(
            f"{found} a ParameterDict, which iterates over names; write FusedSGD(module.values(), ...)"
        )
    if isinstance(value, nn.Module):
        raise TypeError(f"{found} a module, {type(value).__name__}; {write}")
    if callable(value) and not isinstance(value, Iterable | Tensor):
        name = getattr(value, "__name__", type(value).__name__)
        raise TypeError(f"{found} the function {name}, which was not called; {write}")
