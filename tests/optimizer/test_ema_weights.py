"""The averages of the weights in use: their export, and an evaluation with them."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fused_tricks as ft
from support.comparison import assert_all_same_bits, assert_same_bits


def network(dtype: torch.dtype, device: Any) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5)]
    return ft.cast_model(nn.Sequential(*layers), dtype).to(device)


def optimizer_of(model: nn.Module, backend: str, **options: Any) -> ft.FusedSGD:
    given = {"lr": 0.05, "momentum": 0.9, "loss_scale": 8.0, "ema_decay": 0.75, **options}
    return ft.FusedSGD(model.named_parameters(), backend=backend, **given)


def train(model: nn.Module, optimizer: ft.FusedSGD, steps: int, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for param in model.parameters():
            param.grad = torch.randn(param.shape, generator=generator).to(param.device, param.dtype)
        optimizer.step()


def everything(model: nn.Module, optimizer: ft.FusedSGD) -> list[Tensor]:
    held = [tensor for own in optimizer.state.values() for tensor in own.values()]
    return [tensor.detach().clone() for tensor in (*model.state_dict().values(), *held)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_the_model_has_the_rounded_averages_within_and_its_own_bits_afterwards(backend, device, dtype):
    model = network(dtype, device)
    optimizer = optimizer_of(model, backend)
    train(model, optimizer, 3)
    before = everything(model, optimizer)
    addresses = [param.data_ptr() for param in model.parameters()]
    with ft.ema_weights(model, optimizer):
        for param in model.parameters():
            assert_same_bits(param.detach(), optimizer.state[param]["ema_param"].to(param.dtype))
        assert [param.data_ptr() for param in model.parameters()] == addresses
    assert_all_same_bits(everything(model, optimizer), before)


def test_an_exception_puts_the_weights_back(backend, device):
    model = network(torch.float16, device)
    optimizer = optimizer_of(model, backend)
    train(model, optimizer, 2)
    before = everything(model, optimizer)
    with pytest.raises(KeyError), ft.ema_weights(model, optimizer):
        raise KeyError
    assert_all_same_bits(everything(model, optimizer), before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("inference", [False, True])
def test_training_goes_on_as_if_there_had_been_no_evaluation(backend, device, dtype, inference):
    model = network(dtype, device)
    optimizer = optimizer_of(model, backend)
    train(model, optimizer, 2)
    twin, other = copy.deepcopy((model, optimizer))
    for seed in (2, 3):
        with torch.inference_mode(inference), ft.ema_weights(model, optimizer):
            pass
        train(model, optimizer, 2, seed)
        train(twin, other, 2, seed)
    assert_all_same_bits(everything(model, optimizer), everything(twin, other))


def test_not_a_number_in_a_weight_keeps_its_bits(backend, device):
    model = network(torch.float16, device)
    optimizer = optimizer_of(model, backend)
    train(model, optimizer, 2)
    with torch.no_grad():
        model[4].weight[0, 0] = math.nan
        model[4].weight.view(torch.int16)[0, 1] = 0x7E55
    before = everything(model, optimizer)
    with ft.ema_weights(model, optimizer):
        pass
    assert_all_same_bits(everything(model, optimizer), before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_the_exported_averages_are_fp32_and_load_into_the_plain_network(backend, device, dtype):
    model = network(dtype, device)
    optimizer = optimizer_of(model, backend)
    train(model, optimizer, 3)
    exported = ft.ema_state_dict(model, optimizer)
    assert list(exported) == list(model.state_dict())
    for name, param in model.named_parameters():
        assert_same_bits(exported[name], optimizer.state[param]["ema_param"])
    for name, tensor in model.named_buffers():
        assert_same_bits(exported[name], tensor)
    network(torch.float32, device).load_state_dict(exported)


def test_the_exported_averages_are_copies(backend, device):
    model = network(torch.float32, device)
    optimizer = optimizer_of(model, backend)
    train(model, optimizer, 2)
    exported = ft.ema_state_dict(model, optimizer)
    kept = {name: tensor.clone() for name, tensor in exported.items()}
    train(model, optimizer, 2)
    assert_all_same_bits(exported.values(), kept.values())


@pytest.mark.parametrize("skipped", [False, True])
def test_before_the_first_update_the_average_is_the_weight(backend, device, skipped):
    model = network(torch.float16, device)
    optimizer = optimizer_of(model, backend)
    if skipped:
        for param in model.parameters():
            param.grad = torch.full_like(param, math.inf)
        optimizer.step()
    before = everything(model, optimizer)
    exported = ft.ema_state_dict(model, optimizer)
    assert_all_same_bits(exported.values(), ft.fp32_state_dict(model, optimizer).values())
    with ft.ema_weights(model, optimizer):
        assert_all_same_bits(everything(model, optimizer), before)


def test_parameters_of_groups_without_an_average_keep_their_values(backend, device):
    model = network(torch.float16, device)
    groups = [{"params": model[0].parameters()}, {"params": model[4].parameters(), "ema_decay": 0.5}]
    optimizer = ft.FusedSGD(groups, lr=0.05, loss_scale=1.0, backend=backend)
    train(model, optimizer, 3)
    weight = model[0].weight.detach().clone()
    with ft.ema_weights(model, optimizer):
        assert_same_bits(model[0].weight.detach(), weight)
        assert_same_bits(model[4].weight.detach(), optimizer.state[model[4].weight]["ema_param"].half())
    master = optimizer.state[model[0].weight]["master_param"]
    assert_same_bits(ft.ema_state_dict(model, optimizer)["0.weight"], master)


def test_an_average_that_was_switched_off_is_still_in_use(backend, device):
    model = network(torch.float16, device)
    optimizer = optimizer_of(model, backend)
    train(model, optimizer, 2)
    average = optimizer.state[model[4].weight]["ema_param"].clone()
    optimizer.param_groups[0]["ema_decay"] = None
    train(model, optimizer, 2)
    assert_same_bits(ft.ema_state_dict(model, optimizer)["4.weight"], average)


@pytest.mark.parametrize(
    "call",
    [
        lambda model, optimizer: optimizer.step(),
        lambda model, optimizer: optimizer.refresh_masters(),
        lambda model, optimizer: optimizer.state_dict(),
        lambda model, optimizer: copy.deepcopy(optimizer),
        lambda model, optimizer: ft.fp32_state_dict(model, optimizer),
        lambda model, optimizer: ft.load_fp32_state_dict(model, optimizer, model.state_dict()),
        lambda model, optimizer: ft.ema_state_dict(model, optimizer),
        lambda model, optimizer: ft.ema_weights(model, optimizer).__enter__(),
    ],
    ids=[
        "step",
        "refresh_masters",
        "state_dict",
        "deepcopy",
        "fp32_state_dict",
        "load_fp32_state_dict",
        "ema_state_dict",
        "ema_weights",
    ],
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_within_the_averages_are_not_taken_for_the_weights(backend, device, call, dtype):
    model = network(dtype, device)
    optimizer = optimizer_of(model, backend)
    train(model, optimizer, 2)
    before = everything(model, optimizer)
    with (
        ft.ema_weights(model, optimizer),
        pytest.raises(RuntimeError, match="the model has the averages in place of its weights; leave"),
    ):
        call(model, optimizer)
    assert_all_same_bits(everything(model, optimizer), before)
    train(model, optimizer, 1)


def test_an_optimizer_without_an_average_is_refused(backend, device):
    model = network(torch.float16, device)
    optimizer = optimizer_of(model, backend, ema_decay=None)
    train(model, optimizer, 1)
    with pytest.raises(ValueError, match="no average of the weights; set ema_decay"):
        ft.ema_state_dict(model, optimizer)
    with pytest.raises(ValueError, match="no average of the weights; set ema_decay"):
        ft.ema_weights(model, optimizer).__enter__()
    train(model, optimizer, 1)


def test_an_optimizer_of_another_model_is_refused(backend, device):
    optimizer = optimizer_of(network(torch.float16, device), backend)
    with pytest.raises(ValueError, match="optimizer has no parameter of this model"):
        ft.ema_weights(network(torch.float16, device), optimizer).__enter__()
    with pytest.raises(TypeError, match="optimizer must be a FusedSGD"):
        ft.ema_state_dict(nn.Linear(2, 2), torch.optim.SGD([nn.Parameter(torch.ones(1))]))


def test_a_checkpoint_may_be_loaded_within_and_the_step_is_still_refused(backend, device):
    model = network(torch.float16, device)
    optimizer = optimizer_of(model, backend)
    train(model, optimizer, 2)
    saved = copy.deepcopy(optimizer.state_dict())
    before = everything(model, optimizer)
    with ft.ema_weights(model, optimizer):
        optimizer.load_state_dict(saved)
        with pytest.raises(RuntimeError, match="leave the context of ema_weights"):
            optimizer.step()
    assert_all_same_bits(everything(model, optimizer), before)
    train(model, optimizer, 1)


@pytest.mark.parametrize("shape", [(4,), (5,)])
def test_new_data_of_a_parameter_within_are_replaced_and_the_others_put_back(backend, device, shape):
    model = network(torch.float16, device)
    optimizer = optimizer_of(model, backend)
    train(model, optimizer, 2)
    before = everything(model, optimizer)
    with ft.ema_weights(model, optimizer):
        model[0].bias.data = torch.zeros(shape, device=device, dtype=torch.float16)
    assert_all_same_bits(everything(model, optimizer), before)
    train(model, optimizer, 1)


def test_memory_that_is_freed_within_is_replaced_and_the_others_are_put_back(backend, device):
    model = network(torch.float16, device)
    optimizer = optimizer_of(model, backend)
    train(model, optimizer, 2)
    before = everything(model, optimizer)
    with ft.ema_weights(model, optimizer):
        model[0].bias.untyped_storage().resize_(0)
    assert_all_same_bits(everything(model, optimizer), before)
    train(model, optimizer, 1)


def test_a_hook_that_fails_at_the_end_leaves_the_weights_and_a_usable_optimizer(backend, device):
    model = network(torch.float16, device)
    optimizer = optimizer_of(model, backend)
    train(model, optimizer, 2)
    before = everything(model, optimizer)
    calls = []

    def fail(*_: Any) -> None:
        calls.append(1)
        if len(calls) > 1:
            raise KeyError("hook")

    handle = model.register_state_dict_pre_hook(fail)
    with pytest.raises(KeyError, match="hook"), ft.ema_weights(model, optimizer):
        pass
    handle.remove()
    assert_all_same_bits(everything(model, optimizer), before)
    train(model, optimizer, 1)


def test_the_export_has_the_masters_of_parameters_without_an_average(backend, device):
    full = network(torch.float32, device)
    model = network(torch.bfloat16, device)
    optimizer = optimizer_of(model, backend)
    state = {key: value + 1e-4 for key, value in full.state_dict().items() if value.is_floating_point()}
    ft.load_fp32_state_dict(model, optimizer, {**full.state_dict(), **state})
    for name, value in ft.ema_state_dict(model, optimizer).items():
        if name in state and "running" not in name:
            assert_same_bits(value, state[name])


def test_an_average_of_another_shape_is_left_out(backend, device):
    model = network(torch.float16, device)
    optimizer = optimizer_of(model, backend)
    train(model, optimizer, 2)
    optimizer.state[model[0].bias]["ema_param"] = torch.ones(1, device=device)
    before = everything(model, optimizer)
    with ft.ema_weights(model, optimizer):
        assert_same_bits(model[0].bias.detach(), before[1])
    assert ft.ema_state_dict(model, optimizer)["0.bias"].shape == (4,)


def test_malformed_state_is_refused_by_name(backend, device):
    model = network(torch.float16, device)
    optimizer = optimizer_of(model, backend)
    train(model, optimizer, 2)
    optimizer.state["other"] = 5
    ft.ema_state_dict(model, optimizer)
    optimizer.state[model[0].bias]["ema_param"] = 3.0
    with pytest.raises(TypeError, match="the ema_param of parameter '0.bias' must be a tensor"):
        ft.ema_state_dict(model, optimizer)
