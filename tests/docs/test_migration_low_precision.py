"""docs/migration.md: the rows of its tables about models in low precision."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import fused_tricks as ft
from fused_tricks import FusedSGD
from support.comparison import assert_all_same_bits, assert_same_bits, set_gradients
from support.networks import Network


def trained_in_fp16() -> tuple[nn.Module, FusedSGD]:
    model = ft.cast_model(Network(), torch.float16)
    optimizer = FusedSGD(model.parameters(), lr=0.1, momentum=0.9, loss_scale=128.0)
    for _ in range(3):
        optimizer.zero_grad()
        optimizer.scale(model(torch.randn(4, 6)).square().mean()).backward()
        optimizer.step()
    return model, optimizer


def test_fp32_weights_are_exported_from_the_masters() -> None:
    model, optimizer = trained_in_fp16()
    weight = model.fc.weight
    assert model.state_dict()["fc.weight"].dtype == torch.float16
    exported = ft.fp32_state_dict(model, optimizer)["fc.weight"]
    assert_same_bits(exported, optimizer.state[weight]["master_param"])
    assert not torch.equal(exported, weight.float())


def test_the_norms_that_o2_keeps_can_be_kept() -> None:
    def dtypes(**options: Any) -> list[torch.dtype]:
        model = nn.Sequential(nn.BatchNorm1d(4), nn.LayerNorm(4), nn.Linear(4, 4))
        return [layer.weight.dtype for layer in ft.cast_model(model, **options)]

    assert dtypes() == [torch.float32, torch.float32, torch.float16]
    o2 = dtypes(keep_fp32=nn.modules.batchnorm._BatchNorm)
    assert o2 == [torch.float32, torch.float16, torch.float16]


def test_fp32_weights_with_a_missing_key_are_refused() -> None:
    model, optimizer = trained_in_fp16()
    state = ft.fp32_state_dict(model, optimizer)
    del state["fc.bias"]
    with pytest.raises(RuntimeError, match="Missing key.*fc.bias"):
        ft.load_fp32_state_dict(model, optimizer, state)


def test_cast_model_casts_what_comes_in_and_goes_out() -> None:
    model = Network()
    assert ft.cast_model(model) is model
    seen = []
    model.body.register_forward_hook(lambda module, args, output: seen.append((args[0].dtype, output.dtype)))
    assert model(torch.ones(2, 6)).dtype == torch.float32
    assert seen == [(torch.float16, torch.float16)]


def test_a_cast_model_evaluates_after_float() -> None:
    model = ft.cast_model(Network(), torch.bfloat16).float().eval()
    plain = Network().eval()
    plain.load_state_dict(model.state_dict())
    images = torch.randn(4, 6)
    assert_same_bits(model(images), plain(images))


def test_an_average_of_16_bit_weights_stagnates_and_one_of_fp32_weights_does_not() -> None:
    model = ft.cast_model(nn.Linear(8, 8, bias=False), torch.float16)
    optimizer = FusedSGD(model.parameters(), lr=0.1, ema_decay=0.9999)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9999))
    begun: list[torch.Tensor] = []
    for step in range(21):
        set_gradients([model.weight], [torch.full((8, 8), 0.01).half()])
        optimizer.step()
        average.update_parameters(model)
        averages = [average.module.weight, ft.ema_state_dict(model, optimizer)["weight"]]
        if step == 0:  # the first update copies
            begun = [weight.detach().clone() for weight in averages]
    stayed = [(a == b).float().mean().item() for a, b in zip(averages, begun, strict=True)]
    assert stayed[0] > 0.9
    assert stayed[1] == 0


@pytest.mark.parametrize("mixed", [False, True])
def test_a_group_of_biases_that_states_its_decay_decays(backend, device, mixed):
    model = Network().to(device)
    reference = deepcopy(model).cpu()

    def groups(of: nn.Module) -> list[dict[str, Any]]:
        apart = [p for p in of.parameters() if p.dim() <= 1]
        weights = [p for p in of.parameters() if p.dim() > 1]
        return (
            [{"params": [*weights, *apart], "weight_decay": 0.1}]
            if mixed
            else [{"params": weights, "weight_decay": 0.1}, {"params": apart, "weight_decay": 0.01}]
        )

    optimizer = FusedSGD(groups(model), lr=0.1, backend=backend)
    expected = torch.optim.SGD(groups(reference), lr=0.1, foreach=False)
    if mixed:
        expected = torch.optim.SGD(ft.decay_groups(reference, 0.1), lr=0.1, foreach=False)
    for one, params in ((optimizer, model.parameters()), (expected, reference.parameters())):
        listed = list(params)
        set_gradients(listed, [torch.full_like(p, 0.5, device="cpu") for p in listed])
        one.step()
    assert_all_same_bits([p.cpu() for p in model.parameters()], reference.parameters())
