"""The benchmarks run at a tiny size, write files that parse, and measure every contestant."""

from __future__ import annotations

import json
import statistics
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

pytest.importorskip("matplotlib", reason="the benchmarks draw with matplotlib")
pytest.importorskip("sklearn", reason="the benchmarks take their smallest data set from scikit-learn")
pytest.importorskip("torchvision", reason="the benchmarks take their networks from torchvision")
pytest.importorskip("tqdm", reason="the benchmarks show their progress with tqdm")

from benchmarks import cast_models, redraw
from benchmarks.lib import data, machine, parameter_sets
from benchmarks.lib.harness import Spread
from benchmarks.lib.names import AVERAGE, AVERAGED_MODEL, FOR_LOOP, FOREACH, FUSED, OURS
from benchmarks.step import __main__ as step
from benchmarks.step import contestants as step_contestants
from benchmarks.step import lineup as step_lineup
from benchmarks.step import page as step_page
from benchmarks.step.compiled import MASTERS
from benchmarks.step.contestants import CASTS, COPY, FUSED_CASTS, FUSED_NEW_CASTS, SCALE, TWIN
from benchmarks.step.lineup import FORMS
from benchmarks.step.peers import (
    APEX,
    APEX_MASTERS,
    BITSANDBYTES,
    FLASHOPTIM,
    FLASHOPTIM_32,
    MODEL_EMA,
    OPTIMI,
    OPTIMI_KAHAN,
    SGDW,
    TRANSFORMER_ENGINE,
)
from benchmarks.train import __main__ as train
from benchmarks.train import contestants as train_contestants
from benchmarks.train import page as train_page

pytestmark = pytest.mark.slow

TRAIN = ["--dataset", "digits", "--image-size", "32", "--batch-size", "8", "--device", "cpu", "--seeds", "1"]
STEP = ["--rounds", "2", "--host-rounds", "2", "--loop-mib", "1", "--device", "cpu", "--no-compiled"]
PEERS = {
    OPTIMI,
    OPTIMI_KAHAN,
    SGDW,
    BITSANDBYTES,
    APEX,
    APEX_MASTERS,
    TRANSFORMER_ENGINE,
    FLASHOPTIM,
    FLASHOPTIM_32,
}
AVERAGES = {FUSED + AVERAGED_MODEL, TWIN, OURS + AVERAGE}
PNG = b"\x89PNG\r\n\x1a\n"


def read(folder: Path, benchmark: str) -> dict[str, Any]:
    return json.loads((folder / f"{benchmark}.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of benchmarks.train that casts nothing, so that all contestants compute the same."""
    folder = tmp_path_factory.mktemp("train")
    train.main(
        [*TRAIN, "--steps", "3", "--dtype", "float32", "--loss-scale", "none", "--output", str(folder)]
    )
    return folder


@pytest.fixture(scope="module")
def stepped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of benchmarks.step."""
    folder = tmp_path_factory.mktemp("step")
    step.main([*STEP, "--parameters", "synthetic:3:1000", "--budgets", "--output", str(folder)])
    return folder


def test_training_reports_every_contestant(trained: Path) -> None:
    result = read(trained, "train")
    assert list(result["contestants"]) == list(train_contestants.NAMES)
    page = (trained / "train.md").read_text(encoding="utf-8")
    assert all(f"| {name} |" in page for name in train_contestants.NAMES)
    assert (trained / "train.png").read_bytes().startswith(PNG)


def test_training_in_fp32_gives_the_losses_of_torch_sgd_bit_for_bit(trained: Path) -> None:
    rows = read(trained, "train")["contestants"]
    assert rows[OURS]["losses"] == rows["torch.amp, for-loop"]["losses"]
    assert len(set(rows[OURS]["losses"][0])) == 3


def test_training_in_low_precision_starts_from_the_same_weights_and_batch(tmp_path: Path) -> None:
    options = ["--average", "--max-grad-norm", "1", "--dtype", "bfloat16"]
    train.main([*TRAIN, "--steps", "2", *options, "--output", str(tmp_path)])
    rows = read(tmp_path, "train")["contestants"]
    assert rows[OURS]["passed"] and rows[OURS + AVERAGE]["passed"]
    expected = pytest.approx(rows["torch.amp, fused"]["losses"][0][0], rel=0.02)
    for name in (OURS, train_contestants.UNSCALED, OURS + AVERAGE, FUSED + AVERAGED_MODEL):
        assert rows[name]["losses"][0][0] == expected
    page = (tmp_path / "train.md").read_text(encoding="utf-8")
    ratio = Spread(**rows[train_contestants.UNSCALED]["time_over_ours"]).text(2)
    assert f"*{OURS}* is {ratio} × as fast as *{train_contestants.UNSCALED}*" in page
    assert train_page.ANOTHER_RUN in page


def test_a_page_of_fp32_speaks_of_no_rounding_and_no_scaler(trained: Path) -> None:
    page = (trained / "train.md").read_text(encoding="utf-8")
    assert train_page.ANOTHER_RUN not in page and "BF16" not in page


@pytest.mark.parametrize(
    ("dtype", "loss_scaling", "expected"),
    [(torch.bfloat16, True, True), (torch.bfloat16, False, False), (torch.float16, True, False)],
)
def test_only_bf16_with_loss_scaling_has_a_row_without_it(
    dtype: torch.dtype, loss_scaling: bool, expected: bool
) -> None:
    recipe = train_contestants.Recipe(torch.device("cpu"), dtype, loss_scaling, lr=0.1)
    assert (train_contestants.UNSCALED in train_contestants.names(recipe)) is expected


def test_the_row_without_a_scaler_scales_no_loss() -> None:
    recipe = train_contestants.Recipe(torch.device("cpu"), torch.bfloat16, loss_scaling=True, lr=0.1)
    module = torch.nn.Linear(2, 2)
    trainer = train_contestants.build(train_contestants.UNSCALED, module, recipe)
    trainer.backward(module.bias.sum())
    assert module.bias.grad.tolist() == [1, 1]


def test_a_single_seed_has_no_deviation(trained: Path) -> None:
    assert read(trained, "train")["contestants"][OURS]["accuracy_std"] is None
    assert "±" not in (trained / "train.md").read_text(encoding="utf-8").replace("mean ± standard", "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "argument --steps: must be at least 1"),
        (["--epochs", "-1"], "argument --epochs: must be at least 1"),
        (["--seeds", "0"], "argument --seeds: must be at least 1"),
        (["--batch-size", "0"], "argument --batch-size: must be at least 1"),
        (["--steps", "many"], "argument --steps: invalid positive value: 'many'"),
        (["--model", "resnet19"], "torchvision.models has no classification network 'resnet19'"),
        (["--compile", "fast"], "argument --compile: invalid choice: 'fast'"),
        (["--device", "xpu"], "argument --device: 'xpu' cannot be "),
        (["--device", "meta"], "argument --device: 'meta' cannot be timed; choose cpu or cuda"),
        (["--device", "gpu"], "argument --device: 'gpu' cannot be used: "),
        (["--output", "/dev/null/x"], "argument --output: cannot write to /dev/null/x: Not a directory"),
        (["--batch-size", "2000"], "--batch-size 2000: digits has only 1437 images"),
        (["--dataset", "cifar10"], "name its folder with --data"),
        (["--dataset", "cifar10", "--data", "nowhere"], "nowhere holds no folder cifar-10-batches-py"),
        (["--dataset", "imagefolder", "--data", "nowhere"], "nowhere holds no folders train and val"),
    ],
    ids=str,
)
def test_training_refuses_a_command_line_that_cannot_be_run(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as raised:
        train.parse([*TRAIN, *arguments])
    assert raised.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rounds", "0"], "argument --rounds: must be at least 1"),
        (["--host-rounds", "0"], "argument --host-rounds: must be at least 1"),
        (["--loop-mib", "-1"], "argument --loop-mib: must be at least 1"),
        (
            ["--parameters", "resnet1"],
            "argument --parameters: unknown parameter set 'resnet1'; choose one of",
        ),
        (["--backend", "fast"], "--backend fast: unknown; choose from cuda"),
        (["--backend", "cuda"], "--backend cuda: backend='cuda' "),
        (["--output", "/dev/null"], "argument --output: cannot write to /dev/null: "),
    ],
    ids=str,
)
def test_the_step_benchmark_refuses_a_command_line_that_cannot_be_run(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as raised:
        step.parse([*STEP, *arguments])
    assert raised.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("seconds_a_step", "expected"), [(0.1, (100, 3)), (1.2, (100, 1)), (6.0, (20, 1)), (60.0, (10, 1))]
)
def test_a_limit_of_minutes_takes_seeds_first_then_steps_and_leaves_some_to_time(
    seconds_a_step: float, expected: tuple[int, int]
) -> None:
    assert train.within(2, seconds_a_step, steps=100, seeds=3) == expected


def test_step_reports_every_contestant(stepped: Path) -> None:
    result = read(stepped, "step")
    names = {*FORMS, *(f"{form}{CASTS}" for form in FORMS), FUSED_NEW_CASTS, OURS, *AVERAGES}
    assert set(result["contestants"]) - {MODEL_EMA} - PEERS == names
    assert set(result["bandwidth"]) == {OURS, OURS + AVERAGE, COPY, SCALE}
    assert set(result["host"]) - {MODEL_EMA} == {*FORMS, OURS, *AVERAGES}
    assert set(result["left_out"]) | set(result["contestants"]) == names | {MODEL_EMA} | PEERS
    assert all(row["peak_memory_bytes"] > 0 for row in result["contestants"].values())
    page = (stepped / "step.md").read_text(encoding="utf-8")
    assert all(f"| {name} |" in page for name in names)
    assert (stepped / "step.png").read_bytes().startswith(PNG)


def test_a_result_is_drawn_again_from_its_numbers(stepped: Path, tmp_path: Path) -> None:
    (tmp_path / "step.json").write_bytes((stepped / "step.json").read_bytes())
    redraw.main([str(tmp_path / "step.json")])
    assert (tmp_path / "step.md").read_bytes() == (stepped / "step.md").read_bytes()
    assert (tmp_path / "step.png").read_bytes().startswith(PNG)


def test_the_time_of_compilation_is_a_column_where_something_compiled(stepped: Path) -> None:
    result = read(stepped, "step")
    assert "compiled in" not in step_page.markdown(result)
    result["contestants"][FUSED]["compile_seconds"] = 41.6
    rows = [line for line in step_page.markdown(result).splitlines() if line.startswith(f"| {FUSED} | ")]
    assert rows[0].endswith("| 42 |")


def test_the_ratios_of_a_step_can_be_taken_anew_from_its_samples(stepped: Path) -> None:
    result = read(stepped, "step")
    samples = result["samples_ms"]
    assert set(samples) == {*result["contestants"], COPY, SCALE}
    for name, ours in ((FUSED, OURS), (FUSED + AVERAGED_MODEL, OURS + AVERAGE)):
        ratio = statistics.median(a / b for a, b in zip(samples[name], samples[ours]))
        assert ratio == pytest.approx(result["contestants"][name]["ours_is_faster_by"]["median"], rel=1e-5)


def test_every_result_says_where_and_how_it_was_measured(trained: Path, stepped: Path) -> None:
    for folder, benchmark in ((trained, "train"), (stepped, "step")):
        found = read(folder, benchmark)["machine"]
        assert f"python -m benchmarks.{benchmark} " in found["command"]
        assert found["threads"] == torch.get_num_threads()
        assert found["versions"]["torch"] == torch.__version__
        assert {"cpu", "cores", "date", "gpu"} <= set(found)


@pytest.mark.parametrize(("threads", "prefix"), [("3", "OMP_NUM_THREADS=3 "), (None, "")])
def test_the_command_has_the_number_of_threads_before_it_where_that_is_set(
    monkeypatch: pytest.MonkeyPatch, threads: str | None, prefix: str
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if threads:
        monkeypatch.setenv("OMP_NUM_THREADS", threads)
    command = machine.describe("benchmarks.step", ["--rounds", "1"], torch.device("cpu"))["command"]
    assert command == f"{prefix}python -m benchmarks.step --rounds 1"


def test_budgets_about_the_step_are_stated_for_resnet50_on_the_cpu_only(stepped: Path) -> None:
    seconds = {name: [1.0] for name in (FUSED, FUSED_CASTS, MASTERS, OURS, COPY, SCALE)}
    moved = {OURS: 90, COPY: 70, SCALE: 100}
    all_budgets = step.budgets(seconds, moved, seconds, promised=True)
    assert [budget.limit for budget in all_budgets] == [1.4, 2.2, 1.2, 0.9, 25, 0.1]
    assert [budget.met for budget in all_budgets] == [False, False, False, True, False, False]
    del seconds[MASTERS]
    assert [budget.limit for budget in step.budgets(seconds, moved, seconds, promised=True)] == [
        *(1.4, 2.2, 0.9, 25, 0.1)
    ]
    assert [row["limit"] for row in read(stepped, "step")["budgets"]] == [25, 0.1]


def test_a_step_moves_22_bytes_for_a_low_precision_element_and_24_for_an_fp32_one() -> None:
    low = [torch.zeros(3, dtype=torch.float16), torch.zeros(2, dtype=torch.bfloat16)]
    assert step_contestants.OUR_WORK.traffic(low) == 5 * 22
    assert step_contestants.OUR_WORK.traffic([torch.zeros(7)]) == 7 * 24


def test_an_average_adds_8_bytes_to_ours() -> None:
    work = step_contestants.with_average(step_contestants.OUR_WORK, *step_contestants.OUR_AVERAGE)
    assert (work.low_bytes, work.fp32_bytes, work.averages) == (30, 32, True)


class CountedBytes(TorchDispatchMode):
    """Adds up what operations read and write: arguments that are not just overwritten; what they change or make."""

    MOVE_NOTHING = (torch.ops.aten.detach.default, torch.ops.aten.empty_like.default)

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        if operation.is_view or operation in self.MOVE_NOTHING:
            return result
        overwrites = operation is torch.ops.aten.copy_.default
        for argument, value in zip(operation._schema.arguments, args):
            changes = argument.alias_info is not None and argument.alias_info.is_write
            for tensor in tree_flatten(value)[0]:
                if isinstance(tensor, torch.Tensor):
                    self.bytes += tensor.nbytes * (not (overwrites and changes)) + tensor.nbytes * changes
        if not any(out.alias_info for out in operation._schema.returns):
            self.bytes += sum(t.nbytes for t in tree_flatten(result)[0] if isinstance(t, torch.Tensor))
        return result


# Casts to FP32 leave no element that is 16-bit.
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, torch.float32) for name in (*FORMS, OURS, *sorted(AVERAGES), MODEL_EMA)),
        *((name, torch.float16) for name in (*FORMS, OURS, FUSED_NEW_CASTS, *sorted(AVERAGES), MODEL_EMA)),
        *((name, dtype) for name in (OPTIMI, OPTIMI_KAHAN, SGDW) for dtype in (torch.float16, torch.float32)),
        *((f"{form}{CASTS}", torch.float16) for form in FORMS),
    ],
)
def test_the_bytes_stated_of_plain_operations_are_those_that_they_are_called_with(
    name: str, dtype: torch.dtype
) -> None:
    """Ours is the reference here, which is made of torch's operations as well."""
    for package, names in {"timm": (MODEL_EMA, SGDW), "optimi": (OPTIMI, OPTIMI_KAHAN)}.items():
        if name in names:
            pytest.importorskip(package, reason=f"the contestant is {package}'s")
    candidates = step_lineup.of_a_model(
        "synthetic:1:100000", dtype, torch.device("cpu"), ["reference"], averages=True
    )
    (candidate,) = (candidate for candidate in candidates if candidate.name == name)
    ((entry,), _) = step_lineup.assemble([candidate], torch.device("cpu"))
    entry.contestant.prepare()
    with CountedBytes() as counted:
        entry.contestant.run()
    stated = entry.work.fp32_bytes if dtype == torch.float32 else entry.work.low_bytes
    assert round(counted.bytes / 100_000, 1) == stated


@pytest.mark.parametrize(("name", "bytes_an_element"), [(FOR_LOOP, 16), (FOREACH, 16), (FUSED, 12)])
def test_peak_memory_is_of_weights_gradients_state_and_temporary_tensors(
    name: str, bytes_an_element: int
) -> None:
    candidates = step_lineup.of_a_model("synthetic:1:100000", torch.float16, torch.device("cpu"), ["cpu"])
    (candidate,) = (candidate for candidate in candidates if candidate.name == name)
    peak = step_lineup.peak_bytes(candidate, torch.device("cpu"))
    assert round(peak / 100_000, 2) == bytes_an_element


def test_every_torch_contestant_gets_the_same_gradients_each_round() -> None:
    module = parameter_sets.build("synthetic:2:5")
    sgd = partial(torch.optim.SGD, fused=True)
    entry = step_contestants.grad_scaler(FUSED, module, torch.device("cpu"), sgd, step_contestants.FUSED_WORK)
    before = [parameter.grad.clone() for parameter in module.parameters()]
    entry.contestant.run()
    assert not torch.equal(before[0], next(module.parameters()).grad)
    entry.contestant.prepare()
    assert all(torch.equal(old, parameter.grad) for old, parameter in zip(before, module.parameters()))


@pytest.mark.parametrize("name", ["resnet1", "synthetic:3", "synthetic:0:5", "synthetic:a:b"])
def test_an_unknown_parameter_set_is_refused_by_name(name: str) -> None:
    with pytest.raises(ValueError, match=f"unknown parameter set '{name}'"):
        parameter_sets.build(name)


def test_a_data_set_that_no_package_ships_needs_a_folder() -> None:
    with pytest.raises(ValueError, match="--data"):
        data.load("cifar10", None, 32)


def folder_of_images(folder: Path, **classes: list[str]) -> str:
    """A folder that an image folder can be, with one image for each class of train and val."""
    image = pytest.importorskip("PIL.Image")
    for part, names in classes.items():
        for name in names:
            (folder / part / name).mkdir(parents=True)
            image.new("RGB", (8, 8)).save(folder / part / name / "image.png")
    return str(folder)


def test_an_image_folder_is_read_where_train_and_val_have_the_same_classes(tmp_path: Path) -> None:
    folder = folder_of_images(tmp_path, train=["ant", "bee"], val=["ant", "bee"])
    images = data.load("imagefolder", folder, 8)
    assert images.classes == 2 and [label for _, label in images.test] == [0, 1]


def test_an_image_folder_whose_train_and_val_differ_in_classes_is_refused(tmp_path: Path) -> None:
    folder = folder_of_images(tmp_path, train=["ant", "bee", "cat"], val=["bee", "cat", "dog", "eel"])
    with pytest.raises(ValueError, match="only train has ant and only val has dog, eel"):
        data.load("imagefolder", folder, 8)


def test_digits_are_split_without_overlap_and_resized() -> None:
    images = data.load("digits", None, 12)
    pixels, label = images.train[0]
    assert pixels.shape == (3, 12, 12) and pixels.dtype == torch.float32 and label.dtype == torch.int64
    assert len(images.train) + len(images.test) == 1797 and images.classes == 10


def test_the_table_of_cast_networks_has_a_row_for_each(tmp_path: Path) -> None:
    names = ["squeezenet1_0", "squeezenet1_1"]
    cast_models.main(["--models", *names, "--output", str(tmp_path)])
    lines = (tmp_path / "cast_models.md").read_text(encoding="utf-8").splitlines()
    rows = [line for line in lines if line.startswith("| squeezenet")]
    assert [row.split()[1] for row in rows] == names
    assert all("| 0.7 | 32 × 32 |" in row and row.endswith("| yes |") for row in rows)
