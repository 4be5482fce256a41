"""Behaviour that requires a GPU: streams, graphs, synchronisation and several devices.

Every test of the step also runs on a GPU: `pytest tests/optimizer/test_overflow.py --backend cuda`.
"""

from __future__ import annotations

import time
import warnings

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from fused_tricks import FusedSGD, WarmupCosineLR
from fused_tricks.backends import availability
from support.comparison import assert_all_same_bits, fill_gradients, gradients, parameters, set_gradients

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]


@pytest.fixture(params=["cuda", "triton"])
def gpu_backend(request: pytest.FixtureRequest) -> str:
    """Returns each usable GPU backend in turn."""
    reason = availability()[request.param]
    if reason is not None:
        pytest.skip(f"backend {request.param}: {reason}")
    return request.param


SHAPES = [(64, 3, 7, 7), (64,), (300, 100), (10,)]
OPTIONS = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-3}


def gradients_of(params: list[Parameter], step: int) -> list[Tensor]:
    (grads,) = gradients(params, 1, seed=step)
    return grads


def on_cpu(steps: int, dtype: torch.dtype, **options: object) -> list[Parameter]:
    """Returns the parameters after the same training on the CPU backend."""
    params = parameters(SHAPES, dtype)
    optimizer = FusedSGD(params, backend="cpu", **OPTIONS, **options)
    for step in range(steps):
        set_gradients(params, gradients_of(params, step))
        optimizer.step()
    return params


def test_a_search_for_an_overflow_synchronises_once(gpu_backend: str) -> None:
    params = parameters(SHAPES * 10, torch.float16, "cuda")
    optimizer = FusedSGD(params, backend=gpu_backend, loss_scale="dynamic", **OPTIONS)
    set_gradients(params, gradients_of(params, 0))
    params[7].grad[0] = torch.nan
    optimizer.step()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = optimizer.find_overflow()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert found == ["parameter 7 of group 0"]
    assert len([each for each in caught if "synchronizing" in str(each.message)]) == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_gpu_gives_the_bits_of_the_cpu(gpu_backend: str, dtype: torch.dtype) -> None:
    params = parameters(SHAPES, dtype, "cuda")
    optimizer = FusedSGD(params, backend=gpu_backend, loss_scale="dynamic", **OPTIONS)
    for step in range(20):
        set_gradients(params, gradients_of(params, step))
        optimizer.step()
    assert_all_same_bits(params, on_cpu(20, dtype, loss_scale="dynamic"))


def test_steps_do_not_synchronise(gpu_backend: str) -> None:
    params = parameters(SHAPES, torch.float16, "cuda")
    optimizer = FusedSGD(params, backend=gpu_backend, loss_scale="dynamic", max_grad_norm=1.0, **OPTIONS)
    set_gradients(params, gradients_of(params, 0))
    loss = torch.ones((), device="cuda", requires_grad=True)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(5):
            optimizer.scale(loss)
            optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert optimizer.stats().applied_steps == 5


def test_steps_do_not_allocate_once_a_plan_exists(gpu_backend: str) -> None:
    params = parameters(SHAPES, torch.float16, "cuda")
    optimizer = FusedSGD(params, backend=gpu_backend, loss_scale="dynamic", **OPTIONS)
    set_gradients(params, gradients_of(params, 0))
    optimizer.step()
    optimizer.step()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    for _ in range(5):
        optimizer.step()
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


def test_a_captured_step_replays_with_its_scale_and_its_skips(gpu_backend: str) -> None:
    params = parameters(SHAPES, torch.float16, "cuda")
    options = {**OPTIONS, "loss_scale": "dynamic", "ema_decay": 0.9, "ema_warmup": True}
    optimizer = FusedSGD(params, backend=gpu_backend, **options)
    twins = [Parameter(param.detach().clone()) for param in params]
    other = FusedSGD(twins, backend=gpu_backend, **options)
    set_gradients(params, gradients_of(params, 0))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            optimizer.step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    set_gradients(twins, gradients_of(twins, 0))
    for _ in range(3):
        other.step()
    for step in range(6):
        new = gradients_of(params, step)
        if step == 2:
            new[-1][-1] = float("inf")
        for param, twin, grad in zip(params, twins, new, strict=True):
            param.grad.copy_(grad)
            twin.grad.copy_(grad)
        graph.replay()
        other.step()
    assert_all_same_bits(params, twins)
    averages = [
        [of.state[param]["ema_param"] for param in updated]
        for of, updated in ((optimizer, params), (other, twins))
    ]
    assert_all_same_bits(*averages)
    assert optimizer.stats() == other.stats()
    assert optimizer.stats().skipped_steps == 1


def test_a_learning_rate_on_the_device_is_read_in_every_replay(gpu_backend: str) -> None:
    param = Parameter(torch.zeros(4, device="cuda"))
    rate = torch.tensor(1.0, device="cuda")
    optimizer = FusedSGD([param], lr=rate, backend=gpu_backend)
    param.grad = torch.ones(4, device="cuda")
    optimizer.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    rate.fill_(10.0)
    graph.replay()
    assert param.tolist() == [-11.0] * 4


def test_a_captured_step_follows_its_schedule_as_it_is_replayed(gpu_backend: str) -> None:
    param = Parameter(torch.zeros(4, device="cuda"))
    optimizer = FusedSGD([param], lr=1.0, loss_scale="dynamic", backend=gpu_backend)
    schedule = WarmupCosineLR(optimizer, 8, 4, count="applied")
    param.grad = torch.full_like(param, -float(optimizer.stats().scale))
    optimizer.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    for overflows in (False, True, False):
        param.grad.fill_(float("inf") if overflows else -optimizer.stats().scale)
        graph.replay()
    assert param.tolist() == [0.25 + 0.5 + 0.75] * 4
    assert schedule.get_last_lr() == [1.0]


def test_a_schedule_of_applied_updates_does_not_synchronise(gpu_backend: str) -> None:
    params = parameters(SHAPES, torch.float16, "cuda")
    optimizer = FusedSGD(params, backend=gpu_backend, loss_scale="dynamic", **OPTIONS)
    schedule = WarmupCosineLR(optimizer, 8, 4, count="applied")
    set_gradients(params, gradients_of(params, 0))
    optimizer.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(5):
            schedule.step()
            optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert schedule.last_epoch == 6


def test_a_step_runs_on_the_current_stream(gpu_backend: str) -> None:
    param = Parameter(torch.zeros(1 << 22, device="cuda"))
    optimizer = FusedSGD([param], lr=1.0, backend=gpu_backend)
    param.grad = torch.zeros_like(param)
    optimizer.step()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        param.grad.fill_(1.0)
        optimizer.step()
    stream.synchronize()
    assert (param == -1).all()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are fewer than two GPUs")
def test_a_step_runs_on_the_device_of_its_parameters_whatever_is_current(gpu_backend: str) -> None:
    params = parameters(SHAPES, torch.float16, "cuda:1")
    optimizer = FusedSGD(params, backend=gpu_backend, loss_scale="dynamic", **OPTIONS)
    with torch.cuda.device(0):
        for step in range(3):
            set_gradients(params, gradients_of(params, step))
            optimizer.step()
        assert torch.cuda.current_device() == 0
    assert_all_same_bits(params, on_cpu(3, torch.float16, loss_scale="dynamic"))


def test_steps_skipped_for_ever_are_warned_of_without_waiting_for_the_device(gpu_backend: str) -> None:
    params = parameters(SHAPES, torch.float16, "cuda")
    optimizer = FusedSGD(params, backend=gpu_backend, loss_scale=8.0, **OPTIONS)
    fill_gradients(params, torch.nan)
    loss = torch.ones((), device="cuda", requires_grad=True)
    optimizer.scale(loss)
    optimizer.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.warns(UserWarning, match="steps were skipped with the static loss scale of 8"):
            for _ in range(5):
                for _ in range(150):
                    optimizer.step()
                time.sleep(0.1)  # the device completes the launched steps
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert optimizer.stats().skipped_in_a_row == 751
