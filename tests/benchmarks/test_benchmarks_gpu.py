"""The GPU mode of the step benchmark: all of it but the GPU, on the emulated CUDA kernels and a fake `torch.cuda`."""

from __future__ import annotations

import copy
import json
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("matplotlib", reason="the benchmarks draw with matplotlib")
pytest.importorskip("torchvision", reason="the benchmarks take their networks from torchvision")

from benchmarks.lib import backend_choice, gpu
from benchmarks.lib.harness import Clock, Contestant, interleave
from benchmarks.lib.names import AVERAGE, AVERAGED_MODEL, FUSED, OURS
from benchmarks.step import __main__ as step
from benchmarks.step import contestants as step_contestants
from benchmarks.step import lineup as step_lineup
from benchmarks.step import peers as step_peers
from benchmarks.step import sizes as step_sizes
from benchmarks.step.contestants import (
    CASTS,
    COPY,
    FUSED_NEW_CASTS,
    SCALE,
    TWIN,
    Entry,
    Gradients,
)
from benchmarks.step.lineup import FORMS
from fused_tricks import FusedSGD, cast_model
from fused_tricks.backends import BACKENDS, Backend
from support import emulation  # adds a backend
from support.comparison import assert_all_same_bits
from support.fake_cuda import FakeCuda

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
GRAPH = step_lineup.GRAPH
AVERAGES = {FUSED + AVERAGED_MODEL, TWIN}
PEERS = [
    step_peers.APEX,
    step_peers.APEX_MASTERS,
    step_peers.TRANSFORMER_ENGINE,
    step_peers.FLASHOPTIM,
    step_peers.FLASHOPTIM_32,
]
ANYWHERE = [step_peers.OPTIMI, step_peers.OPTIMI_KAHAN, step_peers.SGDW, step_peers.BITSANDBYTES]

MODULES = (
    "apex",
    "apex.optimizers",
    "apex.multi_tensor_apply",
    "amp_C",
    "flashoptim",
    "transformer_engine",
    "transformer_engine.pytorch",
    "transformer_engine.pytorch.optimizers",
)
MODULES_ANYWHERE = ("bitsandbytes", "heavyball", "optimi", "timm.optim", "timm.utils")


def run(folder: Path, *arguments: str) -> dict[str, Any]:
    size = ["--parameters", "synthetic:2:300", "--rounds", "2", "--host-rounds", "2", "--loop-mib", "1"]
    size += ["--no-compiled"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step, "HOST_REPEATS", 2)
        step.main([*size, "--device", "cpu", "--output", str(folder), *arguments])
    return json.loads((folder / "step.json").read_text(encoding="utf-8"))


@pytest.fixture
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    return FakeCuda(monkeypatch)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of a run on two backends, on a machine that has a driver and no peers."""
    if reason := emulation.unusable_because():
        pytest.skip(f"backend emulated_cuda: {reason}")
    folder = tmp_path_factory.mktemp("step")
    program = folder / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 580.65.06\necho 580.65.06\n", encoding="utf-8")
    program.chmod(0o755)
    with pytest.MonkeyPatch.context() as patch:
        FakeCuda(patch)
        patch.setenv("PATH", str(folder), prepend=os.pathsep)
        for name in (*MODULES, *MODULES_ANYWHERE):
            patch.setitem(sys.modules, name, None)
        run(folder, "--backend", "emulated_cuda", "--backend", "cpu")
    return folder


@pytest.fixture
def result(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "step.json").read_text(encoding="utf-8"))


@pytest.fixture
def page(folder: Path) -> str:
    return (folder / "step.md").read_text(encoding="utf-8")


def test_one_command_measures_every_backend_and_its_graph(result: dict[str, Any]) -> None:
    ours = {f"{name}{graph}" for name in (OURS, f"{OURS}, cpu", OURS + AVERAGE) for graph in ("", GRAPH)}
    theirs = {*FORMS, *(f"{form}{CASTS}" for form in FORMS), f"{FUSED}{GRAPH}", FUSED_NEW_CASTS, *AVERAGES}
    assert set(result["contestants"]) == ours | theirs
    assert set(result["bandwidth"]) == ours | {COPY, SCALE}
    assert set(result["host"]) == ours | {*FORMS, f"{FUSED}{GRAPH}", *AVERAGES}
    assert "(backend emulated_cuda)" in result["setting"]


def test_the_page_and_the_picture_have_every_contestant(
    folder: Path, result: dict[str, Any], page: str
) -> None:
    assert all(f"| {name} |" in page for name in [*result["contestants"], COPY, SCALE])
    assert "| waited for the host |" in page
    assert (folder / "step.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_peers_that_are_not_installed_are_listed_as_such(result: dict[str, Any], page: str) -> None:
    assert sorted(result["left_out"]) == sorted([*PEERS, *ANYWHERE, step_peers.MODEL_EMA])
    assert all(f"- {name}: not installed (no module " in page for name in result["left_out"])


def test_a_result_names_the_gpu_its_driver_and_the_versions_of_cuda(
    result: dict[str, Any], page: str
) -> None:
    assert result["machine"]["gpu"] == {
        "name": "Fake GPU",
        "architecture": "9.0",
        "memory_gib": 16.0,
        "l2_mib": 32.0,
        "multiprocessors": 4,
        "driver": "580.65.06",
    }
    assert {"CUDA of torch", "CUDA of fused_tricks", "triton"} < set(result["machine"]["versions"])
    assert "- GPU: Fake GPU" in page and "driver 580.65.06" in page and "CUDA of torch" in page


@pytest.mark.parametrize(
    ("cuda", "triton", "expected"),
    [
        (None, None, ["cuda", "triton"]),
        ("was not built", None, ["triton"]),
        ("was not built", "is not installed", []),
    ],
)
def test_backends_for_a_gpu_take_part_where_usable_and_are_listed_with_the_reason_elsewhere(
    monkeypatch: pytest.MonkeyPatch, cuda: str | None, triton: str | None, expected: list[str]
) -> None:
    fakes = {
        name: Backend(
            BACKENDS["reference"].stepper,
            lambda reason=reason: reason,
            device_type,
            is_automatic=name != "of a test",
        )
        for name, reason, device_type in [
            ("cuda", cuda, "cuda"),
            ("triton", triton, "cuda"),
            ("cpu", None, "cpu"),
            ("reference", None, None),
            ("of a test", None, "cuda"),
        ]
    }
    monkeypatch.setattr(backend_choice, "BACKENDS", fakes)
    usable, left_out = backend_choice.usable(torch.device("cuda"))
    assert usable == expected
    reasons = {"cuda": cuda, "triton": triton}
    assert left_out == {name: reason for name, reason in reasons.items() if reason}


def test_a_timed_section_lies_between_two_events_behind_a_head_start(fake_cuda: FakeCuda) -> None:
    log = fake_cuda.log
    contestant = Contestant("a", lambda: log.append("run"), lambda: log.append("prepare"))
    interleave(
        [contestant], rounds=1, warmup=0, device=CPU, between=lambda: log.append("evict"), head_start=True
    )
    assert log == ["prepare", "evict", "synchronize", "sleep", "event", "run", "event", "synchronize"]


@pytest.mark.parametrize("happened", [True, False])
def test_a_section_waited_if_the_gpu_had_begun_before_the_last_call(
    fake_cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch, happened: bool
) -> None:
    monkeypatch.setattr(torch.cuda.Event, "query", lambda event: happened)
    clock = Clock(CPU, head_start=True)
    clock.start()
    clock.mark()
    (section,) = clock.sections()
    assert section.waited is happened


def test_a_captured_contestant_only_replays(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_cuda = FakeCuda(monkeypatch, replays=False)
    calls = []
    replay = gpu.capture(lambda: calls.append(1), warmup=3)
    assert len(calls) == 4 and fake_cuda.log == ["synchronize", "capture"]
    replay()
    assert len(calls) == 4 and fake_cuda.log[-1] == "replay"


def test_gradients_of_a_captured_step_are_renewed_where_they_are() -> None:
    parameters = [torch.zeros(3), torch.zeros(2, dtype=torch.float16)]
    renew = Gradients(parameters, in_place=True).renew
    gradients = [parameter.grad for parameter in parameters]
    before = [gradient.clone() for gradient in gradients]
    for gradient in gradients:
        gradient.zero_()
    renew()
    assert all(parameter.grad is gradient for parameter, gradient in zip(parameters, gradients))
    assert_all_same_bits(gradients, before)


def test_a_step_that_cannot_be_captured_is_listed_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeCuda(monkeypatch, replays=False)

    def refuse(graph: object) -> None:
        raise RuntimeError("operation not permitted when stream is capturing\nCUDA kernel errors ...")

    monkeypatch.setattr(torch.cuda, "graph", refuse)
    candidates = step_lineup.of_tiny_parameters("synthetic:2:3", torch.float16, CPU, ["reference"])
    entries, left_out = step_lineup.assemble(candidates, CPU)
    reason = "RuntimeError: operation not permitted when stream is capturing"
    graphs = {candidate.name for candidate in candidates if candidate.name.endswith(GRAPH)}
    refused = {name: why for name, why in left_out.items() if name != step_peers.MODEL_EMA}
    assert refused == dict.fromkeys([f"{FUSED}{GRAPH}", f"{OURS}{GRAPH}", f"{OURS}{AVERAGE}{GRAPH}"], reason)
    assert {entry.contestant.name for entry in entries} | {*left_out} == {c.name for c in candidates}
    assert graphs == {*refused}


def test_a_contestant_that_everybody_needs_is_never_left_out() -> None:
    def fail() -> Entry:
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        step_lineup.assemble([step_lineup.Candidate("a", fail)], CPU)


class Kernels(ModuleType):
    """Apex's `amp_C`: the two kernels by their contract, on CPU tensors."""

    def multi_tensor_scale(
        self, chunk: int, found: Tensor, tensors: list[list[Tensor]], scale: float
    ) -> None:
        for source, target in zip(*tensors, strict=True):
            found |= int(not source.isfinite().all())
            target.copy_(source * scale)

    def multi_tensor_sgd(
        self,
        chunk: int,
        found: Tensor,
        tensors: list[list[Tensor]],
        decay: float,
        momentum: float,
        dampening: float,
        rate: float,
        nesterov: bool,
        is_first: bool,
        decay_after: bool,
        scale: float,
    ) -> None:
        assert dampening == 0 and not nesterov and not decay_after
        if found:
            return
        for gradient, weight, buffer, *copies in zip(*tensors, strict=True):
            gradient = gradient.float() * scale + decay * weight
            buffer.copy_(gradient if is_first else buffer * momentum + gradient)
            weight -= rate * buffer
            for target in copies:
                target.copy_(weight)


class FlashSGD(torch.optim.SGD):
    """`flashoptim.FlashSGD` by its signature."""

    def __init__(self, params: Any, master_weight_bits: int = 24, **options: Any) -> None:
        assert master_weight_bits in (24, 32)
        super().__init__(params, **options)
        assert all(len({p.dtype for p in group["params"]}) == 1 for group in self.param_groups)


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Apex and FlashOptim as if they were installed."""
    modules = {name: ModuleType(name) for name in MODULES}
    modules["amp_C"] = Kernels("amp_C")
    modules["apex.optimizers"].FusedSGD = torch.optim.SGD
    modules["transformer_engine.pytorch.optimizers"].FusedSGD = torch.optim.SGD
    modules["apex.multi_tensor_apply"].multi_tensor_applier = lambda kernel, found, tensors, *options: kernel(
        2048, found, tensors, *options
    )
    modules["flashoptim"].FlashSGD = FlashSGD
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)


def test_peers_that_are_installed_take_part(tmp_path: Path, fake_cuda: FakeCuda, peers: None) -> None:
    result = run(tmp_path, "--backend", "reference", "--host-rounds", "1")
    assert set(result["left_out"]) <= {step_peers.MODEL_EMA, *ANYWHERE}
    assert set(PEERS) < set(result["contestants"])


def test_step_sizes_has_host_times_that_do_not_wait_behind_the_head_start(
    tmp_path: Path, fake_cuda: FakeCuda
) -> None:
    sets = [
        "--models",
        "--tensor-counts",
        "2",
        "--element-counts",
        "--device",
        "cpu",
        "--output",
        str(tmp_path),
    ]
    step_sizes.main([*sets, "--seconds", "0.001", "--most-rounds", "1", "--loop-mib", "1", "--no-compiled"])
    (point,) = json.loads((tmp_path / "step_sizes.json").read_text(encoding="utf-8"))["sweeps"]["tensors"]
    assert set(point["host_us"]) == set(point["ms"])
    assert "Host time, µs a step:" in (tmp_path / "step_sizes.md").read_text(encoding="utf-8")
    # One warm-up and five rounds of times are behind the head start, and none of the others.
    assert fake_cuda.log.count("sleep") == 6 * (len(point["ms"]) + 2)


def test_apex_has_no_contestant_with_bf16_masters(fake_cuda: FakeCuda, peers: None) -> None:
    candidates = step_lineup.of_a_model("synthetic:1:8", torch.bfloat16, CPU, ["reference"])
    _, left_out = step_lineup.assemble(candidates, CPU)
    assert left_out[step_peers.APEX_MASTERS] == "ValueError: Apex's update with masters takes FP16 only"


def test_the_kernels_of_apex_are_called_so_that_they_update_as_we_do(
    fake_cuda: FakeCuda, peers: None
) -> None:
    torch.manual_seed(0)
    theirs = torch.nn.Sequential(torch.nn.Linear(5, 40), torch.nn.BatchNorm1d(40))
    ours = cast_model(copy.deepcopy(theirs), torch.float16)
    optimizer = FusedSGD(
        ours.parameters(),
        **step_contestants.HYPERPARAMETERS,
        bias_decay=True,
        loss_scale=65536.0,
        backend="reference",
    )
    entry = step_peers.apex_masters("apex", theirs, torch.float16, CPU)
    pairs = list(zip(theirs.parameters(), ours.parameters(), strict=True))
    for number in range(50):
        for their, our in pairs:
            our.grad = torch.randn_like(our) * 8192
            if number == 20:
                our.grad[0] = float("inf")
            their.grad = our.grad.clone()
        entry.contestant.run()
        optimizer.step()
    one_ulp = {torch.float16: 2**-11, torch.float32: 2**-22}
    for their, our in pairs:
        torch.testing.assert_close(their, our, rtol=0, atol=one_ulp[our.dtype] / 2)
    assert optimizer.stats().skipped_steps == 1
