"""Parameters sharded over processes (DTensor, as FSDP2 makes them) are updated as the whole ones would be."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fused_tricks import FusedSGD

WEIGHTS = torch.arange(8.0).view(4, 2)
GRADIENT = torch.tensor([[3.0, 0.0], [0.0, 0.0], [0.0, 4.0], [0.0, 0.0]])
RANKS = 2


def step_sharded(rank: int, folder: str) -> None:
    """One rank: a good step over shards of `WEIGHTS`, and one with an overflow in the last rank's shard."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS
    )
    mesh = init_device_mesh("cpu", (RANKS,))
    param = torch.nn.Parameter(distribute_tensor(WEIGHTS.clone(), mesh, [Shard(0)]))
    optimizer = FusedSGD([param], lr=1.0, max_grad_norm=1.0)
    results = []
    for overflows in (False, True):
        param.grad = distribute_tensor(GRADIENT.clone(), mesh, [Shard(0)])
        if overflows and rank == RANKS - 1:
            param.grad.to_local()[0, 0] = torch.inf
        optimizer.step()
        results.append((param.full_tensor().detach(), optimizer.stats()))
    torch.save(results, f"{folder}/{rank}.result")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """For each rank the weights and statistics after either step."""
    if not torch.distributed.is_available():
        pytest.skip("torch was built without distributed")
    folder = tmp_path_factory.mktemp("ranks")
    paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    call = "import sys, test_sharded as t; t.step_sharded(int(sys.argv[1]), sys.argv[2])"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", call, str(rank), str(folder)],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        )
        for rank in range(RANKS)
    ]
    try:
        assert [process.wait(timeout=120) for process in processes] == [0] * RANKS
    finally:
        for process in processes:
            process.kill()
    return [torch.load(folder / f"{rank}.result", weights_only=False) for rank in range(RANKS)]


def test_sharded_gradients_are_clipped_by_the_norm_of_the_whole(ranks: list[Any]) -> None:
    expected = torch.nn.Parameter(WEIGHTS.clone())
    expected.grad = GRADIENT.clone()
    FusedSGD([expected], lr=1.0, max_grad_norm=1.0, backend="reference").step()
    for (weights, stats), _ in ranks:
        assert stats.grad_norm == 5.0
        assert torch.equal(weights, expected)


def test_an_overflow_in_one_shard_skips_the_step_on_every_rank(ranks: list[Any]) -> None:
    for (before, _), (after, stats) in ranks:
        assert stats.skipped_steps == 1
        assert torch.equal(after, before)
