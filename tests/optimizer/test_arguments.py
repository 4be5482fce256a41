"""Checks of plain arguments."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from fused_tricks.validation import integer, real


@pytest.mark.parametrize("value", [3, np.int64(3)])
def test_an_integer_of_any_type_becomes_an_int(value) -> None:
    assert type(integer("steps", value, least=3)) is int


@pytest.mark.parametrize(
    "value, error",
    [
        (True, TypeError),
        (3.0, TypeError),
        ("3", TypeError),
        (None, TypeError),
        (torch.tensor(3), TypeError),
        (2, ValueError),
    ],
)
def test_what_is_no_integer_or_too_small_is_refused_by_name(value, error: type[Exception]) -> None:
    with pytest.raises(error, match="^steps must be .*, got "):
        integer("steps", value, least=3)


@pytest.mark.parametrize("value", [1, 0.5, np.float32(0.5), Fraction(1, 2), 0])
def test_a_real_number_of_any_type_becomes_a_float(value) -> None:
    number = real("ratio", value, 0, 1)
    assert type(number) is float
    assert number == value


@pytest.mark.parametrize(
    "value, error",
    [
        (True, TypeError),
        ("0.5", TypeError),
        (1j, TypeError),
        (torch.tensor(0.5), TypeError),
        (math.nan, ValueError),
        (math.inf, ValueError),
        (-0.1, ValueError),
        (1.5, ValueError),
    ],
)
def test_what_is_no_real_number_or_out_of_bounds_is_refused_by_name(value, error: type[Exception]) -> None:
    with pytest.raises(error, match="^ratio must be .*, got "):
        real("ratio", value, 0, 1)


def test_without_an_upper_bound_infinity_is_still_refused() -> None:
    with pytest.raises(ValueError, match="^lr must be finite and at least 0, got inf"):
        real("lr", math.inf, 0)
