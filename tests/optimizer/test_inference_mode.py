"""Calls under torch.inference_mode, whose new tensors later calls outside can write."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import Parameter

from fused_tricks import FusedSGD, WarmupCosineLR, fp32_state_dict, load_fp32_state_dict
from support.comparison import assert_all_same_bits, copies, parameters

OPTIONS = {"lr": 0.1, "momentum": 0.9, "loss_scale": "dynamic", "max_grad_norm": 1.0}


def step(optimizer: FusedSGD, params: list[Parameter]) -> None:
    for param in params:
        param.grad = torch.full_like(param, 2.0)
    optimizer.step()


CALLS: dict[str, Callable[[FusedSGD], object]] = {
    "step": lambda optimizer: optimizer.step(),
    "state_dict": lambda optimizer: optimizer.state_dict(),
    "load_state_dict": lambda optimizer: optimizer.load_state_dict(optimizer.state_dict()),
    "stats": lambda optimizer: optimizer.stats(),
    "find_overflow": lambda optimizer: optimizer.find_overflow(),
    "scale": lambda optimizer: optimizer.scale(torch.ones(())),
    "refresh_masters": lambda optimizer: optimizer.refresh_masters(),
}


@pytest.mark.parametrize("steps", [0, 2], ids="after {} steps".format)
@pytest.mark.parametrize("call", CALLS)
def test_training_goes_on_outside_after_a_call_within(backend, device, call, steps):
    params = parameters([(3,), (2, 2)], [torch.float16, torch.float32], device)
    expected = copies(params)
    optimizers = [FusedSGD(each, **OPTIONS, backend=backend) for each in (params, expected)]
    for optimizer, each in zip(optimizers, (params, expected), strict=True):
        for param in each:
            param.grad = torch.full_like(param, 2.0)
        for _ in range(steps):
            optimizer.step()
        with torch.inference_mode(optimizer is optimizers[0]):
            CALLS[call](optimizer)
        for _ in range(3):
            step(optimizer, each)
    assert_all_same_bits(params, expected)
    assert not any(value.is_inference() for own in optimizers[0].state.values() for value in own.values())


def test_an_optimizer_and_a_schedule_that_were_made_within_are_used_outside(backend, device):
    (param,) = parameters([(3,)], torch.float16, device)
    with torch.inference_mode():
        optimizer = FusedSGD([param], **OPTIONS, backend=backend)
        schedule = WarmupCosineLR(optimizer, total_steps=5, count="applied")
    for _ in range(3):
        step(optimizer, [param])
        schedule.step()
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.stats().applied_steps == 3


def test_full_precision_is_exported_and_loaded_within(backend, device):
    model = nn.Linear(3, 2, device=device).half()
    optimizer = FusedSGD(model.parameters(), **OPTIONS, backend=backend)
    step(optimizer, list(model.parameters()))
    with torch.inference_mode():
        state = fp32_state_dict(model, optimizer)
        load_fp32_state_dict(model, optimizer, state)
    step(optimizer, list(model.parameters()))
    state["weight"].add_(1.0)
    assert optimizer.stats().applied_steps == 2


def test_state_that_was_made_within_is_refused_by_name(backend, device):
    params = parameters([(3,), (3,)], device=device)
    optimizer = FusedSGD(params, lr=0.1, momentum=0.9, backend=backend)
    step(optimizer, params)
    before = params[0].detach().clone()
    with torch.inference_mode():
        optimizer.state[params[1]]["momentum_buffer"] = torch.ones(3, device=device)
    with pytest.raises(RuntimeError, match="the momentum_buffer of parameter 1 of group 0 was made under"):
        step(optimizer, params)
    assert torch.equal(params[0], before)
