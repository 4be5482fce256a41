"""A contestant is timed only if its numbers are right, and says what is wrong where they are not."""

from __future__ import annotations

import copy
import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("torchvision", reason="the benchmarks take their networks from torchvision")

from benchmarks.lib import gpu, memory, parameter_sets
from benchmarks.lib.names import AVERAGE, AVERAGED_MODEL, FOR_LOOP, FUSED, GRAPH, OURS
from benchmarks.step import __main__ as step
from benchmarks.step import check as step_check
from benchmarks.step import compiled as step_compiled
from benchmarks.step import contestants as step_contestants
from benchmarks.step import lineup as step_lineup
from benchmarks.step import peers as step_peers
from benchmarks.step import sizes as step_sizes
from benchmarks.step.check import Check
from benchmarks.step.contestants import CASTS, TWIN, Entry
from benchmarks.step.lineup import Candidate
from benchmarks.train import check as train_check
from benchmarks.train import contestants as train_contestants
from fused_tricks import WarmupCosineLR
from support import emulation, recorded_graph  # adds a backend
from support.comparison import assert_all_same_bits
from support.fake_cuda import FakeCuda

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
SET = "synthetic:3:1000"
STEP = [
    "--parameters",
    "synthetic:2:300",
    "--rounds",
    "1",
    "--host-rounds",
    "1",
    "--loop-mib",
    "1",
    "--no-compiled",
]


def lineup(name: str, change, parameters: str = SET) -> dict[str, str]:
    """Returns why a contestant is left out when `change` is made after the last step before its check."""
    if name == step_peers.MODEL_EMA:
        pytest.importorskip("timm", reason="the average is timm's")
    candidates = step_lineup.of_a_model(parameters, torch.float16, CPU, ["cpu"], averages=True)
    (candidate,) = (candidate for candidate in candidates if candidate.name == name)

    def build() -> Entry:
        entry = candidate.build()
        run = entry.contestant.run
        steps = itertools.count(1)

        def changed() -> None:
            run()
            if next(steps) == step_check.STEPS:
                with torch.no_grad():
                    change(entry.trained)

        return replace(entry, contestant=replace(entry.contestant, run=changed))

    _, left_out = step_lineup.assemble([Candidate(name, build, module=candidate.module)], CPU)
    return left_out


def flip(tensor: torch.Tensor) -> None:
    """Changes the last bit of the last element."""
    whole = {2: torch.int16, 4: torch.int32}[tensor.element_size()]
    tensor.view(-1)[-1:].view(whole).bitwise_xor_(1)


def test_one_wrong_bit_of_a_weight_keeps_ours_from_being_timed() -> None:
    left_out = lineup(OURS, lambda trained: flip(trained.parameters[1].data))
    assert left_out == {OURS: "check failed: 1 elements differ, backend reference"}


@pytest.mark.parametrize("key", ["master_param", "momentum_buffer"])
def test_one_wrong_bit_of_the_state_keeps_ours_from_being_timed(key: str) -> None:
    left_out = lineup(OURS, lambda trained: flip(trained.optimizer.state[trained.parameters[2]][key]))
    assert left_out == {OURS: "check failed: 1 elements differ, backend reference"}


@pytest.mark.parametrize(
    "change", [lambda weight: weight.add_(1e-3), lambda weight: weight[-1:].fill_(math.nan)]
)
def test_a_wrong_weight_keeps_the_others_from_being_timed(change) -> None:
    (reason,) = lineup(FOR_LOOP, lambda trained: change(trained.parameters[0])).values()
    assert reason.startswith("check failed: ") and reason.endswith(", FP64")


def test_one_wrong_bit_of_an_average_keeps_ours_from_being_timed() -> None:
    name = OURS + AVERAGE
    left_out = lineup(name, lambda trained: flip(trained.optimizer.state[trained.parameters[2]]["ema_param"]))
    assert left_out == {name: "check failed: 1 elements differ, backend reference"}


THEIR_AVERAGES = [FUSED + AVERAGED_MODEL, step_peers.MODEL_EMA, TWIN]


@pytest.mark.parametrize("name", THEIR_AVERAGES)
@pytest.mark.parametrize("decay", [1.0, 0.99])
def test_a_wrong_average_keeps_the_others_from_being_timed(
    name: str, decay: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    for contestants in (step_contestants, step_peers):
        monkeypatch.setattr(contestants, "EMA_DECAY", decay)
    (reason,) = lineup(name, lambda trained: None).values()
    assert reason.startswith("check failed: ") and reason.endswith(", FP64")


@pytest.mark.parametrize("name", [OURS, FOR_LOOP, FUSED + CASTS, OURS + AVERAGE, *THEIR_AVERAGES])
def test_a_contestant_that_is_right_passes(name: str) -> None:
    assert lineup(name, lambda trained: None) == {}


def entry_of(name: str, **options) -> Entry:
    """Returns a contestant after its check."""
    candidates = step_lineup.of_a_model(SET, torch.float16, CPU, ["cpu"], compiles=True, **options)
    (candidate,) = (candidate for candidate in candidates if candidate.name == name)
    entries, left_out = step_lineup.assemble([candidate], CPU)
    if not entries:
        if "check failed" in left_out[name]:
            pytest.fail(f"{name}: {left_out[name]}")
        pytest.skip(f"{name}: {left_out[name]}")
    return entries[0]


@pytest.mark.parametrize("name", step_lineup.COMPILED)
def test_a_compiled_contestant_passes_and_has_its_time_of_compilation(name: str) -> None:
    entry = entry_of(name)
    assert entry.checked.passed and entry.compile_seconds > 0


@pytest.mark.parametrize(
    "name",
    [step_peers.OPTIMI, step_peers.OPTIMI_KAHAN, step_peers.SGDW, step_peers.BITSANDBYTES],
)
def test_a_peer_that_is_installed_passes(name: str) -> None:
    assert entry_of(name).compile_seconds is None


def test_a_peer_for_gpus_is_listed_with_the_reason_on_a_cpu() -> None:
    candidates = step_lineup.of_a_model(SET, torch.float16, CPU, ["cpu"])
    (candidate,) = (candidate for candidate in candidates if candidate.name == step_peers.TRANSFORMER_ENGINE)
    assert step_lineup.assemble([candidate], CPU) == ([], {candidate.name: "runs on a GPU only"})


@pytest.mark.parametrize(
    "wrong",
    [{"momentum": 0.8}, {"weight_decay": 0.4}, {"weight_decay": 0.0}, {"lr": 0.09}, {"dampening": 0.1}],
    ids=str,
)
def test_a_contestant_with_another_formula_is_not_timed(wrong: dict[str, float]) -> None:
    def other(parameters, **options):
        return torch.optim.SGD(parameters, **{**options, **wrong})

    def build() -> Entry:
        module = parameter_sets.build(SET)
        return step_contestants.grad_scaler("other", module, CPU, other, step_contestants.FUSED_WORK)

    candidate = Candidate("other", build, module=lambda: parameter_sets.build(SET))
    _, left_out = step_lineup.assemble([candidate], CPU)
    assert left_out["other"].startswith("check failed: ")


@pytest.mark.parametrize("decoupled", [True, False])
def test_decoupled_weight_decay_is_told_from_that_of_the_gradient(decoupled: bool) -> None:
    sgdw = pytest.importorskip("timm.optim", reason="the optimizer is timm's").SGDW

    def build() -> Entry:
        module = parameter_sets.build(SET)
        work = step_peers.SGDW_WORK
        return step_contestants.grad_scaler("w", module, CPU, sgdw, work, decoupled_weight_decay=decoupled)

    candidate = Candidate("w", build, module=lambda: parameter_sets.build(SET))
    entries, left_out = step_lineup.assemble([candidate], CPU)
    assert [entry.checked.against for entry in entries] == ["FP64, decoupled decay"] * decoupled
    assert bool(left_out) is not decoupled


def test_the_compiled_step_with_masters_skips_an_overflow_and_halves_the_scale() -> None:
    entry = entry_of(step_compiled.MASTERS)
    trained = entry.trained
    before = [tensor.clone() for tensor in (*trained.parameters, *trained.weights)]
    entry.contestant.prepare()
    trained.parameters[1].grad[7] = math.inf
    entry.contestant.run()
    assert_all_same_bits([*trained.parameters, *trained.weights], before)
    entry.contestant.prepare()
    for parameter in trained.parameters:
        parameter.grad.div_(2)
    entry.contestant.run()
    # At half the scale, half the gradient is the same step as before.
    assert step_check.check(replace(trained, steps=1), parameter_sets.build(SET)).passed


def test_large_sets_are_checked_in_part_and_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_check, "MOST_ELEMENTS", 2500)
    candidates = step_lineup.of_a_model("synthetic:9:1000", torch.float16, CPU, ["cpu"])
    entries, _ = step_lineup.assemble(candidates, CPU)
    assert {(entry.checked.elements, entry.checked.of) for entry in entries} == {(2000, 9000)}
    assert all("2,000 elements looked at" in entry.checked.text for entry in entries)


def test_a_table_has_what_failed_in_place_of_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = step_check.check

    def wrong(trained, module) -> Check:
        return Check("backend b", 3, 0, 600, 600) if trained.optimizer else right(trained, module)

    monkeypatch.setattr(step_check, "check", wrong)
    step.main([*STEP, "--device", "cpu", "--output", str(tmp_path)])
    page = (tmp_path / "step.md").read_text(encoding="utf-8")
    assert f"| {OURS} | check failed: 3 elements differ, backend b | – | **no** |" in page
    result = json.loads((tmp_path / "step.json").read_text(encoding="utf-8"))
    assert OURS not in result["contestants"] and result["contestants"][FUSED]["ours_is_faster_by"] is None


def test_a_set_beyond_the_free_memory_ends_the_benchmark_of_the_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda device: 100)
    with pytest.raises(SystemExit, match="--parameters synthetic:2:5: only 0 contestants of 10 elements fit"):
        step.main([*STEP, "--parameters", "synthetic:2:5", "--output", str(tmp_path)])


def test_the_forms_of_torch_amp_take_part_before_other_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    candidates = step_lineup.of_a_model("synthetic:2:5", torch.float16, cpu, ["cpu"], compiles=False)
    required = {candidate.name for candidate in candidates if not candidate.optional}
    monkeypatch.setattr(memory, "free_bytes", lambda device: 18 * 10 * len(required) * 10 // 9 + 1)
    chosen, _ = step_lineup.fitting(candidates, 10, cpu)
    assert {candidate.name for candidate in chosen} == required < {each.name for each in candidates}


@pytest.mark.parametrize("text", [None, "", "MemFree: 8 kB\n"], ids=["no file", "empty", "another kernel"])
def test_free_memory_that_is_not_reported_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str | None
) -> None:
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "meminfo")
    if text is not None:
        (tmp_path / "meminfo").write_text(text)
    assert memory.free_bytes(torch.device("cpu")) is None


@pytest.mark.parametrize("kind", ["gpu", "cpu"])
def test_sets_beyond_the_free_memory_are_skipped_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    free = (28 if kind == "gpu" else 18) * 2000 * 10 // 9 + 1024
    if kind == "gpu":
        FakeCuda(monkeypatch)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 80 * 2**30))
    else:
        monkeypatch.setattr(memory, "MEMINFO", tmp_path / "meminfo")
        (tmp_path / "meminfo").write_text(f"MemFree: 1 kB\nMemAvailable:  {free // 1024} kB\n")
    sizes = ["--models", "synthetic:2:500", "synthetic:2:5000", "--tensor-counts", "--element-counts"]
    quick = [
        "--seconds",
        "0.001",
        "--most-rounds",
        "1",
        "--loop-mib",
        "1",
        "--device",
        "cpu",
        "--no-compiled",
    ]
    step_sizes.main([*sizes, *quick, "--output", str(tmp_path)])
    result = json.loads((tmp_path / "step_sizes.json").read_text(encoding="utf-8"))
    (point,) = result["sweeps"]["models"]
    assert set(point["ms"]) == {OURS, FUSED}
    assert "only 2 contestants of 1,000 elements fit" in point["left_out"][FUSED + CASTS]
    assert "only 0 contestants of 10,000 elements fit" in result["skipped"]["synthetic:2:5000"]
    assert "- synthetic:2:5000: " in (tmp_path / "step_sizes.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["resnet18", "synthetic:3:70000"])
def test_a_set_of_parameters_is_the_same_each_time(name: str) -> None:
    one, other = (list(parameter_sets.build(name).parameters()) for _ in range(2))
    assert all(torch.equal(a, b) and a is not b for a, b in zip(one, other, strict=True))
    assert parameter_sets.count(name) == sum(a.numel() for a in one)


RECIPE = train_contestants.Recipe(CPU, torch.bfloat16, loss_scaling=True, lr=0.1, backend="cpu")


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(4, 5, generator=generator), torch.tensor([0, 1, 2, 0])


def trained(name: str, batch: tuple[torch.Tensor, torch.Tensor]) -> train_contestants.Trainer:
    torch.manual_seed(0)
    trainer = train_contestants.build(name, torch.nn.Linear(5, 3), RECIPE)
    for _ in range(3):
        trainer.backward(trainer.forward(*batch))
        trainer.update()
    return trainer


@pytest.mark.parametrize("name", train_contestants.names(replace(RECIPE, average=True, graph=True)))
def test_the_last_update_of_a_training_is_checked(
    name: str, batch: tuple[torch.Tensor, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    FakeCuda(monkeypatch)
    assert train_check.check(trained(name, batch), RECIPE, *batch).passed


@pytest.mark.parametrize("name", [OURS, FUSED, FOR_LOOP])
def test_a_wrong_update_of_a_training_is_found(
    name: str, batch: tuple[torch.Tensor, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trained(name, batch)
    apply = trainer.apply

    def apply_wrongly() -> None:
        apply()
        trainer.model.weight.data[0, 0] += 0.01

    monkeypatch.setattr(trainer, "apply", apply_wrongly)
    checked = train_check.check(trainer, RECIPE, *batch)
    assert not checked.passed and checked.text.startswith("check failed: ")


@pytest.mark.parametrize("name", [FUSED + AVERAGED_MODEL, FUSED + AVERAGED_MODEL + GRAPH])
def test_a_wrong_average_of_a_training_is_found(
    name: str, batch: tuple[torch.Tensor, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    FakeCuda(monkeypatch)
    monkeypatch.setattr(train_contestants, "EMA_DECAY", 1.0)
    checked = train_check.check(trained(name, batch), RECIPE, *batch)
    assert not checked.passed and checked.text.startswith("check failed: ")


WHOLE = replace(RECIPE, average=True, max_grad_norm=0.1, backend="emulated_cuda", steps=12)


@pytest.mark.parametrize("name", [FUSED, OURS, FUSED + AVERAGED_MODEL, OURS + AVERAGE])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_graph_trains_as_without_it(
    name: str,
    dtype: torch.dtype,
    batch: tuple[torch.Tensor, torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With loss scaling, clipping, the average, and the schedule: ours counts its updates, torch's is set."""
    if reason := emulation.unusable_because():
        pytest.skip(f"backend emulated_cuda: {reason}")
    recorded_graph.install(monkeypatch)
    recipe = replace(WHOLE, dtype=dtype)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 3))
    graph, eager = (
        train_contestants.build(name + suffix, copy.deepcopy(model), recipe) for suffix in (GRAPH, "")
    )
    schedule = None
    if name.startswith(OURS):
        total = recipe.steps + gpu.CAPTURE_WARMUP + 1
        schedule = WarmupCosineLR(eager.optimizer, total, count="applied")

    def step_eagerly(images: torch.Tensor) -> torch.Tensor:
        loss = eager.forward(images, batch[1])
        eager.backward(loss)
        eager.update()
        return loss.detach()

    for number in range(6):
        if schedule is None:
            for trainer in (graph, eager):
                train_contestants.set_lr(trainer, 0.1 / (number + 1))
        images = batch[0] * (number + 1)
        if number == 0:
            for _ in range(gpu.CAPTURE_WARMUP):
                step_eagerly(images)
        assert torch.equal(graph.forward(images, batch[1]), step_eagerly(images))
    assert_all_same_bits(graph.model.parameters(), eager.model.parameters())
    if name == OURS + AVERAGE:
        averages = [
            [trainer.optimizer.state[param]["ema_param"] for param in trainer.model.parameters()]
            for trainer in (graph, eager)
        ]
        assert_all_same_bits(*averages)
    assert train_check.check(graph, recipe, *batch).passed


def test_a_captured_training_of_torch_follows_its_learning_rate(
    batch: tuple[torch.Tensor, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    FakeCuda(monkeypatch)
    trainer = trained(FUSED + GRAPH, batch)
    before = trainer.model.weight.clone()
    # A graph reads the tensor that was there when it was captured.
    (rate,) = (group["lr"] for group in trainer.optimizer.param_groups)
    train_contestants.set_lr(trainer, 0.0)
    assert trainer.optimizer.param_groups[0]["lr"] is rate
    trainer.forward(*batch)
    assert torch.equal(trainer.model.weight, before)
    train_contestants.set_lr(trainer, 1.0)
    trainer.forward(*batch)
    assert not torch.equal(trainer.model.weight, before)
