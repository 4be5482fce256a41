"""The ablation adds one trick a row at each depth, continues after a kill, and tells an effect from noise."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

pytest.importorskip("matplotlib", reason="the benchmarks draw with matplotlib")
pytest.importorskip("sklearn", reason="the benchmarks take their smallest data set from scikit-learn")
pytest.importorskip("torchvision", reason="the benchmarks take their networks from torchvision")
pytest.importorskip("tqdm", reason="the benchmarks show their progress with tqdm")
pytest.importorskip("scipy", reason="the ablation takes Student's t from scipy")

from scipy import stats

from benchmarks.ablation import __main__ as ablation
from benchmarks.ablation import page as ablation_page
from benchmarks.ablation import pilot as ablation_pilot
from benchmarks.ablation import recipe as ablation_recipe
from benchmarks.ablation.log import OutcomeLog
from benchmarks.ablation.network import small_resnet
from benchmarks.ablation.recipe import ROWS, Outcome, Setting, step_decay
from benchmarks.ablation.summary import Difference
from benchmarks.lib import report

pytestmark = pytest.mark.slow

SMALL = ["--dataset", "digits", "--image-size", "8", "--epochs", "1", "--device", "cpu"]
SMALL += ["--small-batch", "128", "--large-batch", "256"]
OPTIONS = [*SMALL, "--depths", "14", "8", "--seeds", "2", "3"]
TRAININGS = len(ROWS) * (2 + 3)
PILOT_OPTIONS = [*SMALL, "--depth", "8", "--seeds", "2"]
SETTING = Setting(
    torch.device("cpu"), torch.bfloat16, small_batch=16, large_batch=256, lr=0.4, epochs=8, depth=8
)
OUTCOME = Outcome(accuracy=0.1, loss=1 / 3)


def depths_of(folder: Path) -> dict[str, dict[str, Any]]:
    """Returns the rows of a result by depth."""
    result = json.loads((folder / "ablation.json").read_text(encoding="utf-8"))
    depths: dict[str, dict[str, Any]] = result["depths"]
    return depths


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was not interrupted."""
    folder = tmp_path_factory.mktemp("ablation")
    ablation.main([*OPTIONS, "--output", str(folder)])
    return folder


def test_every_row_of_every_depth_is_reported_with_all_its_seeds(finished: Path) -> None:
    depths = depths_of(finished)
    assert list(depths) == ["8", "14"]
    for depth, seeds in (("8", 3), ("14", 2)):
        assert list(depths[depth]) == [row.name for row in ROWS]
        for row in depths[depth].values():
            assert len(row["accuracy"]["seeds"]) == len(row["loss"]["seeds"]) == seeds
    page = (finished / "ablation.md").read_text(encoding="utf-8")
    assert "Seeds: 3 at 8 layers and 2 at 14 layers." in page
    assert all(page.count(f"| {row.name} |") >= 3 for row in ROWS)
    assert (finished / "ablation.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_a_killed_run_goes_on_and_ends_with_the_numbers_of_one_that_was_not_killed(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[tuple[int, str, int]] = []

    def killed_in_the_sixth(row, setting, images, seed):
        trained.append((setting.depth, row.name, seed))
        if len(trained) == 6:
            raise KeyboardInterrupt
        return ablation_recipe.train_once(row, setting, images, seed)

    monkeypatch.setattr(ablation, "train_once", killed_in_the_sixth)
    arguments = [*OPTIONS, "--output", str(tmp_path)]
    with pytest.raises(KeyboardInterrupt):
        ablation.main(arguments)
    assert not (tmp_path / "ablation.json").exists()
    ablation.main(arguments)
    assert depths_of(tmp_path) == depths_of(finished)
    assert len(trained) == TRAININGS + 1 and trained[5] == trained[6]
    assert not (tmp_path / "ablation.jsonl").exists()


def test_a_line_that_was_cut_off_is_trained_again(tmp_path: Path) -> None:
    path = tmp_path / "log"
    log = OutcomeLog(path, {"lr": 0.1})
    log.add((8, "a", 0), OUTCOME)
    log.add((14, "a", 0), OUTCOME)
    path.write_bytes(path.read_bytes()[:-5])
    again = OutcomeLog(path, {"lr": 0.1})
    assert again.outcomes == {(8, "a", 0): OUTCOME}
    again.add((14, "a", 0), OUTCOME)
    assert OutcomeLog(path, {"lr": 0.1}).outcomes == {(8, "a", 0): OUTCOME, (14, "a", 0): OUTCOME}


def test_outcomes_of_another_setting_are_refused_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "log"
    OutcomeLog(path, {"lr": 0.1, "epochs": 2}).add((8, "a", 0), OUTCOME)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="begun with another lr: delete it"):
        OutcomeLog(path, {"lr": 0.2, "epochs": 2})
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "text",
    [
        '{"depth": 8, "row": "a", "seed": 0}\n',
        "[]\n",
        "no JSON\n",
        '{"made_with": {}}\n{}\n',
        '{"made_with": {}}\n{"row": "a", "seed": 0, "accuracy": 0, "loss": 0}\n',
    ],
)
def test_a_log_that_does_not_say_what_it_was_made_with_is_refused_and_kept(tmp_path: Path, text: str) -> None:
    path = tmp_path / "log"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match="log cannot be gone on with, .*: delete it to begin anew"):
        OutcomeLog(path, {})
    assert path.read_text(encoding="utf-8") == text


def test_each_row_has_one_trick_more_than_the_row_before() -> None:
    tricks = [{name for name, on in asdict(row).items() if on is True} for row in ROWS]
    assert tricks[0] == set()
    assert [len(after - before) for before, after in itertools.pairwise(tricks)] == [1] * 7
    assert all(before < after for before, after in itertools.pairwise(tricks))


def test_the_papers_numbers_stand_beside_the_rows_that_they_are_for() -> None:
    names = [row.name for row in ROWS]
    assert [name for name in names if name in ablation_page.IN_THE_PAPER] == list(ablation_page.IN_THE_PAPER)


@pytest.mark.parametrize(
    ("place", "batch", "lr", "steps", "warmup"),
    [(0, 16, 0.025, 2000, 0), (1, 256, 0.025, 125, 0), (2, 256, 0.4, 125, 0), (3, 256, 0.4, 125, 5)],
)
def test_a_row_sees_as_many_images_whatever_its_batch(
    place: int, batch: int, lr: float, steps: int, warmup: int
) -> None:
    row = ROWS[place]
    assert SETTING.batch_size(row) == batch
    assert SETTING.peak_lr(row) == pytest.approx(lr)
    assert SETTING.steps(row, 4000) == steps
    assert SETTING.warmup_steps(row, 4000) == warmup


def test_step_decay_divides_by_ten_after_each_quarter() -> None:
    factors = [step_decay(8, 0)(t) for t in range(8)]
    assert factors == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01, 0.001, 0.001])
    assert [step_decay(40, 4)(t) for t in range(5)] == [0.25, 0.5, 0.75, 1, 1]


def test_a_difference_is_the_mean_and_students_interval_of_the_pairs() -> None:
    before, after = [0.9, 0.92, 0.95, 0.91], [0.93, 0.93, 0.99, 0.95]
    interval = stats.ttest_rel(after, before).confidence_interval(0.95)
    assert asdict(Difference.between(before, after)) == pytest.approx(
        {"mean": 0.03, "low": interval.low, "high": interval.high}
    )


@pytest.mark.parametrize(
    ("difference", "text"),
    [
        (Difference(0.01, 0.002, 0.018), "**+1.0 (+0.2 … +1.8)**"),
        (Difference(-0.01, -0.03, 0.01), "-1.0 (-3.0 … +1.0)"),
        (Difference.between([1.0, 2.0], [1.0, math.inf]), "diverged"),
        (Difference.between([math.inf, math.inf], [1.0, math.inf]), "diverged"),
    ],
)
def test_only_a_difference_beyond_noise_is_in_bold(difference: Difference, text: str) -> None:
    assert difference.text(100, 1) == text


@pytest.mark.parametrize("depth", [8, 20])
def test_the_network_has_the_layers_of_its_depth_and_classes_outputs(depth: int) -> None:
    network = small_resnet(classes=7, depth=depth)
    on_the_path = [
        name
        for name, module in network.named_modules()
        if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)) and "downsample" not in name
    ]
    assert len(on_the_path) == depth
    assert network(torch.randn(2, 3, 16, 16)).shape == (2, 7)


@pytest.mark.parametrize("depth", [-4, 2, 13, 57])
def test_a_depth_that_the_network_cannot_have_is_refused(depth: int) -> None:
    with pytest.raises(ValueError, match=f"depth must be 6 · n \\+ 2 layers, such as .*, got {depth}$"):
        small_resnet(classes=7, depth=depth)


def test_a_training_that_diverges_has_an_infinite_loss_and_a_finite_accuracy() -> None:
    _, (setting, _), images = ablation.parse([*OPTIONS, "--lr", "1e30"])
    outcome = ablation_recipe.train_once(ROWS[0], setting, images, seed=0)
    assert math.isinf(outcome.loss)
    assert 0 <= outcome.accuracy < 0.5


def test_depths_have_one_number_of_seeds_for_all_or_one_each() -> None:
    depths = ["--depths", "14", "8", "20"]
    assert ablation.parse([*SMALL, *depths, "--seeds", "2"])[0].seeds == [2, 2, 2]
    options, settings, _ = ablation.parse([*SMALL, *depths, "--seeds", "4", "3", "2"])
    assert options.seeds == [4, 3, 2]
    assert [setting.depth for setting in settings] == [14, 8, 20]


def test_trainings_run_depth_by_depth_in_the_order_of_the_command_line_and_seed_by_seed() -> None:
    options, settings, _ = ablation.parse(OPTIONS)
    keys = list(ablation.planned(settings, options.seeds))
    assert keys == [(14, row.name, seed) for seed in range(2) for row in ROWS] + [
        (8, row.name, seed) for seed in range(3) for row in ROWS
    ]


def test_more_seeds_of_a_depth_train_only_what_the_log_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[tuple[int, int]] = []

    def train_once(row, setting, images, seed):
        trained.append((setting.depth, seed))
        return OUTCOME

    monkeypatch.setattr(ablation, "train_once", train_once)
    arguments = [*SMALL, "--output", str(tmp_path)]
    # The page fails, so the log stays, as after a kill.
    with monkeypatch.context() as broken, pytest.raises(ZeroDivisionError):
        broken.setattr(ablation_page, "markdown", lambda result: 1 / 0)
        ablation.main([*arguments, "--depths", "14", "8", "--seeds", "2"])
    trained.clear()
    ablation.main([*arguments, "--depths", "8", "14", "--seeds", "3", "2"])
    assert trained == [(8, 2)] * len(ROWS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds", "1"], "argument --seeds: must be at least 2"),
        (
            ["--seeds", "2", "3", "4"],
            "--seeds: got 3 numbers for 2 depths; give one number, or one for each depth",
        ),
        (
            ["--depths", "14", "15"],
            "argument --depths: must be 6 · n + 2 layers, such as 8, 14, 56 or 110, got 15",
        ),
        (["--depths", "8", "8"], "--depths: each depth must be given once, got 8 8"),
        (["--lr", "-0.1"], "argument --lr: must be a finite number above 0, got -0.1"),
        (["--lr", "0"], "argument --lr: must be a finite number above 0"),
        (["--lr", "nan"], "argument --lr: must be a finite number above 0"),
        (["--lr", "inf"], "argument --lr: must be a finite number above 0"),
        (["--epochs", "0"], "argument --epochs: must be at least 1"),
        (["--large-batch", "2000"], "--large-batch 2000: digits has only 1437 images"),
        (["--dataset", "cifar10"], "name its folder with --data"),
    ],
    ids=str,
)
def test_the_ablation_refuses_a_command_line_that_cannot_be_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as raised:
        ablation.main([*OPTIONS, "--output", str(tmp_path), *arguments])
    assert raised.value.code == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def diverges_in_a_large_batch(row, setting, images, seed):
    """One seed of every row with a large batch; the small batch makes no error."""
    return Outcome(1.0, 0.0) if not row.large_batch else replace(OUTCOME, loss=(0.5, math.inf)[seed % 2])


def test_a_training_that_diverges_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ablation, "train_once", diverges_in_a_large_batch)
    ablation.main([*OPTIONS, "--output", str(tmp_path)])
    page = (tmp_path / "ablation.md").read_text(encoding="utf-8")
    lines = [line for line in page.splitlines() if line.startswith("| + warm-up | 10.0, ")]
    assert len(lines) == 2 and all("| ∞ | diverged |" in line for line in lines)
    assert depths_of(tmp_path)["14"]["+ warm-up"]["loss"]["seeds"] == [0.5, "inf"]


def helps_where_deep(row, setting, images, seed):
    """Zero γ costs accuracy in 8 layers and gains accuracy in 14, and every other trick does nothing beyond noise."""
    gain = 0.1 if setting.depth == 14 else -0.1
    return Outcome(0.5 + gain * row.zero_gamma + 0.01 * row.warmup * (-1) ** seed, 1.0)


def test_the_page_tells_at_which_depths_a_trick_helps_and_at_which_it_costs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ablation, "train_once", helps_where_deep)
    ablation.main([*SMALL, "--depths", "14", "8", "20", "--seeds", "4", "--output", str(tmp_path)])
    lines = (tmp_path / "ablation.md").read_text(encoding="utf-8").splitlines()
    (zero_gamma,) = (line for line in lines if line.startswith("- *zero γ*"))
    assert "costs accuracy at 8 and 20 layers; helps at 14 layers." in zero_gamma
    assert "- *warm-up* is within noise at 8, 14 and 20 layers." in lines
    assert "| + zero γ | **-10.00 (-10.00 … -10.00)** | **+10.00 (+10.00 … +10.00)** |" in "".join(lines)


def test_a_change_of_two_seeds_has_no_interval_and_no_verdict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ablation, "train_once", helps_where_deep)
    ablation.main([*SMALL, "--depths", "14", "8", "--seeds", "3", "2", "--output", str(tmp_path)])
    page = (tmp_path / "ablation.md").read_text(encoding="utf-8")
    assert "| + zero γ | -10.00 | **+10.00 (+10.00 … +10.00)** |" in page
    assert "- *zero γ* has too few seeds at 8 layers; helps at 14 layers." in page


def test_the_page_counts_the_seeds_that_collapse_without_and_with_a_trick(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def saved_by_zero_gamma(row, setting, images, seed):
        breaks = setting.depth == 14 and seed != 1 and row.linear_scaling and not row.zero_gamma
        return Outcome(0.4 if breaks else 0.96 if row.large_batch else 1.0, 1.0)

    monkeypatch.setattr(ablation, "train_once", saved_by_zero_gamma)
    ablation.main([*SMALL, "--depths", "14", "8", "--seeds", "3", "--output", str(tmp_path)])
    page = (tmp_path / "ablation.md").read_text(encoding="utf-8")
    sentences = {
        line.split("*")[1]: line.partition(" Collapsed seeds: ")[2]
        for line in page.splitlines()
        if line.startswith("- *") and "Collapsed" in line
    }
    assert sentences == {
        "linear scaling": "0 → 2 of 3 at 14 layers.",
        "warm-up": "2 → 2 of 3 at 14 layers.",
        "zero γ": "2 → 0 of 3 at 14 layers.",
    }
    assert "| 58.67 ± 32.33 (40.0) |" in page


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that a benchmark draws, which are not saved."""
    drawn: list[Figure] = []
    monkeypatch.setattr(report, "save_figure", lambda figure, *others: drawn.append(figure))
    return drawn


def error_panel(figure: Figure) -> Axes:
    (panel,) = (axes for axes in figure.axes if axes.get_title(loc="left") == "Test error (%)")
    figure.canvas.draw()
    return panel


def test_the_picture_has_a_line_and_a_label_of_its_colour_for_each_depth(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, figures: list[Figure]
) -> None:
    monkeypatch.setattr(ablation, "train_once", helps_where_deep)
    ablation.main([*SMALL, "--depths", "14", "8", "20", "--seeds", "2", "--output", str(tmp_path)])
    panel = error_panel(figures[0])
    lines = {line.get_color(): line for line in panel.lines if line.get_linestyle() == "-"}
    labels = {text.get_text(): text.get_color() for text in panel.texts}
    assert list(labels) == ["14 layers", "8 layers", "20 layers"] and len(set(labels.values())) == 3
    zero_gamma = [row.name for row in ROWS].index("+ zero γ")
    errors = {name: lines[colour].get_xydata()[zero_gamma, 0] for name, colour in labels.items()}
    assert errors == pytest.approx({"14 layers": 40, "8 layers": 60, "20 layers": 60})
    assert panel.get_xscale() == "log" and panel.get_xlabel().startswith("logarithmic;")


def test_the_labels_of_equal_lines_do_not_cover_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, figures: list[Figure]
) -> None:
    monkeypatch.setattr(ablation, "train_once", lambda *arguments: OUTCOME)
    ablation.main([*SMALL, "--depths", "56", "80", "110", "--seeds", "2", "--output", str(tmp_path)])
    panel = error_panel(figures[0])
    boxes = [text.get_window_extent() for text in panel.texts]
    assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))
    frame = panel.get_window_extent()
    assert frame.x0 <= min(box.x0 for box in boxes) and max(box.x1 for box in boxes) <= frame.x1


def test_an_error_of_zero_is_in_the_picture_and_its_axis_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, figures: list[Figure]
) -> None:
    monkeypatch.setattr(ablation, "train_once", diverges_in_a_large_batch)
    ablation.main([*OPTIONS, "--output", str(tmp_path)])
    panel = error_panel(figures[0])
    left, right = panel.transAxes.transform([(0, 0), (1, 0)])[:, 0]
    assert left < panel.transData.transform((0, 0))[0] < right
    assert panel.get_xlabel().startswith("symmetric logarithmic, linear below 90;")


def test_the_pilot_calls_no_rate_the_lowest_where_all_diverge(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ablation, "train_once", lambda *arguments: replace(OUTCOME, loss=math.inf))
    ablation_pilot.main([*PILOT_OPTIONS, "--output", str(tmp_path)])
    page = (tmp_path / "ablation_pilot.md").read_text(encoding="utf-8")
    assert "diverged at every learning rate" in page and "| ∞ |" in page


def test_the_pilot_finds_the_rate_of_the_small_batch_on_seeds_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def best_at_two_tenths(row, setting, images, seed):
        distance = abs(math.log(setting.lr / (0.8 if row.large_batch else 0.2)))
        return replace(OUTCOME, loss=distance)

    monkeypatch.setattr(ablation, "train_once", best_at_two_tenths)
    ablation_pilot.main([*PILOT_OPTIONS, "--output", str(tmp_path)])
    result = json.loads((tmp_path / "ablation_pilot.json").read_text(encoding="utf-8"))
    assert result["lowest_loss_at"] == 0.2
    assert set(result["seeds"]).isdisjoint(range(100))
