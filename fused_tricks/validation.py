"""Checks of plain arguments; their errors name the argument."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any


def integer(name: str, value: Any, least: float = -math.inf, most: float = math.inf) -> int:
    """The value as an ``int``.

    Raises:
        TypeError: It is not an integer; ``True`` and ``2.0`` are none.
        ValueError: It is outside ``[least, most]``.
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an integer, got {shown(value)}")
    number = int(value)
    if number < least:
        raise ValueError(f"{name} must be at least {least}, got {shown(value)}")
    if number > most:
        raise ValueError(f"{name} must be at most {most}, got {shown(value)}")
    return number


def real(name: str, value: Any, least: float, most: float = math.inf) -> float:
    """The value as a ``float``.

    Raises:
        TypeError: It is not a real number; ``True`` is none.
        ValueError: It is NaN, infinite, or outside ``[least, most]``.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a real number, got {shown(value)}")
    number = as_double(value)
    if not (math.isfinite(number) and least <= number <= most):
        bounds = f"at least {least:g}" if most == math.inf else f"between {least:g} and {most:g}"
        raise ValueError(f"{name} must be finite and {bounds}, got {shown(value)}")
    return number


def as_double(value: Any) -> float:
    """Returns the number as a ``float``; infinity where it is beyond the range of one, as ``10**400`` is."""
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def shown(value: Any) -> str:
    """Returns ``repr(value)``, shortened where it is very long; Python refuses to print a very long integer at all."""
    if isinstance(value, Integral) and abs(int(value)) >= 10**40:
        return f"an integer of {int(value).bit_length()} bits"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}…"
