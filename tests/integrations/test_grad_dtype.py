"""`Tensor.grad_dtype`: gradients in another dtype than their parameters, as autograd and DTensors give them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn import Parameter

import fused_tricks as ft
from support import ranks
from support.comparison import assert_all_same_bits, assert_same_bits

OPTIONS = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-3}


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))


def batches(count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(32, 8, generator=generator) for _ in range(count)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_fp32_weights_train_from_gradients_that_autograd_keeps_in_16_bits(backend, device, dtype):
    model = network().to(device)
    for param in model.parameters():
        param.grad_dtype = dtype
    twin = copy.deepcopy(model)
    optimizer = ft.FusedSGD(model.parameters(), loss_scale=8.0, backend=backend, **OPTIONS)
    expected = ft.FusedSGD(twin.parameters(), loss_scale=8.0, backend="reference", **OPTIONS)
    for inputs in batches(4):
        optimizer.scale(model(inputs.to(device)).square().mean()).backward()
        for param, other in zip(model.parameters(), twin.parameters(), strict=True):
            assert param.grad.dtype == dtype
            other.grad_dtype = torch.float32
            other.grad = param.grad.float()
        optimizer.step()
        expected.step()
        optimizer.zero_grad()
    assert_all_same_bits(model.parameters(), twin.parameters())


def test_16_bit_weights_train_from_gradients_that_autograd_accumulates_in_fp32(backend, device):
    model = ft.cast_model(network(), torch.bfloat16).to(device)
    for param in model.parameters():
        param.grad_dtype = torch.float32
    optimizer = ft.FusedSGD(model.parameters(), backend=backend, **OPTIONS)
    for inputs in batches(4):
        for part in inputs.to(device).chunk(4):
            (model(part).square().mean() / 4).backward()
        assert {param.grad.dtype for param in model.parameters()} == {torch.float32}
        sums = [param.grad.clone() for param in model.parameters()]
        masters = [param.detach().float() for param in model.parameters()]
        optimizer.step()
        assert_all_same_bits([param.grad for param in model.parameters()], sums)
        optimizer.zero_grad()
        assert all(
            (optimizer.state[param]["master_param"] != master).any()
            for param, master in zip(model.parameters(), masters, strict=True)
        )


def step_of_shards() -> None:
    mesh = init_device_mesh("cpu", (2,))
    values, grads = torch.linspace(-1, 1, 30), torch.linspace(-3, 5, 30).bfloat16()
    param = Parameter(distribute_tensor(values.clone(), mesh, [Shard(0)]))
    expected = Parameter(values.clone())
    optimizers = [ft.FusedSGD([each], lr=0.5, momentum=0.9, loss_scale=2.0) for each in (param, expected)]
    param.grad_dtype = torch.bfloat16
    for _ in range(3):
        param.grad = distribute_tensor(grads.clone(), mesh, [Shard(0)])
        expected.grad = grads.float()
        for optimizer in optimizers:
            optimizer.step()
    assert_same_bits(param.detach().full_tensor(), expected.detach())


@pytest.mark.slow
def test_dtensors_may_have_gradients_of_another_dtype():
    ranks.run(2, step_of_shards)
