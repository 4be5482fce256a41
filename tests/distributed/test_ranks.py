"""The start of the distributed tests' processes, which is safe after CUDA has been initialised."""

from __future__ import annotations

import os
import signal
from unittest import mock

import pytest
import torch

from support import ranks

pytestmark = pytest.mark.slow


def own_rank() -> tuple[int, int]:
    return torch.distributed.get_rank(), os.getppid()


@pytest.mark.parametrize(("gpu", "expected"), [(True, "spawn"), (False, "forkserver")])
def test_nothing_forks_where_cuda_may_have_been_initialised(gpu: bool, expected: str) -> None:
    with mock.patch("torch.cuda.is_available", return_value=gpu):
        assert ranks.start_method() == expected


def test_spawned_processes_answer_as_forked_ones() -> None:
    with mock.patch.object(ranks, "start_method", return_value="spawn"):
        processes = ranks._Processes(2)
    assert processes.call(own_rank, (), {}) == [("", (rank, os.getpid())) for rank in range(2)]


def die_or_hang() -> None:
    if torch.distributed.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    while True:
        signal.pause()


def test_a_process_that_dies_ends_the_call_while_others_hang() -> None:
    with pytest.raises(AssertionError, match="rank 0: no answer\nrank 1: the process died"):
        ranks.run(2, die_or_hang)
