"""Counters and trackers at their limits stay there, on every backend alike."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch

from comparison import assert_all_same_bits, gradients, parameters, set_gradients
from fused_tricks import DynamicLossScale, FusedSGD

LAST_STEP = 2**63 - 1
LAST_GOOD_STEP = 2**31 - 1


def loaded(backend: str, device: torch.device, **numbers: int) -> FusedSGD:
    """An optimizer without momentum buffers whose checkpoint had these numbers."""
    optimizer = FusedSGD(
        parameters([(5,), (3,)], [torch.float16, torch.float32], device),
        lr=0.1,
        momentum=0.9,
        dampening=0.5,
        loss_scale=DynamicLossScale(init_scale=8.0, growth_interval=LAST_GOOD_STEP, max_scale=8.0),
        backend=backend,
    )
    saved = optimizer.state_dict()
    for group in saved["param_groups"]:
        group.update(numbers)
    optimizer.load_state_dict(saved)
    return optimizer


def params_of(optimizer: FusedSGD) -> list[torch.Tensor]:
    return optimizer.param_groups[0]["params"]


def step(optimizer: FusedSGD, overflows: bool = False) -> None:
    for param in params_of(optimizer):
        param.grad = torch.full_like(param, torch.inf if overflows else 4.0)
    optimizer.step()


def reloaded(optimizer: FusedSGD) -> dict[str, int]:
    """The numbers of an optimizer's own checkpoint, which it accepts."""
    saved = deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(saved)
    assert optimizer.state_dict()["param_groups"] == saved["param_groups"]
    return saved["param_groups"][0]


@pytest.mark.parametrize("before", [LAST_STEP - 1, LAST_STEP])
def test_applied_steps_stay_at_their_limit(backend, device, before):
    optimizer = loaded(backend, device, applied_steps=before)
    for _ in range(3):
        step(optimizer)
        assert optimizer.stats()[1:3] == (LAST_STEP, 0)
    assert reloaded(optimizer)["applied_steps"] == LAST_STEP


@pytest.mark.parametrize("before", [LAST_STEP - 1, LAST_STEP])
def test_skipped_steps_stay_at_their_limit(backend, device, before):
    optimizer = loaded(backend, device, applied_steps=7, skipped_steps=before)
    for _ in range(3):
        step(optimizer, overflows=True)
        assert optimizer.stats()[1:3] == (7, LAST_STEP)
    assert reloaded(optimizer)["skipped_steps"] == LAST_STEP
    step(optimizer)
    assert optimizer.stats()[1:3] == (8, LAST_STEP)


@pytest.mark.parametrize("before", [LAST_STEP - 1, LAST_STEP])
@pytest.mark.parametrize("scale", [None, 1.0], ids=["without a scan", "with one"])
def test_momentum_begins_at_the_limit_as_anywhere_else(backend, device, before, scale):
    """The kernels tell the first update of a buffer from others by its number."""
    results = []
    for applied in (0, before):
        params = parameters([(40_000,), (3,)], [torch.float16, torch.float32], device)
        optimizer = FusedSGD(params, lr=0.1, momentum=0.9, dampening=0.5, loss_scale=scale, backend=backend)
        saved = optimizer.state_dict()
        saved["param_groups"][0]["applied_steps"] = applied
        optimizer.load_state_dict(saved)
        for grads in gradients(params, 4):
            set_gradients(params, grads)
            optimizer.step()
        # Reading the state tells the host what was written.
        state = [optimizer.state[param]["momentum_buffer"] for param in params]
        results.append([*params, *state, optimizer.state[params[0]]["master_param"]])
    assert_all_same_bits(results[1], [tensor.detach() for tensor in results[0]])


@pytest.mark.parametrize("before", [LAST_GOOD_STEP - 2, LAST_GOOD_STEP - 1, LAST_GOOD_STEP])
def test_the_growth_tracker_reaches_its_limit_and_starts_again(backend, device, before):
    optimizer = loaded(backend, device, growth_tracker=before)
    trackers = []
    for _ in range(3):
        step(optimizer)
        trackers.append(reloaded(optimizer)["growth_tracker"])
    expected = before
    for tracker in trackers:
        expected = 0 if expected + 1 >= LAST_GOOD_STEP else expected + 1
        assert tracker == expected
