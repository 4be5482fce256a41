"""The contents of a state dict and of the optimizer's own groups."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_tricks import FusedSGD
from fused_tricks.step.state_dict import SCALE_KEYS
from support.comparison import (
    assert_all_same_bits,
    assert_same_bits,
    build,
    copies,
    parameters,
    set_gradients,
)

OPTIONS: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "dampening": 0.5}


def through_a_file(state_dict: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


def step(optimizer: torch.optim.Optimizer, value: float) -> list[Tensor]:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    set_gradients(params, [torch.full(p.shape, value, dtype=p.dtype) for p in params])
    optimizer.step()
    return params


@pytest.mark.parametrize("saves", [0, 1, 2, 3])
def test_buffers_of_zeros_from_torch_are_dampened_however_often_they_are_saved(backend, device, saves):
    params = parameters([(3,), (2, 2)], device=device)
    torch_optimizer = build("torch", copies(params), backend, **OPTIONS)
    step(torch_optimizer, 0.0)
    checkpoint = torch_optimizer.state_dict()
    for _ in range(saves):
        middle = build("fused", copies(params), "reference", **OPTIONS)
        middle.load_state_dict(through_a_file(checkpoint))
        checkpoint = middle.state_dict()
    optimizer = build("fused", params, backend, **OPTIONS)
    optimizer.load_state_dict(through_a_file(checkpoint))
    assert_all_same_bits(step(optimizer, 1.0), step(torch_optimizer, 1.0))


def asked_for_state(model: torch.nn.Module, backend: str) -> FusedSGD:
    """Returns an optimizer whose state torch.distributed.checkpoint has created."""
    optimizer = FusedSGD(model.parameters(), backend=backend, bias_decay=True, **OPTIONS)
    torch.distributed.checkpoint.state_dict.get_optimizer_state_dict(model, optimizer)
    assert all("momentum_buffer" in optimizer.state[p] for p in model.parameters())
    return optimizer


@pytest.fixture
def model(device: torch.device) -> torch.nn.Module:
    pytest.importorskip("torch.distributed.checkpoint.state_dict")
    return torch.nn.Linear(3, 2).to(device)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("kind", ["fused", "torch"])
def test_a_buffer_that_no_update_has_written_is_not_saved(backend, model, kind):
    """torch.optim.SGD would dampen the first update of a buffer of zeros."""
    optimizer = asked_for_state(model, backend)
    checkpoint = optimizer.state_dict()
    assert all("momentum_buffer" not in own for own in checkpoint["state"].values())
    params = copies(model.parameters())
    resumed = build(kind, params, "reference", **OPTIONS)
    resumed.load_state_dict(through_a_file(checkpoint))
    for value in (1.0, 0.5):
        assert_all_same_bits(step(resumed, value), step(optimizer, value))


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_buffer_that_is_written_late_is_saved_from_then_on(backend, model):
    optimizer = asked_for_state(model, backend)
    model.weight.grad = torch.ones_like(model.weight)
    optimizer.step()
    state = optimizer.state_dict()["state"]
    assert "momentum_buffer" in state[0]
    assert "momentum_buffer" not in state.get(1, {})
    resumed = build("fused", copies(model.parameters()), "reference", **OPTIONS)
    resumed.load_state_dict(optimizer.state_dict())
    assert_all_same_bits(step(resumed, 1.0), step(optimizer, 1.0))


def test_a_group_holds_no_number_that_a_step_makes_untrue(backend, device):
    params = parameters([(3,), (2,)], device=device)
    optimizer = FusedSGD(
        [{"params": params[:1]}, {"params": params[1:]}], backend=backend, loss_scale=8.0, **OPTIONS
    )
    set_gradients(params, [torch.ones(3), torch.ones(2)])
    options = [set(group) for group in optimizer.param_groups]
    optimizer.step()
    saved = optimizer.state_dict()
    assert [set(group) for group in optimizer.param_groups] == options
    optimizer.load_state_dict(saved)
    assert [set(group) for group in optimizer.param_groups] == options
    assert all(saved["param_groups"][i]["applied_steps"] == 1 for i in range(2))
    assert "applied_steps" not in repr(optimizer)


def test_groups_of_another_optimizer_bring_no_numbers_of_its_progress():
    first = FusedSGD(parameters([(3,)]), lr=0.1, loss_scale=8.0)
    groups = [{**group, **dict.fromkeys(SCALE_KEYS, 7)} for group in first.param_groups]
    second = FusedSGD(groups, lr=0.1, loss_scale=8.0)
    assert set(second.param_groups[0]).isdisjoint(SCALE_KEYS)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("steps", [0, 1])
def test_distributed_checkpoint_loads_flat_counters_and_leaves_none_in_the_groups(backend, model, steps):
    from torch.distributed.checkpoint import state_dict as distributed

    flat = distributed.StateDictOptions(flatten_optimizer_state_dict=True)
    optimizer = FusedSGD(model.parameters(), backend=backend, loss_scale="dynamic", **OPTIONS)
    for _ in range(3):
        step(optimizer, 1.0)
    saved = distributed.get_optimizer_state_dict(model, optimizer, options=flat)
    resumed = FusedSGD(model.parameters(), backend=backend, loss_scale="dynamic", **OPTIONS)
    for _ in range(steps):
        step(resumed, 1.0)
    resumed.zero_grad()
    distributed.set_optimizer_state_dict(model, resumed, saved, options=flat)
    assert resumed.stats().applied_steps == 3
    for each in (optimizer, resumed):
        assert all(set(group).isdisjoint(SCALE_KEYS) for group in each.param_groups)


def test_a_plain_dict_as_state_is_filled_by_the_next_step(backend, device):
    params = parameters([(3,)], torch.float16, device)
    optimizer = build("fused", params, backend, **OPTIONS)
    expected = build("fused", copies(params), "reference", **OPTIONS)
    step(optimizer, 1.0)
    optimizer.state = {}
    for value in (0.5, 0.25):
        step(optimizer, value)
    assert optimizer.stats().applied_steps == 3
    assert optimizer.state.keys() == set(params)
    step(expected, 1.0)
    expected.state.clear()
    for value in (0.5, 0.25):
        step(expected, value)
    assert_same_bits(
        optimizer.state[params[0]]["momentum_buffer"],
        next(iter(expected.state.values()))["momentum_buffer"],
    )
