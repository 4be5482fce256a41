"""`cast_model` and `load_fp32_state_dict` over processes: DistributedDataParallel and FSDP2, two ranks over gloo."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fused_tricks import FusedSGD, cast_model, fp32_state_dict, load_fp32_state_dict
from support import ranks
from support.comparison import assert_same_bits

pytestmark = pytest.mark.slow

RANKS = 2


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(64, 2)
    )


def images(rank: int) -> Tensor:
    return torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(rank))


def gradients(model: nn.Module, rank: int) -> dict[str, Tensor]:
    model.zero_grad()
    model(images(rank)).square().sum().backward()
    return {name.removeprefix("module."): param.grad for name, param in model.named_parameters()}


def replicated() -> dict[str, Any]:
    """Returns gradients of this rank alone and of the replicas, after a refused conversion and after loading."""
    rank = torch.distributed.get_rank()
    model = cast_model(network(0), torch.bfloat16)
    alone = copy.deepcopy(model)
    wrapped = nn.parallel.DistributedDataParallel(model)
    with pytest.raises(ValueError, match="model is wrapped in DistributedDataParallel"):
        cast_model(wrapped, torch.float16)
    optimizer = FusedSGD(wrapped.parameters(), lr=0.0)
    result: dict[str, Any] = {"before": (gradients(alone, rank), gradients(wrapped, rank))}
    checkpoint = network(1).state_dict()
    load_fp32_state_dict(wrapped, optimizer, {f"module.{name}": t for name, t in checkpoint.items()})
    alone.load_state_dict(checkpoint)
    result["after"] = (gradients(alone, rank), gradients(wrapped, rank))
    optimizer.step()
    result["export"] = (fp32_state_dict(wrapped, optimizer), checkpoint)
    return result


def sharded() -> dict[str, Any]:
    """Exports whole weights from FSDP2 while the outermost module has its parameters gathered."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor, distribute_tensor

    torch.manual_seed(1)
    source = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    model = cast_model(copy.deepcopy(source), torch.bfloat16)
    mesh = init_device_mesh("cpu", (RANKS,))
    fully_shard(model[0], mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = FusedSGD(model.parameters(), lr=0.1)
    shards = {name: param.placements for name, param in model.named_parameters()}
    state = {name: distribute_tensor(t, mesh, shards[name]) for name, t in source.state_dict().items()}
    load_fp32_state_dict(model, optimizer, state)
    model(torch.ones(1, 4))
    export = fp32_state_dict(model, optimizer)
    assert all(isinstance(tensor, DTensor) for tensor in export.values())
    return {name: (tensor.full_tensor(), source.state_dict()[name]) for name, tensor in export.items()}


@pytest.fixture(scope="module")
def replicas() -> list[Any]:
    return ranks.run(RANKS, replicated)


@pytest.mark.parametrize("when", ["before", "after"], ids=["not loaded", "loaded"])
def test_gradients_are_the_mean_over_the_ranks_in_each_parameters_dtype(
    replicas: list[Any], when: str
) -> None:
    (alone, synced), (other_alone, other_synced) = (replica[when] for replica in replicas)
    assert {grad.dtype for grad in synced.values()} == {torch.bfloat16, torch.float32}
    for name, grad in synced.items():
        assert_same_bits(grad, alone[name] / 2 + other_alone[name] / 2, name)
        assert_same_bits(grad, other_synced[name], name)


def test_a_checkpoint_loaded_into_the_wrapped_model_is_that_of_every_rank(replicas: list[Any]) -> None:
    for replica in replicas:
        export, checkpoint = replica["export"]
        assert list(export) == [f"module.{name}" for name in checkpoint]
        for name in ("0.weight", "0.bias", "1.weight", "2.weight", "4.weight"):
            assert_same_bits(export[f"module.{name}"], checkpoint[name], name)


def test_an_export_of_a_sharded_model_has_its_masters_also_while_weights_are_gathered() -> None:
    for export in ranks.run(RANKS, sharded):
        for name, (whole, expected) in export.items():
            assert_same_bits(whole, expected, name)
