"""The basics, with every torch that one build serves, and with torch, pytest and the package only."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fused_tricks as ft
from fused_tricks import extension

SHAPES = [(3, 5, 3, 3), (17,), (), (0,), (70_001,)]


def parameters(dtype: torch.dtype) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]
    params.append(nn.Parameter(torch.randn(2, 4, 3, 3).to(memory_format=torch.channels_last).to(dtype)))
    params.append(nn.Parameter(torch.randn(6, 4).to(dtype).t()))
    with torch.no_grad():
        for param in params[-2:]:
            param.copy_(torch.linspace(-1, 1, param.numel()).reshape(param.shape))
    return params


def give_gradients(params: list[nn.Parameter], step: int) -> None:
    for param in params:
        param.grad = torch.sin(param.detach().float() * 7 + step).to(param.dtype)


def assert_same_bits(a: Tensor, b: Tensor) -> None:
    assert a.dtype == b.dtype and a.shape == b.shape
    assert torch.equal(
        a.contiguous().view(torch.uint8) if a.dim() else a, b.contiguous().view(torch.uint8) if b.dim() else b
    )


def test_the_extension_works() -> None:
    assert extension.missing_because() is None


@pytest.mark.parametrize("nesterov", [False, True])
def test_fp32_training_is_torchs_bit_for_bit(nesterov: bool) -> None:
    options: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-3, "nesterov": nesterov}
    ours, theirs = parameters(torch.float32), parameters(torch.float32)
    optimizer = ft.FusedSGD(ours, bias_decay=True, backend="cpu", **options)
    other = torch.optim.SGD(theirs, foreach=False, **options)
    for step in range(20):
        give_gradients(ours, step)
        give_gradients(theirs, step)
        optimizer.step()
        other.step()
    for mine, expected in zip(ours, theirs):
        assert_same_bits(mine.detach(), expected.detach())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_training_is_the_references_bit_for_bit_over_an_overflow(dtype: torch.dtype) -> None:
    finals = []
    for backend in ("cpu", "reference"):
        params = parameters(dtype)
        optimizer = ft.FusedSGD(
            params,
            lr=0.1,
            momentum=0.9,
            weight_decay=1e-3,
            loss_scale="dynamic",
            max_grad_norm=50.0,
            backend=backend,
        )
        for step in range(10):
            give_gradients(params, step)
            if step in (0, 4):
                params[-1].grad[-1, -1] = torch.inf
            optimizer.step()
        stats = optimizer.stats()
        assert (stats.applied_steps, stats.skipped_steps, stats.scale) == (8, 2, 2.0**14)
        masters = [optimizer.state[param]["master_param"] for param in params]
        finals.append([*(param.detach() for param in params), *masters])
    for mine, expected in zip(*finals):
        assert_same_bits(mine, expected)


def test_a_parameter_that_others_write_is_noticed() -> None:
    param = nn.Parameter(torch.ones(40, dtype=torch.float16))
    optimizer = ft.FusedSGD([param], lr=1.0, backend="cpu")
    for _ in range(2):
        param.grad = torch.ones_like(param)
        optimizer.step()
    with torch.no_grad():
        param.fill_(8.0)
    optimizer.step()
    assert param.tolist() == [7.0] * 40


def test_checkpoints_go_both_ways() -> None:
    ours, theirs = parameters(torch.float32), parameters(torch.float32)
    optimizer = ft.FusedSGD(ours, lr=0.1, momentum=0.9)
    other = torch.optim.SGD(theirs, lr=0.1, momentum=0.9)
    give_gradients(ours, 0)
    optimizer.step()
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    optimizer.load_state_dict(copy.deepcopy(other.state_dict()))
    for mine, expected in zip(ours, theirs):
        assert_same_bits(optimizer.state[mine]["momentum_buffer"], other.state[expected]["momentum_buffer"])


def test_a_grad_scaler_steps_it() -> None:
    param = nn.Parameter(torch.zeros(3))
    optimizer = ft.FusedSGD([param], lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for value in (1.0, float("inf"), 1.0):
        scaler.scale((param * value).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert param.tolist() == [-2.0] * 3
    assert optimizer.stats().skipped_steps == 1


def test_a_cast_model_learns_on_a_schedule() -> None:
    torch.manual_seed(0)
    model = ft.cast_model(
        nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2)),
        torch.bfloat16,
    )
    optimizer = ft.FusedSGD(model.parameters(), lr=0.2, momentum=0.9, loss_scale="dynamic")
    schedule = ft.WarmupCosineLR(optimizer, 20, 4, count="applied")
    images, labels = torch.randn(32, 1, 8, 8), torch.arange(32) % 2
    losses = []
    for _ in range(20):
        loss = nn.functional.cross_entropy(model(images), labels)
        optimizer.scale(loss).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert schedule.last_epoch == 20
