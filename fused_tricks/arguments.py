"""Checks of plain arguments; their errors name the argument."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any


def integer(name: str, value: Any, least: float = -math.inf) -> int:
    """The value as an ``int``.

    Raises:
        TypeError: It is not an integer; ``True`` and ``2.0`` are none.
        ValueError: It is below ``least``.
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value!r}")
    return int(value)


def real(name: str, value: Any, least: float, most: float = math.inf) -> float:
    """The value as a ``float``.

    Raises:
        TypeError: It is not a real number; ``True`` is none.
        ValueError: It is NaN, infinite, or outside ``[least, most]``.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a real number, got {value!r}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not (math.isfinite(number) and least <= number <= most):
        bounds = f"at least {least:g}" if most == math.inf else f"between {least:g} and {most:g}"
        raise ValueError(f"{name} must be finite and {bounds}, got {value!r}")
    return number
