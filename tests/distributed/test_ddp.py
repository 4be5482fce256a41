"""DistributedDataParallel with FusedSGD: every process takes the same decision and has the same weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Module, Parameter
from torch.nn.parallel import DistributedDataParallel

from fused_tricks import DynamicLossScale, FusedSGD
from support import ranks
from support.comparison import assert_all_same_bits
from support.products import OPTIONS, Products, inputs_of, mean_of, with_overflow

pytestmark = pytest.mark.slow

OVERFLOWS = (0, 3)
STEPS = 6


def inputs_in(step: int, rank: int | None = None) -> list[Tensor]:
    """Returns the inputs of a process, by default of this one. In some steps, the inputs of rank 0 overflow."""
    rank = dist.get_rank() if rank is None else rank
    inputs = inputs_of(rank, step)
    return with_overflow(inputs) if rank == 0 and step in OVERFLOWS else inputs


def whole_inputs(step: int) -> list[Tensor]:
    return mean_of([inputs_in(step, rank) for rank in range(dist.get_world_size())])


def optimizer_of(model: Module, backend: str = "cpu", **options: Any) -> FusedSGD:
    scale = DynamicLossScale(init_scale=64.0, growth_interval=2)
    return FusedSGD(model.parameters(), loss_scale=scale, backend=backend, **OPTIONS, **options)


def assert_same_everywhere(model: Module) -> None:
    for param in model.parameters():
        everywhere = [torch.empty_like(param) for _ in range(dist.get_world_size())]
        dist.all_gather(everywhere, param.detach())
        assert_all_same_bits(everywhere, [param] * len(everywhere))


def averages_of(optimizer: FusedSGD) -> list[Tensor]:
    return [optimizer.state[param]["ema_param"] for param in optimizer.param_groups[0]["params"]]


def train(backend: str, dtype: torch.dtype, options: dict[str, Any]) -> None:
    """Trains on several processes, and compares every step with one process that has the whole batch."""
    model, alone = Products(dtype), Products(dtype)
    replica = DistributedDataParallel(model, **options)
    optimizer, expected = optimizer_of(model, backend), optimizer_of(alone, "reference")
    for step in range(STEPS):
        for of, network, inputs in (
            (optimizer, replica, inputs_in(step)),
            (expected, alone, whole_inputs(step)),
        ):
            of.zero_grad()
            of.scale(network(inputs)).backward()
            of.step()
        assert_all_same_bits(model.parameters(), alone.parameters())
        if expected.stats().applied_steps:
            assert_all_same_bits(averages_of(optimizer), averages_of(expected))
        assert optimizer.stats() == expected.stats()
    assert optimizer.stats().skipped_steps == len(OVERFLOWS)
    assert_same_everywhere(model)


def test_an_overflow_on_one_process_skips_the_step_on_all(backend):
    ranks.run(2, train, backend, torch.float16, {})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_four_processes_train_as_one_does(dtype):
    ranks.run(4, train, "cpu", dtype, {"gradient_as_bucket_view": True})


def accumulate(max_norm: float | None) -> None:
    model, alone = Products(torch.float16), Products(torch.float16)
    replica = DistributedDataParallel(model)
    optimizer, expected = (optimizer_of(m, max_grad_norm=max_norm) for m in (model, alone))
    for step in range(0, 2 * STEPS, 2):
        for of in (optimizer, expected):
            of.zero_grad()
        with replica.no_sync():
            optimizer.scale(replica(inputs_in(step))).backward()
        optimizer.scale(replica(inputs_in(step + 1))).backward()
        for of_step in (step, step + 1):
            expected.scale(alone(whole_inputs(of_step))).backward()
        for of in (optimizer, expected):
            of.step()
        assert_all_same_bits(model.parameters(), alone.parameters())
        if expected.stats().applied_steps:
            assert_all_same_bits(averages_of(optimizer), averages_of(expected))
        assert optimizer.stats() == expected.stats()
    assert optimizer.stats().skipped_steps == len(OVERFLOWS)
    assert_same_everywhere(model)


@pytest.mark.parametrize("max_norm", [None, 2.0])
def test_gradients_accumulate_without_synchronisation(max_norm):
    """An overflow in the micro-batch without synchronisation also counts."""
    ranks.run(2, accumulate, max_norm)


class Branches(Module):
    """A model whose parameter `own[rank]` is used by one process from the second step on, and `unused` by none."""

    def __init__(self) -> None:
        super().__init__()
        self.own = torch.nn.ParameterList(torch.ones(3) for _ in range(2))
        self.shared = Parameter(torch.ones(3))
        self.unused = Parameter(torch.ones(3))

    def forward(self, inputs: Tensor, step: int) -> Tensor:
        total = (self.shared * inputs).sum()
        return total + (self.own[dist.get_rank()] * inputs).sum() if step else total


def train_branches() -> None:
    model = Branches()
    replica = DistributedDataParallel(model, find_unused_parameters=True)
    optimizer = FusedSGD(model.parameters(), lr=0.5, momentum=0.5, dampening=0.5, loss_scale=8.0)
    for step in range(3):
        optimizer.zero_grad()
        optimizer.scale(replica(torch.full((3,), 2.0), step)).backward()
        optimizer.step()
    assert_same_everywhere(model)
    # The gradients and the momentum of `shared` are 2 in three steps. Those of `own` are 1 in two steps, because one
    # process of two contributes.
    assert model.shared.tolist() == [-2.0] * 3
    assert [own.tolist() for own in model.own] == [[0.0] * 3] * 2
    assert model.unused.tolist() == [1.0] * 3
    assert model.unused not in optimizer.state


def test_a_parameter_that_one_process_does_not_use_is_updated_on_both_and_one_that_none_uses_on_neither():
    ranks.run(2, train_branches)
