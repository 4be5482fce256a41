"""The training example with `--cuda-graph` trains as without it, and refuses what a graph cannot do."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("sklearn", reason="the example takes its smallest data set from scikit-learn")
pytest.importorskip("torchvision", reason="the example takes its networks from torchvision")
pytest.importorskip("tqdm", reason="the example shows its progress with tqdm")

import train
from cuda_graph import WARMUP, CapturedStep, NotCapturable
from fused_tricks import FusedSGD
from support import emulation, recorded_graph
from support.comparison import assert_same_tree
from support.networks import Tiny

pytestmark = pytest.mark.slow

ON_A_GPU = ["--dataset", "digits", "--device", "cuda", "--workers", "0"]
OPTIONS = [*ON_A_GPU, "--batch-size", "96", "--epochs", "2", "--ema", "0.9", "--max-grad-norm", "2"]


@pytest.fixture
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPU tensors on a fake GPU whose graphs are recorded, with the emulated kernels."""
    if reason := emulation.unusable_because():
        pytest.skip(f"backend emulated_cuda: {reason}")
    parse = train.parse

    def on_the_cpu(arguments: list[str]) -> Any:
        with mock.patch("torch.cuda.is_available", return_value=True):
            options = parse(arguments)
        options.device = "cpu"
        return options

    recorded_graph.install(monkeypatch)
    monkeypatch.setattr(train, "parse", on_the_cpu)
    monkeypatch.setattr(train.ft, "FusedSGD", functools.partial(FusedSGD, backend="emulated_cuda"))
    monkeypatch.setattr(train.models, "get_model", lambda name, num_classes: Tiny(num_classes))


def checkpoint(folder: Path) -> dict[str, Any]:
    saved = torch.load(folder / "checkpoint.pt", weights_only=True)
    del saved["settings"]
    return saved


def test_replayed_steps_are_those_of_a_training_without_a_graph(tmp_path: Path, fake_gpu: None) -> None:
    graph, without = tmp_path / "graph", tmp_path / "without"
    trained = train.main([*OPTIONS, "--cuda-graph", "--output", str(graph)])
    assert_same_tree(trained, train.main([*OPTIONS, "--output", str(without)]))
    assert_same_tree(checkpoint(graph), checkpoint(without))
    (group,) = checkpoint(graph)["optimizer"]["param_groups"]
    assert 0 < group["skipped_steps"] < 25 and group["applied_steps"] == 28 - group["skipped_steps"]


def test_a_run_that_was_killed_resumes_with_a_graph_of_its_own(tmp_path: Path, fake_gpu: None) -> None:
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    command = [*OPTIONS, "--cuda-graph", "--checkpoint-every", "4", "--output"]
    step = train.Trainer.train

    def step_or_die(trainer: train.Trainer, *batch: Tensor) -> None:
        if trainer.step == 18:
            raise KeyboardInterrupt
        step(trainer, *batch)

    with mock.patch.object(train.Trainer, "train", step_or_die), pytest.raises(KeyboardInterrupt):
        train.main([*command, str(resumed)])
    assert_same_tree(train.main([*command, str(resumed)]), train.main([*command, str(whole)]))
    assert_same_tree(checkpoint(resumed), checkpoint(whole))


class ReadsANumber(Tiny):
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images) * float(images.mean() > -1e9)


def test_a_model_that_reads_a_number_on_the_host_is_refused(
    tmp_path: Path, fake_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train.models, "get_model", lambda name, num_classes: ReadsANumber(num_classes))
    refused = "--cuda-graph: the training step of resnet18 cannot be captured: operation not permitted when"
    with pytest.raises(SystemExit, match=refused):
        train.main([*OPTIONS, "--cuda-graph", "--output", str(tmp_path)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "cpu"], "--cuda-graph requires a GPU, and --device cuda"),
        (["--schedule", "step"], "--cuda-graph requires another --schedule: the graph would keep the rate"),
    ],
    ids=str,
)
def test_what_a_graph_cannot_do_is_refused(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with mock.patch("torch.cuda.is_available", return_value=True), pytest.raises(SystemExit):
        train.parse([*ON_A_GPU, "--cuda-graph", *arguments])
    assert message in capsys.readouterr().err


def test_several_processes_are_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with mock.patch("torch.cuda.is_available", return_value=True), pytest.raises(SystemExit):
        train.parse([*ON_A_GPU, "--cuda-graph"])
    assert "--cuda-graph requires a single process, without torchrun" in capsys.readouterr().err


def test_a_batch_of_another_shape_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    recorded_graph.install(monkeypatch)
    step = CapturedStep(lambda images: images.sum())
    for _ in range(WARMUP + 1):
        assert step(torch.ones(2, 3)) == 6
    with pytest.raises(NotCapturable, match=r"a batch has the shape \[1, 3\], and the graph has \[2, 3\]"):
        step(torch.ones(1, 3))


def test_the_reason_is_the_error_in_the_step_and_not_the_one_at_the_end_of_the_capture(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recorded_graph.install(monkeypatch)

    @contextlib.contextmanager
    def capture(graph: object) -> Iterator[None]:
        try:
            yield
        finally:
            raise RuntimeError("capture failed due to a previous error\nCompile with TORCH_USE_CUDA_DSA")

    monkeypatch.setattr(torch.cuda, "graph", capture)
    calls = []

    def fails_in_the_capture() -> Tensor:
        calls.append(1)
        if len(calls) > WARMUP:
            raise RuntimeError("operation not permitted\nFor debugging consider CUDA_LAUNCH_BLOCKING=1")
        return torch.zeros(())

    step = CapturedStep(fails_in_the_capture)
    for _ in range(WARMUP):
        step()
    with pytest.raises(NotCapturable, match="^operation not permitted$"):
        step()


def test_a_replay_reads_the_new_batch_and_its_loss_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    recorded_graph.install(monkeypatch)
    step = CapturedStep(lambda images: images.sum())
    losses = [step(torch.full((2, 3), float(value))) for value in range(7)]
    assert [loss.item() for loss in losses] == [6.0 * value for value in range(7)]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_a_gpu_trains_with_a_graph_as_without_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    def tiny(name: str, num_classes: int) -> nn.Module:
        return Tiny(num_classes)

    monkeypatch.setattr(train.models, "get_model", tiny)
    graph, without = tmp_path / "graph", tmp_path / "without"
    command = [*OPTIONS, "--low-precision", precision, "--output"]
    trained = train.main([*command, str(graph), "--cuda-graph"])
    assert_same_tree(trained, train.main([*command, str(without)]))
    assert_same_tree(checkpoint(graph), checkpoint(without))
