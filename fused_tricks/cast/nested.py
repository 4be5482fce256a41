"""Casts of floating-point tensors within tuples, lists, dicts and dataclasses."""

import copy
import dataclasses
from collections import OrderedDict
from collections.abc import Iterable, Iterator, MutableMapping
from typing import Any

import torch
from torch import Tensor

# True where torch.compile traces copy.copy of any object; torch 2.11 breaks the graph there.
_TRACES_COPY = torch.__version__ >= "2.14"


def cast_nested(value: Any, dtype: torch.dtype, done: dict[Tensor, Tensor]) -> Any:
    """Returns a value with every floating-point tensor in `dtype`. Containers with a tensor to cast are rebuilt.

    Args:
        value: A tensor or container.
        dtype: The dtype to cast to.
        done: The tensors cast so far, by their originals. A tensor that occurs several times stays one tensor, because
            attention recognises self-attention by the identity of its arguments.

    Raises:
        ValueError: A container contains itself.
    """
    if torch.compiler.is_compiling():
        return _cast(value, dtype, done)
    try:
        return _cast(value, dtype, done)
    except RecursionError:
        container = _endless(value)
        if container is None:
            raise
    raise ValueError(
        f"a {type(container).__name__} among the inputs or outputs contains itself and cannot be cast; remove the "
        "reference to itself, or leave the argument out of cast_inputs"
    )


def _cast(value: Any, dtype: torch.dtype, done: dict[Tensor, Tensor]) -> Any:
    if isinstance(value, Tensor):
        if not value.is_floating_point():
            return value
        if value not in done:
            done[value] = value.to(dtype)
        return done[value]
    if not _needs_cast(value, dtype):
        return value
    if isinstance(value, tuple):
        items = [_cast(item, dtype, done) for item in value]
        if not hasattr(value, "_make"):
            return type(value)(items)
        # A compiled graph of torch 2.10 cannot return the result of _make, which skips the __new__ of a subclass.
        return type(value)(*items) if torch.compiler.is_compiling() else value._make(items)
    if isinstance(value, list):
        items = [_cast(item, dtype, done) for item in value]
        if type(value) is list:
            return items
        sequence = _copy(value)
        sequence[:] = items
        return sequence
    # copy.copy would break torch.compile's graph.
    if type(value) in (dict, OrderedDict):
        return type(value)((key, _cast(item, dtype, done)) for key, item in value.items())
    if isinstance(value, MutableMapping):
        mapping = _copy(value)
        for key, item in value.items():
            mapping[key] = _cast(item, dtype, done)
        return mapping
    rebuilt = _copy(value)
    for name in _field_names(value):
        object.__setattr__(rebuilt, name, _cast(getattr(value, name), dtype, done))
    return rebuilt


def _copy(value: Any) -> Any:
    """Returns a shallow copy, by its fields in a compiled graph of an older torch, which cannot trace copy.copy."""
    if not torch.compiler.is_compiling() or _TRACES_COPY or not dataclasses.is_dataclass(value):
        return copy.copy(value)
    kind: Any = type(value)
    fields = kind.__new__(kind)
    for name in _field_names(value):
        object.__setattr__(fields, name, getattr(value, name))
    return fields


def _needs_cast(value: Any, dtype: torch.dtype) -> bool:
    """True if a value contains a floating-point tensor of another dtype."""
    if isinstance(value, Tensor):
        return value.is_floating_point() and value.dtype != dtype
    return any(_needs_cast(item, dtype) for item in _items(value))


def _items(value: Any) -> Iterable[Any]:
    """Returns the items of a container, and none for any other value."""
    if isinstance(value, tuple | list):
        return value
    if isinstance(value, MutableMapping):
        return value.values()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [getattr(value, name) for name in _field_names(value)]
    return ()


def _endless(value: Any) -> Any:
    """Returns a container in a value that contains itself; None without one."""
    around: list[tuple[Any, Iterator[Any]]] = [(value, iter(_items(value)))]
    finished: dict[int, Any] = {}
    while around:
        container, items = around[-1]
        item = next(items, finished)
        if item is finished:
            finished[id(container)] = container
            around.pop()
        elif any(item is outer for outer, _ in around):
            return item
        elif id(item) not in finished:
            around.append((item, iter(_items(item))))
    return None


def _field_names(value: Any) -> list[str]:
    """Returns the names of the fields that are set; fields with init=False may be missing."""
    return [field.name for field in dataclasses.fields(value) if hasattr(value, field.name)]
