"""The kernel launches of the Triton backend, and the data that stays on the device between steps."""

from __future__ import annotations

import pytest
import torch
from torch.nn import Parameter

from fused_tricks import FusedSGD
from support import backends
from support.comparison import assert_same_bits, fill_gradients

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        backends.unusable_because("triton") is not None,
        reason=f"backend triton: {backends.unusable_because('triton')}",
    ),
]

DEVICE = backends.device_of("triton")


@pytest.fixture
def launches(monkeypatch) -> list[str]:
    """Returns a list that receives the names of the launched kernels."""
    from fused_tricks.backends.triton import launch, stepper, tables

    names: list[str] = []

    def record(device, source, *args):
        names.append(source.__name__.removesuffix("_source"))
        launch.launch(device, source, *args)

    monkeypatch.setattr(stepper, "launch", record)
    monkeypatch.setattr(tables, "launch", record)
    return names


def zeros(count: int, dtype: torch.dtype = torch.float32) -> list[Parameter]:
    return [Parameter(torch.zeros(2, device=DEVICE, dtype=dtype)) for _ in range(count)]


def test_the_extension_watches_the_plan_where_there_is_one(launches, monkeypatch) -> None:
    from fused_tricks.backends.triton import stepper
    from fused_tricks.extension import missing_because

    if missing_because() is not None:
        pytest.skip(str(missing_because()))
    monkeypatch.setattr(stepper, "PlanGuard", None)
    params = zeros(2, torch.float16)
    params[0].grad_dtype = torch.float32
    optimizer = FusedSGD(params, lr=1.0, momentum=0.5, loss_scale=2.0, backend="triton")
    for step in range(4):
        params[0].grad = torch.ones_like(params[0], dtype=torch.float32)
        params[1].grad = None if step == 2 else torch.ones_like(params[1])
        if step == 3:
            with torch.no_grad():
                params[1].fill_(8.0)
        optimizer.step()
    assert params[0].tolist() == [-3.0625, -3.0625]
    assert params[1].tolist() == [8.0 - 0.875, 8.0 - 0.875]
    assert params[0]._version == 4


@pytest.mark.parametrize("options", [{"loss_scale": "dynamic"}, {"loss_scale": 8.0}, {"max_grad_norm": 1.0}])
def test_a_steady_step_that_scans_takes_two_launches(launches, options) -> None:
    params = zeros(3, torch.float16)
    optimizer = FusedSGD(params, backend="triton", **options)
    fill_gradients(params)
    optimizer.step()
    launches.clear()
    optimizer.step()
    assert launches == ["scan", "update"]


def test_a_steady_step_that_does_not_scan_takes_one_launch(launches) -> None:
    params = zeros(3)
    optimizer = FusedSGD(params, backend="triton")
    fill_gradients(params)
    optimizer.step()
    launches.clear()
    optimizer.step()
    assert launches == ["update"]


def test_a_new_learning_rate_takes_no_launch_more(launches) -> None:
    params = zeros(3)
    optimizer = FusedSGD(params, lr=1.0, backend="triton")
    fill_gradients(params)
    optimizer.step()
    launches.clear()
    optimizer.param_groups[0]["lr"] = 0.5
    optimizer.step()
    assert launches == ["update"]
    assert params[0].tolist() == [-1.5, -1.5]


def test_new_gradients_are_written_to_the_table_128_at_a_time(launches) -> None:
    params = zeros(130)
    optimizer = FusedSGD(params, lr=1.0, backend="triton")
    fill_gradients(params)
    optimizer.step()
    former = [param.grad for param in params]
    launches.clear()
    fill_gradients(params)
    optimizer.step()
    assert launches == ["write", "write", "update"]
    assert all(param.tolist() == [-2.0, -2.0] for param in params)
    del former


@pytest.mark.parametrize("count", [1, 8, 9, 40])
def test_any_number_of_groups_keeps_its_own_options(launches, count: int) -> None:
    params = zeros(count)
    groups = [
        {"params": [param], "lr": float(i + 1), "maximize": i % 2 == 1, "momentum": 0.5 * (i % 3)}
        for i, param in enumerate(params)
    ]
    optimizer = FusedSGD(groups, backend="triton")
    fill_gradients(params)
    optimizer.step()
    launches.clear()
    optimizer.step()
    assert launches == ["update"]
    expected = []
    for group in groups:
        twice = 2 + group["momentum"]
        expected.append((twice if group["maximize"] else -twice) * group["lr"])
    assert [param[0].item() for param in params] == expected


def test_a_captured_step_writes_a_table_of_its_own_in_every_replay(launches, monkeypatch) -> None:
    from fused_tricks.backends.triton import tables

    params = zeros(1)
    optimizer = FusedSGD(params, lr=1.0, backend="triton")
    fill_gradients(params)
    optimizer.step()
    launches.clear()
    monkeypatch.setattr(tables, "is_capturing", lambda device: True)
    optimizer.step()
    assert launches == ["write", "update"]
    monkeypatch.setattr(tables, "is_capturing", lambda device: False)
    launches.clear()
    optimizer.step()
    assert launches == ["update"]
    assert_same_bits(params[0].detach(), torch.full((2,), -3.0))


def test_a_table_is_written_anew_after_a_write_that_failed_half_way(monkeypatch) -> None:
    from fused_tricks.backends.triton import launch, tables

    params = zeros(130)
    optimizer = FusedSGD(params, lr=1.0, backend="triton")
    fill_gradients(params)
    optimizer.step()
    former = [param.grad for param in params]
    calls = []

    def fail_second(*args):
        calls.append(args)
        if len(calls) == 2:
            raise RuntimeError("no launch")
        launch.launch(*args)

    monkeypatch.setattr(tables, "launch", fail_second)
    fill_gradients(params)
    with pytest.raises(RuntimeError, match="no launch"):
        optimizer.step()
    for param, grad in zip(params, former, strict=True):
        param.grad.fill_(100.0)
        param.grad = grad
    optimizer.step()
    assert all(param.tolist() == [-2.0, -2.0] for param in params)
