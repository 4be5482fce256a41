"""Counters and trackers near their limits, with the same result on every backend."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch

from fused_tricks import DynamicLossScale, FusedSGD
from support.backends import takes_no_step
from support.comparison import (
    assert_all_same_bits,
    assert_unchanged,
    gradients,
    parameters,
    set_gradients,
    snapshot,
)

MOST_STEPS = 2**62
LAST_GOOD_STEP = 2**31 - 1


def loaded(backend: str, device: torch.device, **numbers: int) -> FusedSGD:
    """Returns an optimizer without momentum buffers, after it has loaded a checkpoint with these numbers."""
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
    """Loads an optimizer's own checkpoint, and returns its numbers."""
    saved = deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(saved)
    assert optimizer.state_dict()["param_groups"] == saved["param_groups"]
    return saved["param_groups"][0]


@takes_no_step
@pytest.mark.parametrize("key", ["applied_steps", "skipped_steps"])
def test_counters_that_no_device_can_hold_are_refused_by_name(backend, device, key):
    optimizer = loaded(backend, device, applied_steps=5)
    before = snapshot(optimizer)
    saved = deepcopy(optimizer.state_dict())
    for group in saved["param_groups"]:
        group[key] = 2**63
    with pytest.raises(ValueError, match=key):
        optimizer.load_state_dict(saved)
    assert_unchanged(optimizer, before)


@pytest.mark.parametrize("before", [MOST_STEPS, MOST_STEPS + 1, 2**63 - 1])
def test_counters_near_their_limit_go_on_far_from_it_and_are_accepted_again(backend, device, before):
    optimizer = loaded(backend, device, applied_steps=before, skipped_steps=before)
    for count in range(1, 4):
        step(optimizer)
        step(optimizer, overflows=True)
        assert optimizer.stats()[1:3] == (MOST_STEPS + count, MOST_STEPS + count)
    reloaded_numbers = deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(reloaded_numbers)
    assert optimizer.stats()[1:3] == (MOST_STEPS, MOST_STEPS)


def test_counters_below_the_limit_count_on(backend, device):
    optimizer = loaded(backend, device, applied_steps=MOST_STEPS - 5, skipped_steps=MOST_STEPS - 7)
    step(optimizer)
    step(optimizer, overflows=True)
    assert optimizer.stats()[1:3] == (MOST_STEPS - 4, MOST_STEPS - 6)
    assert reloaded(optimizer)["applied_steps"] == MOST_STEPS - 4


@pytest.mark.parametrize("before", [MOST_STEPS - 6])
@pytest.mark.parametrize("scale", [None, 1.0], ids=["without a scan", "with one"])
def test_momentum_begins_at_the_limit_as_anywhere_else(backend, device, before, scale):
    """The kernels identify the first update of a buffer by the update's number."""
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
        # Reading the state copies the notes of written buffers to the host.
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
