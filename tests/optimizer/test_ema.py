"""The average of the weights that the update moves: `ema_decay`."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from fused_tricks import DynamicLossScale, FusedSGD
from support.comparison import (
    assert_all_same_bits,
    assert_same_bits,
    copies,
    fill_gradients,
    gradients,
    parameters,
    set_gradients,
)

SHAPES = [(1,), (5, 3), (17,), (64, 33), (3, 0), (40_000,)]
DECAYS = [0.999, 0.9, 0.5, 0.3, 0.0, 1.0]


class Net(torch.nn.Module):
    def __init__(self, params: list[Parameter]) -> None:
        super().__init__()
        self.all = torch.nn.ParameterList(params)


def averages(optimizer: FusedSGD, params: list[Parameter]) -> list[Tensor]:
    return [optimizer.state[param]["ema_param"] for param in params]


def average_of(params: list[Parameter], decay: float) -> AveragedModel:
    return AveragedModel(Net(params), multi_avg_fn=get_ema_multi_avg_fn(decay))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("decay", DECAYS)
def test_it_equals_averaged_model_bit_for_bit(backend, device, decay, dtype):
    params = parameters(SHAPES, dtype, device)
    expected = copies(params)
    options = {"lr": 0.05, "momentum": 0.9, "nesterov": True}
    ours = FusedSGD(params, **options, bias_decay=True, ema_decay=decay, backend=backend)
    reference, average = torch.optim.SGD(expected, **options), average_of(expected, decay)
    for grads in gradients(params, 4):
        set_gradients(params, grads)
        set_gradients(expected, grads)
        ours.step()
        reference.step()
        average.update_parameters(Net(expected))
    assert_all_same_bits(averages(ours, params), average.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("momentum", [0, 0.9])
def test_low_precision_parameters_have_the_average_of_their_masters(backend, device, momentum, dtype):
    params = parameters(SHAPES, dtype, device)
    options = {"lr": 0.05, "momentum": momentum}
    ours = FusedSGD(params, **options, ema_decay=0.9, backend=backend)
    masters = copies(params, torch.float32)
    average = average_of(masters, 0.9)
    for grads in gradients(params, 4):
        set_gradients(params, grads)
        ours.step()
        with torch.no_grad():
            for master, param in zip(masters, params, strict=True):
                master.copy_(ours.state[param]["master_param"])
        average.update_parameters(Net(masters))
    assert_all_same_bits(averages(ours, params), average.parameters())


@pytest.mark.parametrize("shape", [(40_000,), (5, 3)])
def test_a_skipped_step_leaves_the_average_and_a_first_one_is_not_the_first_update(backend, device, shape):
    (param,) = parameters([shape], torch.float16, device)
    optimizer = FusedSGD([param], lr=0.5, loss_scale=1.0, ema_decay=0.75, backend=backend)
    weights = []
    for value in (math.inf, 1.0, math.nan, 2.0):
        fill_gradients([param], value)
        optimizer.step()
        if math.isfinite(value):
            weights.append(param.detach().float().clone())
    master = optimizer.state[param]["master_param"]
    first = torch.addcmul(master, torch.ones_like(master), torch.ones_like(master))
    expected = first.lerp(master, 0.25)
    assert_same_bits(optimizer.state[param]["ema_param"], expected)


def test_the_decay_warms_up_with_the_applied_updates(backend, device):
    params = parameters(SHAPES, torch.float32, device)
    optimizer = FusedSGD(params, lr=0.05, loss_scale=1.0, ema_decay=0.35, ema_warmup=True, backend=backend)
    expected = None
    applied = 0
    for step, grads in enumerate(gradients(params, 7)):
        if step in (1, 3):
            grads = [torch.full_like(grad, math.inf) for grad in grads]
        set_gradients(params, grads)
        optimizer.step()
        if step in (1, 3):
            continue
        applied += 1
        decay = min(0.35, (1 + applied) / (10 + applied))
        weights = [param.detach().clone() for param in params]
        if expected is None:
            expected = weights
        else:
            torch._foreach_lerp_(expected, weights, 1 - decay)
    assert_all_same_bits(averages(optimizer, params), expected)


def test_a_parameter_that_appears_later_starts_with_its_own_first_update(backend, device):
    early, late = parameters([(5, 3), (17,)], torch.float16, device)
    optimizer = FusedSGD([early, late], lr=0.5, ema_decay=0.75, backend=backend)
    for step in range(3):
        early.grad = torch.ones_like(early)
        late.grad = torch.ones_like(late) if step == 2 else None
        optimizer.step()
    assert_same_bits(optimizer.state[late]["ema_param"], optimizer.state[late]["master_param"])
    assert not torch.equal(optimizer.state[early]["ema_param"], optimizer.state[early]["master_param"])


def test_a_group_that_is_added_later_starts_with_its_own_first_update(backend, device):
    early, late = parameters([(5, 3), (17,)], device=device)
    optimizer = FusedSGD([early], lr=0.5, ema_decay=0.75, backend=backend)
    fill_gradients([early, late])
    optimizer.step()
    optimizer.add_param_group({"params": [late], "ema_decay": 0.5})
    optimizer.step()
    assert_same_bits(optimizer.state[late]["ema_param"], late.detach())
    assert not torch.equal(optimizer.state[early]["ema_param"], early)


@pytest.mark.both_watches
def test_an_average_switched_on_later_starts_then_and_goes_on_after_a_pause(backend, device):
    params = parameters(SHAPES, torch.float32, device)
    optimizer = FusedSGD(params, lr=0.05, momentum=0.9, backend=backend)
    expected = None
    for step, grads in enumerate(gradients(params, 6)):
        decay = 0.75 if step in (2, 3, 5) else None
        optimizer.param_groups[0]["ema_decay"] = decay
        set_gradients(params, grads)
        optimizer.step()
        weights = [param.detach().clone() for param in params]
        if decay is None:
            continue
        if expected is None:
            expected = weights
        else:
            torch._foreach_lerp_(expected, weights, 0.25)
    assert_all_same_bits(averages(optimizer, params), expected)


def test_groups_with_and_without_an_average_are_updated_together(backend, device):
    with_average, without = parameters([(64, 33), (64, 33)], torch.float16, device)
    groups = [{"params": [without]}, {"params": [with_average], "ema_decay": 0.5}]
    optimizer = FusedSGD(groups, lr=0.5, backend=backend)
    for value in (1.0, 2.0):
        fill_gradients([with_average, without], value)
        optimizer.step()
    assert set(optimizer.state[without]) == {"master_param"}
    assert set(optimizer.state[with_average]) == {"master_param", "ema_param"}


def test_an_average_at_an_unaligned_address_is_moved(backend, device):
    params = parameters([(64, 33)], torch.float32, device)
    expected = copies(params)
    ours = FusedSGD(params, lr=0.05, bias_decay=True, ema_decay=0.9, backend=backend)
    reference, average = torch.optim.SGD(expected, lr=0.05), average_of(expected, 0.9)
    for grads in gradients(params, 4):
        set_gradients(params, grads)
        set_gradients(expected, grads)
        ours.step()
        held = ours.state[params[0]]["ema_param"]
        moved = held.new_empty(held.numel() + 1)[1:].view_as(held).copy_(held)
        ours.state[params[0]]["ema_param"] = moved
        reference.step()
        average.update_parameters(Net(expected))
    assert_all_same_bits(averages(ours, params), average.parameters())


def options_of_a_run(backend: str) -> dict[str, Any]:
    return {
        "lr": 0.05,
        "momentum": 0.9,
        "loss_scale": DynamicLossScale(init_scale=64.0, growth_interval=2),
        "ema_decay": 0.9,
        "ema_warmup": True,
        "backend": backend,
    }


@pytest.mark.parametrize("way", ["state_dict", "deepcopy", "pickle"])
@pytest.mark.parametrize("stop", [0, 1, 3])
def test_a_run_resumes_bit_for_bit(backend, device, stop, way):
    whole = parameters(SHAPES, torch.float16, device)
    stream = [[grad * 64 for grad in grads] for grads in gradients(whole, 5)]
    stream[0] = [torch.full_like(grad, math.inf) for grad in stream[0]]
    optimizer = FusedSGD(whole, **options_of_a_run(backend))
    parts = parameters(SHAPES, torch.float16, device)
    resumed = FusedSGD(parts, **options_of_a_run(backend))
    for step, grads in enumerate(stream):
        if step == stop:
            if way == "state_dict":
                saved = copy.deepcopy(resumed.state_dict())
                parts = [Parameter(param.detach().clone()) for param in parts]
                resumed = FusedSGD(parts, **options_of_a_run(backend))
                resumed.load_state_dict(saved)
            elif way == "deepcopy":
                parts, resumed = copy.deepcopy((parts, resumed))
            else:
                parts, resumed = pickle.loads(pickle.dumps((parts, resumed)))
        for params, of in ((whole, optimizer), (parts, resumed)):
            set_gradients(params, grads)
            of.step()
    assert_all_same_bits(averages(resumed, parts), averages(optimizer, whole))
    assert_all_same_bits(parts, whole)


def test_an_unwritten_average_is_not_saved(backend, device):
    params = parameters([(5, 3)], torch.float16, device)
    optimizer = FusedSGD(params, lr=0.5, loss_scale=1.0, ema_decay=0.9, backend=backend)
    fill_gradients(params, math.inf)
    optimizer.step()
    assert optimizer.state_dict()["state"] == {}
    fill_gradients(params)
    optimizer.step()
    assert set(optimizer.state_dict()["state"][0]) == {"master_param", "ema_param"}


def test_a_checkpoint_without_an_average_starts_one(backend, device):
    params = parameters([(5, 3)], torch.float16, device)
    former = FusedSGD(params, lr=0.5, momentum=0.9, backend=backend)
    fill_gradients(params)
    former.step()
    optimizer = FusedSGD(params, lr=0.5, momentum=0.9, ema_decay=0.9, backend=backend)
    saved = former.state_dict()
    del saved["param_groups"][0]["ema_decay"]
    optimizer.load_state_dict(saved)
    optimizer.step()
    state = optimizer.state[params[0]]
    assert_same_bits(state["ema_param"], state["master_param"])


def test_an_average_stays_where_its_parameter_has_no_gradient(backend, device):
    (param,) = parameters([(5, 3)], device=device)
    optimizer = FusedSGD([param], lr=0.5, ema_decay=0.5, backend=backend)
    fill_gradients([param])
    optimizer.step()
    optimizer.step()
    before = optimizer.state[param]["ema_param"].clone()
    param.grad = None
    optimizer.step()
    assert_same_bits(optimizer.state[param]["ema_param"], before)


@pytest.mark.parametrize("decay", [-0.1, 1.1, math.nan, math.inf])
def test_a_decay_outside_its_range_is_refused(decay):
    with pytest.raises(ValueError, match="Invalid ema_decay value: .*; give None or a number from 0 to 1"):
        FusedSGD(parameters([(2,)]), lr=0.1, ema_decay=decay)


@pytest.mark.parametrize("decay", ["0.9", True, torch.tensor(0.9)], ids=str)
def test_a_decay_that_is_no_number_is_refused(decay):
    with pytest.raises(TypeError, match="ema_decay must be None or a number"):
        FusedSGD(parameters([(2,)]), lr=0.1, ema_decay=decay)


def test_a_pickle_from_before_the_option_has_no_average(backend, device):
    params = parameters([(5, 3)], device=device)
    optimizer = FusedSGD(params, lr=0.1, backend=backend)
    for options in (optimizer.defaults, *optimizer.param_groups):
        del options["ema_decay"], options["ema_warmup"]
    params, optimizer = pickle.loads(pickle.dumps((params, optimizer)))
    fill_gradients(params)
    optimizer.step()
    assert "ema_param" not in optimizer.state.get(params[0], {})
