"""The training example goes on, after it was killed, as if nothing had happened."""

from __future__ import annotations

import functools
import multiprocessing.connection
import os
import random
import signal
import socket
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

pytest.importorskip("sklearn", reason="the example takes its smallest data set from scikit-learn")
pytest.importorskip("torchvision", reason="the example takes its networks from torchvision")
pytest.importorskip("tqdm", reason="the example shows its progress with tqdm")

import sklearn.datasets  # noqa: F401  # here, so that each process finds it imported

import train
from support import ranks
from support.comparison import assert_same_bits, assert_same_tree
from support.networks import Tiny

pytestmark = pytest.mark.slow

OPTIONS = ["--dataset", "digits", "--batch-size", "96", "--epochs", "2", "--device", "cpu", "--workers", "0"]
OPTIONS += ["--low-precision", "float16", "--checkpoint-every", "4", "--log-every", "4", "--ema", "0.9"]
STEPS = 28


@functools.cache
def launcher() -> ProcessPoolExecutor:
    """A process that has imported what takes seconds, and has done nothing else: it can be forked."""
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))


def launch(
    folder: Path, *options: str, meanwhile: Callable[[], Any] = int, killed_at: float = STEPS, count: int = 1
) -> list[int]:
    """Runs the example on the tiny network, in `count` processes; ends all of them as soon as one fails.

    Args:
        folder: gets what the example writes, and what it returned and printed in each process.
        *options: more of the command line.
        meanwhile: called in each process before it trains.
        killed_at: when to kill the first process: after that many steps, and in the step that follows if there is
            a fraction.
        count: how many processes.

    Returns:
        Their exit codes: `-SIGTERM` where another process failed first.
    """
    return launcher().submit(_fork, folder, options, meanwhile, killed_at, count).result()


def _fork(
    folder: Path, options: tuple[str, ...], meanwhile: Callable[[], Any], killed_at: float, count: int
) -> list[int]:
    context = multiprocessing.get_context("fork")
    progress = context.Value("i")
    with socket.create_server(("localhost", 0)) as server:
        port = str(server.getsockname()[1])
    processes = []
    for rank in range(count):
        environment = {
            "RANK": str(rank),
            "WORLD_SIZE": str(count),
            "MASTER_ADDR": "localhost",
            "MASTER_PORT": port,
        }
        process = context.Process(target=_run, args=(folder, options, meanwhile, progress, environment))
        process.start()
        processes.append(process)
    while progress.value < killed_at // 1 and all(process.is_alive() for process in processes):
        time.sleep(0.001)
    if killed_at < STEPS and all(process.is_alive() for process in processes):
        # A step takes some 20 ms.
        time.sleep(killed_at % 1 * 0.02)
        processes[0].kill()
    running = {process.sentinel: process for process in processes}
    while running:
        ended = multiprocessing.connection.wait(list(running), ranks.PATIENCE)
        done = [running.pop(sentinel) for sentinel in ended]
        for process in done:
            process.join()
        if not done or any(process.exitcode for process in done):
            for process in running.values():
                process.terminate()
                process.join()
            break
    return [process.exitcode for process in processes]


def _run(
    folder: Path,
    options: tuple[str, ...],
    meanwhile: Callable[[], Any],
    progress: Any,
    environment: dict[str, str],
) -> None:
    step = train.Trainer.train

    def step_and_tell(trainer: train.Trainer, *batch: Tensor) -> None:
        step(trainer, *batch)
        progress.value = trainer.step

    os.environ.update(environment)
    torch.set_num_threads(1)
    mock.patch.object(train.Trainer, "train", step_and_tell).start()
    mock.patch.object(train.models, "get_model", lambda name, num_classes: Tiny(num_classes)).start()
    meanwhile()
    rank = environment["RANK"]
    with open(folder / f"printed{rank}.txt", "w", encoding="utf-8") as printed:
        sys.stdout = sys.stderr = printed
        trained = train.main([*OPTIONS, "--output", str(folder), *options])
    torch.save(trained["weights"], folder / f"returned{rank}.pt")


def left_in(folder: Path) -> dict[str, Any]:
    """The weights, their averages, and the last checkpoint: masters, momentum, scale, counters, schedule."""
    names = ("weights", "weights_ema", "checkpoint")
    return {name: torch.load(folder / f"{name}.pt", weights_only=True) for name in names}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Returns the results of a run without an interruption."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    assert launch(folder) == [0]
    return left_in(folder)


def test_a_run_killed_twice_at_random_moments_ends_with_the_same_bits(tmp_path, uninterrupted):
    for moment in sorted(random.uniform(1, STEPS - 8) for _ in range(2)):
        print(f"killed after {moment:.2f} steps")
        assert launch(tmp_path, killed_at=moment) == [-signal.SIGKILL]
    assert launch(tmp_path) == [0]
    assert_same_tree(left_in(tmp_path), uninterrupted)
    (group,) = uninterrupted["checkpoint"]["optimizer"]["param_groups"]
    assert group["skipped_steps"] > 0, "this is to be about steps that overflow, too"


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_in_the_third_save(moment: str) -> None:
    save, replace, begun = torch.save, os.replace, []

    def save_or_die(content: Any, file: Any) -> None:
        begun.append(file)
        if moment == "while it writes" and len(begun) == 3:
            file.write(b"half a checkpoint")
            file.flush()
            die()
        save(content, file)

    def replace_or_die(source: Path, target: Path) -> None:
        if moment == "before it replaces" and len(begun) == 3:
            die()
        replace(source, target)
        if moment == "after it replaced" and len(begun) == 3:
            die()

    mock.patch("torch.save", save_or_die).start()
    mock.patch("os.replace", replace_or_die).start()


@pytest.mark.parametrize("moment", ["while it writes", "before it replaces", "after it replaced"])
def test_a_run_killed_in_a_save_ends_with_the_same_bits(tmp_path, moment, uninterrupted):
    dies = functools.partial(die_in_the_third_save, moment)
    assert launch(tmp_path, meanwhile=dies) == [-signal.SIGKILL]
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert saved["step"] == (12 if moment == "after it replaced" else 8)
    assert launch(tmp_path) == [0]
    assert_same_tree(left_in(tmp_path), uninterrupted)


def test_processes_that_load_images_change_nothing(tmp_path, uninterrupted):
    assert launch(tmp_path, "--workers", "2", killed_at=9.5) == [-signal.SIGKILL]
    assert launch(tmp_path, "--workers", "1") == [0]
    assert_same_tree(left_in(tmp_path), uninterrupted)


@pytest.mark.parametrize("count", [2, 3])
def test_a_run_of_several_processes_ends_with_the_same_bits_after_one_was_killed(tmp_path, count):
    options = ["--batch-size", str(96 // count), "--schedule", "step"]
    uninterrupted, resumed = tmp_path / "uninterrupted", tmp_path / "resumed"
    for folder in (uninterrupted, resumed):
        folder.mkdir()
    assert launch(uninterrupted, *options, count=count) == [0] * count
    assert launch(resumed, *options, count=count, killed_at=17.5)[0] == -signal.SIGKILL
    assert launch(resumed, *options, count=count) == [0] * count
    assert_same_tree(left_in(resumed), left_in(uninterrupted))
    # Of the running statistics each process has its own.
    learned = [name for name, _ in Tiny(10).named_parameters()]
    for rank in range(count):
        weights = torch.load(resumed / f"returned{rank}.pt", weights_only=True)
        for name in learned:
            assert_same_bits(weights[name], left_in(resumed)["weights"][name], f"{name} of process {rank}")


def die_as_the_second_or_hang() -> None:
    if os.environ["RANK"] == "1":
        die()
    while True:
        signal.pause()


def test_a_process_that_dies_ends_those_that_hang(tmp_path):
    codes = launch(tmp_path, meanwhile=die_as_the_second_or_hang, count=2)
    assert codes == [-signal.SIGTERM, -signal.SIGKILL]
