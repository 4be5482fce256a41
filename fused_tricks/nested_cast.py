"""Casts of floating-point tensors within tuples, lists, dicts and dataclasses."""

import copy
import dataclasses
from collections import OrderedDict
from collections.abc import MutableMapping
from typing import Any

import torch
from torch import Tensor

# True where torch.compile traces copy.copy of any object; torch 2.11 breaks the graph there.
_TRACES_COPY = torch.__version__ >= "2.14"


def cast_nested(value: Any, dtype: torch.dtype, done: dict[Tensor, Tensor]) -> Any:
    """`value` with every floating-point tensor in `dtype`; containers are rebuilt where one of theirs is cast.

    `done` holds what was cast so far, by the original: a tensor that occurs several times stays one
    tensor, which is how attention knows self-attention.
    """
    if isinstance(value, Tensor):
        if not value.is_floating_point():
            return value
        if value not in done:
            done[value] = value.to(dtype)
        return done[value]
    if not _needs_cast(value, dtype):
        return value
    if isinstance(value, tuple):
        items = [cast_nested(item, dtype, done) for item in value]
        if not hasattr(value, "_make"):
            return type(value)(items)
        # A compiled graph of torch 2.10 cannot return what _make made, which asks no __new__ of a subclass.
        return type(value)(*items) if torch.compiler.is_compiling() else value._make(items)
    if isinstance(value, list):
        items = [cast_nested(item, dtype, done) for item in value]
        if type(value) is list:
            return items
        sequence = _copy(value)
        sequence[:] = items
        return sequence
    if type(value) in (dict, OrderedDict):  # the copy below would break torch.compile's graph
        return type(value)((key, cast_nested(item, dtype, done)) for key, item in value.items())
    if isinstance(value, MutableMapping):
        mapping = _copy(value)
        for key, item in value.items():
            mapping[key] = cast_nested(item, dtype, done)
        return mapping
    rebuilt = _copy(value)
    for name in _field_names(value):
        object.__setattr__(rebuilt, name, cast_nested(getattr(value, name), dtype, done))
    return rebuilt


def _copy(value: Any) -> Any:
    """A shallow copy; in a compiled graph of an older torch, which cannot trace one, an object with the same fields."""
    if not torch.compiler.is_compiling() or _TRACES_COPY or not dataclasses.is_dataclass(value):
        return copy.copy(value)
    kind: Any = type(value)
    fields = kind.__new__(kind)
    for name in _field_names(value):
        object.__setattr__(fields, name, getattr(value, name))
    return fields


def _needs_cast(value: Any, dtype: torch.dtype) -> bool:
    """Whether there is a floating-point tensor of another type in `value`."""
    if isinstance(value, Tensor):
        return value.is_floating_point() and value.dtype != dtype
    if isinstance(value, tuple | list):
        return any(_needs_cast(item, dtype) for item in value)
    if isinstance(value, MutableMapping):
        return any(_needs_cast(item, dtype) for item in value.values())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return any(_needs_cast(getattr(value, name), dtype) for name in _field_names(value))
    return False


def _field_names(value: Any) -> list[str]:
    """Without those with init=False that are not set yet."""
    return [field.name for field in dataclasses.fields(value) if hasattr(value, field.name)]
