"""docs/cuda_graphs.md: its code trains as without a graph, on a GPU and on a fake one."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fused_tricks as ft
from support import emulation, recorded_graph
from support.comparison import assert_all_same_bits, assert_same_bits
from support.networks import Tiny

PAGE = (Path(__file__).parents[2] / "docs" / "cuda_graphs.md").read_text(encoding="utf-8")
STEPS = 16


def batches(device: str) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(8, 3, 32, 32, generator=generator), torch.randint(10, (8,), generator=generator))
        for _ in range(STEPS)
    ]


def trained(device: str, backend: str, graph: bool) -> dict[str, Any]:
    """The names of the page's code after a run, which takes every step as a warm-up where there is no graph."""
    (code,) = re.findall(r"^```python\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)
    assert code.count('device = "cuda"') == 1 and code.count("number < 3:") == 1
    code = code.replace('device = "cuda"', f"device = {device!r}")
    if not graph:
        code = code.replace("number < 3:", "True:")
    torch.manual_seed(0)
    model = Tiny(10)
    model.head[1].p = 0.0
    names: dict[str, Any] = {
        "torch": torch,
        "ft": SimpleNamespace(
            **{name: getattr(ft, name) for name in ft.__all__ if name != "FusedSGD"},
            FusedSGD=functools.partial(ft.FusedSGD, backend=backend),
        ),
        "model": model,
        "criterion": nn.functional.cross_entropy,
        "loader": batches(device),
        "total_steps": STEPS,
        "warmup_steps": 3,
        "evaluate": lambda model: [param.detach().clone() for param in model.parameters()],
    }
    exec(compile(code, "docs/cuda_graphs.md", "exec"), names)
    return names


def assert_trained_alike(graph: dict[str, Any], eager: dict[str, Any]) -> None:
    states = [
        [
            tensor
            for param in names["model"].parameters()
            for tensor in names["optimizer"].state[param].values()
        ]
        for names in (graph, eager)
    ]
    assert len(states[0]) > 2 * len(list(graph["model"].parameters()))
    assert_all_same_bits(*states)
    assert_all_same_bits(graph["model"].state_dict().values(), eager["model"].state_dict().values())
    assert_all_same_bits(graph["accuracy"], eager["accuracy"])
    assert_same_bits(graph["loss"], eager["loss"])
    assert graph["optimizer"].stats() == eager["optimizer"].stats()
    assert graph["schedule"].last_epoch == eager["schedule"].last_epoch
    assert 0 < graph["optimizer"].stats().skipped_steps < STEPS - 4


def test_the_code_of_the_page_trains_as_without_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    if reason := emulation.unusable_because():
        pytest.skip(f"backend emulated_cuda: {reason}")
    recorded_graph.install(monkeypatch)
    graph, eager = (trained("cpu", "emulated_cuda", graph) for graph in (True, False))
    assert_trained_alike(graph, eager)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
def test_the_code_of_the_page_trains_on_a_gpu_as_without_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    graph, eager = (trained("cuda", "auto", graph) for graph in (True, False))
    assert_trained_alike(graph, eager)
