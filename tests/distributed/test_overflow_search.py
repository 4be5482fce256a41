"""find_overflow() searches the elements of its own process, and does not communicate."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn import Parameter

from fused_tricks import FusedSGD
from support import ranks

pytestmark = pytest.mark.slow


def search_own_elements() -> list[str]:
    """The last element of the divided parameter overflows, which the last process has. Process 0 searches alone."""
    mesh = init_device_mesh("cpu", (2,))
    divided, plain = Parameter(distribute_tensor(torch.zeros(4), mesh, [Shard(0)])), Parameter(torch.zeros(2))
    optimizer = FusedSGD([("divided", divided), ("plain", plain)], lr=0.1, loss_scale="dynamic")
    divided.grad = distribute_tensor(torch.tensor([1.0, 1.0, 1.0, torch.inf]), mesh, [Shard(0)])
    plain.grad = torch.ones(2)
    optimizer.step()
    assert optimizer.stats().last_step_skipped
    if dist.get_rank() == 0:
        for _ in range(3):
            assert optimizer.find_overflow() == []
    dist.barrier()
    return optimizer.find_overflow()


def test_an_overflow_is_named_by_the_process_that_has_the_element():
    assert ranks.run(2, search_own_elements) == [[], ["divided"]]


def search_uneven_parts() -> list[str]:
    mesh = init_device_mesh("cpu", (2,))
    param = Parameter(distribute_tensor(torch.zeros(1), mesh, [Shard(0)]))
    param.grad = distribute_tensor(torch.full((1,), torch.nan), mesh, [Shard(0)])
    return FusedSGD([param], lr=0.1).find_overflow()


def test_a_process_without_elements_names_no_overflow():
    assert ranks.run(2, search_uneven_parts) == [["parameter 0 of group 0"], []]


def search_own_partition() -> list[str]:
    """The gradients of process 1 overflow, and the partition skips the step in both processes."""
    param = Parameter(torch.zeros(2))
    optimizer = FusedSGD([("weight", param)], lr=0.1, loss_scale="dynamic", partition_group=dist.group.WORLD)
    optimizer.scale(torch.ones(()))
    param.grad = torch.full((2,), torch.inf if dist.get_rank() else 1.0)
    optimizer.step()
    assert optimizer.stats().last_step_skipped
    return optimizer.find_overflow()


def test_an_overflow_is_named_by_the_process_that_has_the_parameter():
    assert ranks.run(2, search_own_partition) == [[], ["weight"]]
