"""The averages of weights that FSDP2 shards: the same values as of whole weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from fused_tricks import FusedSGD, ema_state_dict, ema_weights
from support import ranks
from support.comparison import assert_all_same_bits, assert_same_bits
from support.products import Products, inputs_of

pytestmark = pytest.mark.slow

OPTIONS = {"lr": 0.1, "momentum": 0.9, "ema_decay": 0.5, "loss_scale": 4.0}


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def evaluate_with_averages() -> None:
    torch.manual_seed(0)
    model, plain = Products(torch.float16), Products(torch.float16)
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    optimizer, expected = (FusedSGD(m.parameters(), **OPTIONS) for m in (model, plain))
    for step in (1, 2, 4, 5):
        for network, of in ((model, optimizer), (plain, expected)):
            of.scale(network(inputs_of(0, step))).backward()
            of.step()
            of.zero_grad()
        before = [whole(param.detach()).clone() for param in model.parameters()]
        with ema_weights(model, optimizer), ema_weights(plain, expected), torch.no_grad():
            assert_all_same_bits([whole(param) for param in model.parameters()], plain.parameters())
            assert_same_bits(model(inputs_of(0, step)), plain(inputs_of(0, step)))
        assert_all_same_bits([whole(param.detach()) for param in model.parameters()], before)
        averages = ema_state_dict(model, optimizer)
        assert_all_same_bits(map(whole, averages.values()), ema_state_dict(plain, expected).values())
        assert_all_same_bits([whole(param.detach()) for param in model.parameters()], plain.parameters())


def test_averages_are_exported_and_evaluated_while_fsdp_trains():
    ranks.run(2, evaluate_with_averages)
