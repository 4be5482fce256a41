"""FSDP1 (FullyShardedDataParallel), which flattens and divides parameters: refused where training would be wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn import LayerNorm, Linear, Module, ReLU, Sequential

from fused_tricks import DynamicLossScale, FusedSGD
from support import ranks
from support.comparison import assert_all_same_bits

pytestmark = pytest.mark.slow

OPTIONS: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-2, "bias_decay": True}
ORIGINAL = pytest.mark.parametrize("original", [True, False], ids=["original parameters", "flat parameters"])


def network(original: bool) -> Module:
    torch.manual_seed(0)
    layers = Sequential(Linear(6, 9), LayerNorm(9), ReLU(), Linear(9, 3))
    return FullyShardedDataParallel(layers, use_orig_params=original, device_id=torch.device("cpu"))


def train(optimizer: torch.optim.Optimizer, model: Module, scale: Any, overflow_in: int) -> None:
    """Takes six steps. In the step `overflow_in`, a gradient of the last process alone is infinite."""
    for step in range(6):
        optimizer.zero_grad()
        generator = torch.Generator().manual_seed(10 * step + dist.get_rank())
        scale(model(torch.randn(8, 6, generator=generator)).square().mean()).backward()
        grads = [p.grad for p in model.parameters() if p.grad is not None and p.grad.numel()]
        if step == overflow_in and dist.get_rank() == dist.get_world_size() - 1:
            grads[-1].view(-1)[0] = torch.inf
        if step != overflow_in or isinstance(optimizer, FusedSGD):
            optimizer.step()


def weights(model: Module) -> list[Tensor]:
    return [p.detach() for p in model.parameters()]


def compare_with_sgd(original: bool) -> None:
    ours, theirs = network(original), network(original)
    scale = DynamicLossScale(init_scale=64.0)
    optimizer = FusedSGD(ours.parameters(), **OPTIONS, loss_scale=scale, partition_group=dist.group.WORLD)
    train(optimizer, ours, optimizer.scale, overflow_in=2)
    options = {key: value for key, value in OPTIONS.items() if key != "bias_decay"}
    sgd = torch.optim.SGD(theirs.parameters(), **options, foreach=False)
    train(sgd, theirs, lambda loss: loss, overflow_in=2)
    assert (optimizer.stats().skipped_steps, optimizer.stats().scale) == (1, 32.0)
    assert_all_same_bits(weights(ours), weights(theirs))


@ORIGINAL
def test_processes_with_a_partition_group_skip_together_and_train_as_torchs_sgd(original):
    ranks.run(2, compare_with_sgd, original)


def refuse(original: bool) -> None:
    model = network(original)
    refused = [
        ({"weight_decay": 0.1}, "which makes weights look like biases"),
        ({"loss_scale": "dynamic"}, "each process would skip or clip by its own part"),
        ({"max_grad_norm": 1.0}, "each process would skip or clip by its own part"),
    ]
    for options, message in refused:
        with pytest.raises(ValueError, match=f"parameter 0 of group 0 was .* by FSDP1.*{message}"):
            FusedSGD(model.parameters(), **options)


@ORIGINAL
def test_what_would_train_wrongly_is_refused(original):
    ranks.run(2, refuse, original)


def refuse_a_late_group() -> None:
    model = network(True)
    first, *others = model.parameters()
    optimizer = FusedSGD([first], lr=0.1)
    with pytest.raises(ValueError, match="parameter 0 of group 1"):
        optimizer.add_param_group({"params": others, "weight_decay": 0.1})
    assert len(optimizer.param_groups) == 1


def test_a_late_group_is_refused_alike_and_not_added():
    ranks.run(2, refuse_a_late_group)
