"""Functions that run on several processes with a process group (gloo), as under torchrun."""

from __future__ import annotations

import atexit
import functools
import io
import multiprocessing
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed.checkpoint
import torch.distributed.fsdp
import torch.distributed.optim
import torch.distributed.tensor

from support import backends  # noqa: F401  # so that each process has it imported

PATIENCE = 3600
"""Seconds until a process counts as hanging, more than any busy machine requires. A process that ends is noticed at
once."""


def run(count: int, body: Callable[..., Any], *args: Any, **options: Any) -> list[Any]:
    """Calls `body(*args, **options)` on `count` processes, which stay alive for the next call.

    Args:
        count: The number of processes.
        body: A function of a module.
        *args, **options: The arguments of `body`. Arguments and results must be picklable.

    Returns:
        The result of each process, in the order of the ranks.

    Raises:
        AssertionError: If a process failed. The message contains the traceback.
    """
    answers = _processes(count).call(body, args, options)
    failed = [f"rank {rank}: {text}" for rank, (text, _) in enumerate(answers) if text]
    if failed:
        # The other processes may wait for the failed process.
        _processes.cache_clear()
        raise AssertionError("\n".join(failed))
    return [value for _, value in answers]


@functools.cache
def _processes(count: int) -> _Processes:
    return _Processes(count)


# Before Python unloads the modules that `__del__` uses.
atexit.register(_processes.cache_clear)


def start_method() -> str:
    """Returns the start method: a fork of a process that has imported torch saves seconds.

    With a GPU, the import calls CUDA, and CUDA does not survive a fork.
    """
    return "spawn" if torch.cuda.is_available() else "forkserver"


class _Processes:
    """Processes that wait for calls."""

    def __init__(self, count: int) -> None:
        context = multiprocessing.get_context(start_method())
        # The first use of FSDP2 imports torch._dynamo.
        context.set_forkserver_preload(["support.ranks", "torch._dynamo"])
        paths = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])
        self._folder = tempfile.TemporaryDirectory()
        self._connections = []
        self._processes = []
        with mock.patch.dict(os.environ, PYTHONPATH=paths):
            for rank in range(count):
                ours, theirs = context.Pipe()
                process = context.Process(
                    target=_serve, args=(rank, count, self._folder.name, theirs), daemon=True
                )
                process.start()
                theirs.close()
                self._connections.append(ours)
                self._processes.append(process)

    def call(self, *call: Any) -> list[tuple[str, Any]]:
        """Returns the error and the result of each process."""
        for connection in self._connections:
            connection.send_bytes(_packed(call))
        answers: dict[Any, tuple[str, Any]] = {}
        patience = PATIENCE
        while waiting := [connection for connection in self._connections if connection not in answers]:
            ready: list[Any] = multiprocessing.connection.wait(waiting, patience)
            for connection in ready or waiting:
                answers[connection] = _answer(connection) if ready else ("no answer", None)
                if answers[connection][0]:
                    patience = 2
        return [answers[connection] for connection in self._connections]

    def __del__(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()


def _serve(rank: int, count: int, folder: str, connection: Connection) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=count,
        timeout=timedelta(seconds=PATIENCE),
    )
    while True:
        body, args, options = _unpacked(connection.recv_bytes())
        try:
            answer = ("", body(*args, **options))
        except BaseException:
            answer = (traceback.format_exc(), None)
        connection.send_bytes(_packed(answer))


def _answer(connection: Any) -> tuple[str, Any]:
    try:
        answer: tuple[str, Any] = _unpacked(connection.recv_bytes())
        return answer
    except EOFError:
        return "the process died", None


def _packed(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _unpacked(packed: bytes) -> Any:
    return torch.load(io.BytesIO(packed), weights_only=False)
