"""From the same weights fused_tricks trains as torch.amp does, and a difference would be seen."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib", reason="the benchmarks draw with matplotlib")
pytest.importorskip("scipy", reason="the benchmark shares options with one that needs scipy")
pytest.importorskip("sklearn", reason="the benchmarks take their smallest data set from scikit-learn")
pytest.importorskip("torchvision", reason="the benchmarks take their networks from torchvision")
pytest.importorskip("tqdm", reason="the benchmarks show their progress with tqdm")

from benchmarks import losslessness
from benchmarks.lib.names import FUSED, OURS
from benchmarks.losslessness import BASELINE, ROUNDED, TESTS, Curves, steps_tested, summarise

pytestmark = pytest.mark.slow

OPTIONS = ["--dataset", "digits", "--image-size", "8", "--depth", "8", "--batch-size", "128"]
OPTIONS += ["--epochs", "1", "--seeds", "2", "--device", "cpu"]
FP32, BF16 = "float32", "bfloat16, dynamic loss scale"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run."""
    folder = tmp_path_factory.mktemp("losslessness")
    losslessness.main([*OPTIONS, "--dtype", "bfloat16", "--output", str(folder)])
    return folder


def contestants(folder: Path, precision: str) -> dict[str, Any]:
    result = json.loads((folder / "losslessness.json").read_text(encoding="utf-8"))
    return result["precisions"][precision]["contestants"]


@pytest.mark.parametrize("precision", [FP32, BF16])
def test_losses_accuracies_and_final_weights_are_those_of_torch_bit_for_bit(
    folder: Path, precision: str
) -> None:
    ours, theirs = (contestants(folder, precision)[name] for name in (OURS, BASELINE))
    assert ours["losses"] == theirs["losses"]
    assert ours["accuracies"] == theirs["accuracies"]
    assert ours["same_weights"] == [True, True]
    assert all(losses[-1] < losses[0] for losses in ours["losses"])


def test_weights_that_were_rounded_at_the_start_are_told_from_those_of_torch(folder: Path) -> None:
    rounded = contestants(folder, BF16)[ROUNDED]
    assert rounded["distance"]["largest_loss"] > 0
    assert rounded["same_weights"] == [False, False]
    assert ROUNDED not in contestants(folder, FP32)


def test_the_page_has_a_row_for_every_contestant(folder: Path) -> None:
    page = (folder / "losslessness.md").read_text(encoding="utf-8")
    assert all(f"| {name} |" in page for name in contestants(folder, BF16))
    assert (folder / "losslessness.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_the_largest_difference_is_over_all_steps_and_seeds() -> None:
    curves = {
        BASELINE: Curves(losses=[[2.0, 1.0], [3.0, 1.5]], accuracies=[[0.5], [0.75]]),
        OURS: Curves(losses=[[2.0, 1.25], [2.5, 1.5]], accuracies=[[0.5], [0.5]]),
    }
    summary = summarise(curves)
    distance = summary["contestants"][OURS]["distance"]
    assert distance == {"largest_loss": 0.5, "mean_loss": 0.1875, "largest_accuracy": 0.25}
    assert summary["between_seeds"] == {"largest_loss": 1.0, "mean_loss": 0.75, "largest_accuracy": 0.25}


@pytest.mark.parametrize(
    ("ours", "expected"),
    [([1.0, math.nan], math.nan), ([math.nan, 1.0], math.nan), ([1.0, math.inf], math.inf)],
)
@pytest.mark.parametrize("swapped", [False, True])
def test_a_loss_that_is_not_finite_is_never_called_exact(
    ours: list[float], expected: float, swapped: bool
) -> None:
    losses = [[1.0, 1.0], ours]
    first, second = reversed(losses) if swapped else losses
    curves = {BASELINE: Curves([first], [[0.5]], [True]), OURS: Curves([second], [[0.5]], [True])}
    distance = summarise({name: double(curve) for name, curve in curves.items()})["contestants"][OURS][
        "distance"
    ]
    assert distance["largest_loss"] == pytest.approx(expected, nan_ok=True)
    text = losslessness._distance_texts(distance)[0]
    assert text == ("nan" if math.isnan(expected) else "∞")


def double(curves: Curves) -> Curves:
    """The same for two seeds, between which there is a distance."""
    return Curves(curves.losses * 2, curves.accuracies * 2, curves.same_weights * 2)


def test_losses_that_are_infinite_on_both_sides_are_not_called_exact() -> None:
    curves = double(Curves([[1.0, math.inf]], [[0.5]], [True]))
    summary = summarise({BASELINE: curves, OURS: curves})
    assert math.isnan(summary["contestants"][OURS]["distance"]["largest_loss"])


@pytest.mark.parametrize(
    ("steps", "expected"), [(5, [1, 2, 3, 4, 5]), (8, [1, 2, 3, 4, 5, 6, 7, 8]), (124, None)]
)
def test_the_accuracy_is_measured_at_equal_distances_and_after_the_last_step(
    steps: int, expected: list[int] | None
) -> None:
    tested = steps_tested(steps)
    assert tested == expected or (len(tested) == TESTS and tested[-1] == steps)


def test_a_training_that_diverges_and_has_fewer_steps_than_tests_is_reported_and_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = 1437 // 256
    finite, lost = [1.0] * steps, [1.0, math.inf, *[math.nan] * (steps - 2)]
    tests = [[0.5] * len(steps_tested(steps))]
    curves = {
        BASELINE: double(Curves([finite], tests, [True])),
        FUSED: double(Curves([lost], tests, [False])),
        OURS: double(Curves([lost], tests, [False])),
    }
    monkeypatch.setattr(losslessness, "train_all", lambda *arguments: curves)
    losslessness.main([*OPTIONS, "--batch-size", "256", "--output", str(tmp_path)])
    page = (tmp_path / "losslessness.md").read_text(encoding="utf-8")
    assert f"| {OURS} | nan |" in page and "measured 5 times" in page
    assert (tmp_path / "losslessness.png").exists()
