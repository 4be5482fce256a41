"""The linear scaling rule and the global batch size it takes."""

import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from fused_tricks.linear_scaling import global_batch_size, scale_lr


@pytest.mark.parametrize(
    "base_lr, batch_size, expected", [(0.1, 256, 0.1), (0.1, 1024, 0.4), (0.1, 32, 0.0125), (0.5, 384, 0.75)]
)
def test_the_rate_grows_with_the_batch(base_lr: float, batch_size: int, expected: float) -> None:
    assert scale_lr(base_lr, batch_size) == expected


@pytest.mark.parametrize("batch_size", [1, 100, 1000, 8192])
def test_equal_batch_sizes_return_the_base_rate_exactly(batch_size: int) -> None:
    assert scale_lr(0.1, batch_size, base_batch_size=batch_size) == 0.1


def test_the_rate_is_relative_to_the_base_batch_size() -> None:
    assert scale_lr(0.1, 96, base_batch_size=32) == pytest.approx(0.3, rel=1e-15)


def test_a_rate_of_zero_stays_zero() -> None:
    assert scale_lr(0, 1024) == 0.0


@pytest.mark.parametrize("base_lr", [np.float32(0.5), Fraction(1, 2), np.float64(0.5)])
def test_any_real_number_and_integer_type_gives_a_float(base_lr: float) -> None:
    rate = scale_lr(base_lr, np.int64(512))
    assert type(rate) is float
    assert rate == 1.0


@pytest.mark.parametrize("base_lr", [-0.1, math.nan, math.inf])
def test_an_impossible_rate_is_refused(base_lr: float) -> None:
    with pytest.raises(ValueError, match="base_lr"):
        scale_lr(base_lr, 256)


@pytest.mark.parametrize("base_lr", ["0.1", None, True, 1j, torch.tensor(0.1)])
def test_a_rate_that_is_no_real_number_is_refused(base_lr: object) -> None:
    with pytest.raises(TypeError, match="base_lr"):
        scale_lr(base_lr, 256)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["batch_size", "base_batch_size"])
@pytest.mark.parametrize(
    "value, error", [(0, ValueError), (-8, ValueError), (8.0, TypeError), (True, TypeError)]
)
def test_a_batch_size_that_is_no_positive_integer_is_refused(
    name: str, value: object, error: type[Exception]
) -> None:
    with pytest.raises(error, match=f"^{name} "):
        scale_lr(0.1, **{"batch_size": 256, name: value})  # type: ignore[arg-type]


def test_the_global_batch_is_the_product_of_its_parts() -> None:
    assert global_batch_size(32, accumulation_steps=4, world_size=8) == 1024


def test_without_a_process_group_the_world_is_one_process() -> None:
    assert global_batch_size(32, accumulation_steps=2) == 64


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed")
def test_the_world_size_is_that_of_the_default_process_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        assert global_batch_size(32) == 32
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 4)
        assert global_batch_size(32) == 128
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("name", ["per_device_batch_size", "accumulation_steps", "world_size"])
@pytest.mark.parametrize(
    "value, error", [(0, ValueError), (-1, ValueError), (2.0, TypeError), (True, TypeError)]
)
def test_a_part_that_is_no_positive_integer_is_refused(
    name: str, value: object, error: type[Exception]
) -> None:
    with pytest.raises(error, match=f"^{name} "):
        global_batch_size(**{"per_device_batch_size": 32, name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("arguments", [(1e308, 10**6), (0.1, 10**400), (10**400, 256)])
def test_a_rate_beyond_all_numbers_is_refused(arguments: tuple[float, int]) -> None:
    with pytest.raises(ValueError, match="base_lr"):
        scale_lr(*arguments)
