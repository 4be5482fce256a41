"""The paper's ablation on small images: the effect of each trick on a large batch, with spreads over seeds.

`python -m benchmarks.ablation` trains every row with every seed. A killed run continues after the last finished
training when it is started again. benchmarks/README.md describes the choice of the setting.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scipy import stats

from benchmarks.ablation import options as ablation_options
from benchmarks.ablation.log import OutcomeLog
from benchmarks.ablation.recipe import ROWS, Outcome, Recipe, Setting, train_once
from benchmarks.lib import data, gpu, machine, progress, report
from benchmarks.lib.command_line import positive, several
from benchmarks.lib.harness import mean_and_deviation

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CONFIDENCE = 0.95
# Top-1 accuracy in % from the paper's Table 4: ResNet-50 on ImageNet, batch 256 in the first row, 1024 in the rest.
IN_THE_PAPER = {
    "small batch": 75.87,
    "+ linear scaling": 75.17,
    "+ warm-up": 75.93,
    "+ zero γ": 76.37,
    "+ no bias decay": 76.03,
    "+ low precision": 76.21,
}


@dataclass(frozen=True)
class Difference:
    """Mean difference between two rows, seed by seed, and the ends of its confidence interval.

    The numbers are not finite if a training diverged, and noise is then undefined.
    """

    mean: float
    low: float
    high: float

    @classmethod
    def between(cls, before: Sequence[float], after: Sequence[float]) -> Difference:
        """Returns the change between two rows with the same seeds, at least two, in the same order (Student's t)."""
        differences = [b - a for a, b in zip(before, after)]
        mean, deviation = mean_and_deviation(differences)
        if deviation is None:
            return cls(mean, math.nan, math.nan)
        error = deviation / len(differences) ** 0.5
        half = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(differences) - 1)) * error
        return cls(mean, mean - half, mean + half)

    @property
    def diverged(self) -> bool:
        """True if a training of one of the rows diverged."""
        return not math.isfinite(self.mean)

    @property
    def within_noise(self) -> bool:
        """True if the interval contains zero."""
        return self.low <= 0 <= self.high

    def text(self, factor: float, decimals: int) -> str:
        """Returns `mean (low … high)`, in bold if it exceeds noise, or `diverged`."""
        if self.diverged:
            return "diverged"
        numbers = (factor * number for number in (self.mean, self.low, self.high))
        text = "{} ({} … {})".format(*(f"{number:+.{decimals}f}" for number in numbers))
        return text if self.within_noise else f"**{text}**"


def parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, Setting, data.Images]:
    """Reads the command line and loads its images."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.ablation",
        description="Trains with the paper's tricks, one more in each row.",
    )
    ablation_options.add_to(parser)
    parser.add_argument("--small-batch", type=positive, default=16)
    parser.add_argument("--large-batch", type=positive, default=256)
    parser.add_argument("--epochs", type=positive, default=8)
    parser.add_argument(
        "--seeds",
        type=several,
        default=5,
        help="repeat every row with this many initial weights and orders",
    )
    options = parser.parse_args(arguments)
    images = ablation_options.load_images(parser, options, ["--small-batch", "--large-batch"])
    device, dtype = ablation_options.device_and_dtype(options)
    setting = Setting(
        device=device,
        dtype=dtype,
        small_batch=options.small_batch,
        large_batch=options.large_batch,
        lr=options.lr,
        epochs=options.epochs,
        blocks=options.blocks,
    )
    return options, setting, images


def describe(options: argparse.Namespace, setting: Setting) -> str:
    """Returns the setting, for the head of a page."""
    return (
        f"{ablation_options.describe(options, setting.device, setting.dtype)}, batch {setting.small_batch} → "
        f"{setting.large_batch}, {setting.epochs} epochs, {options.seeds} seeds"
    )


def open_log(path: Path, options: argparse.Namespace, setting: Setting, record: dict[str, Any]) -> OutcomeLog:
    """Returns the log of finished trainings. Ends the program if they had another setting or machine."""
    made_with = {
        "dataset": options.dataset,
        "data": options.data,
        "image_size": options.image_size,
        **{
            name: value if isinstance(value, (int, float)) else str(value)
            for name, value in asdict(setting).items()
        },
        **{name: record[name] for name in ("cpu", "threads", "gpu", "versions")},
    }
    try:
        return OutcomeLog(path, made_with)
    except ValueError as error:
        sys.exit(str(error))


def train_all(
    rows: Mapping[str, tuple[Recipe, Setting]], images: data.Images, seeds: Sequence[int], log: OutcomeLog
) -> dict[str, list[Outcome]]:
    """Trains the rows that are missing in the log, seed by seed.

    Args:
        rows: The rows by their names in the log.
        images: The images for training and test.
        seeds: The seeds of every row.
        log: The outcomes so far. New outcomes are added.

    Returns:
        The outcomes of every row in the order of the seeds.
    """
    missing = [(name, seed) for seed in seeds for name in rows if (name, seed) not in log.outcomes]
    for name, seed in progress.bar(missing, desc="trainings", unit="training"):
        log.add(name, seed, train_once(*rows[name], images, seed))
    return {name: [log.outcomes[name, seed] for seed in seeds] for name in rows}


def summarise(outcomes: dict[str, list[Outcome]], setting: Setting, count: int) -> dict[str, dict[str, Any]]:
    """Returns the numbers of the table for every row, and the raw numbers of every seed.

    Args:
        outcomes: The outcomes of every row, one for each seed, in the same order in all rows.
        setting: The setting of all rows.
        count: The number of training images.
    """
    summary: dict[str, dict[str, Any]] = {}
    first = before = ROWS[0]
    for row in ROWS:
        columns: dict[str, Any] = {
            "batch_size": setting.batch_size(row),
            "lr": setting.peak_lr(row),
            "steps": setting.steps(row, count),
            "warmup_steps": setting.warmup_steps(row, count),
            "seconds": [outcome.seconds for outcome in outcomes[row.name]],
        }
        for what in ("accuracy", "loss"):
            values, values_before, values_first = (
                [getattr(outcome, what) for outcome in outcomes[name]]
                for name in (row.name, before.name, first.name)
            )
            mean, deviation = mean_and_deviation(values)
            columns[what] = {
                "seeds": values,
                "mean": mean,
                "std": deviation,
                "to_row_before": asdict(Difference.between(values_before, values)),
                "to_first_row": asdict(Difference.between(values_first, values)),
            }
        summary[row.name] = columns
        before = row
    return summary


def _change(row: dict[str, Any], what: str, to: str) -> Difference:
    return Difference(**row[what][to])


def markdown(result: dict[str, Any]) -> str:
    """Returns the page with one table."""
    header = [
        "trained with",
        "batch",
        "learning rate",
        "updates",
        "test accuracy %",
        "to the row before, points",
        "to the small batch, points",
        "test loss",
        "to the row before",
        "the paper's top-1 %",
    ]
    lines = []
    for place, (name, row) in enumerate(result["rows"].items()):
        accuracy, loss = row["accuracy"], row["loss"]
        lines.append(
            [
                name,
                str(row["batch_size"]),
                f"{row['lr']:g}",
                str(row["steps"]),
                report.mean_text(accuracy["mean"], accuracy["std"], 100, 2),
                _change(row, "accuracy", "to_row_before").text(100, 2) if place else "",
                _change(row, "accuracy", "to_first_row").text(100, 2) if place else "",
                report.mean_text(loss["mean"], loss["std"], 1, 3),
                _change(row, "loss", "to_row_before").text(1, 3) if place else "",
                _in_the_paper(name),
            ]
        )
    explanation = (
        "Each row has the tricks of the rows before it and one more. Numbers are mean ± standard deviation over seeds; "
        f"a difference is taken seed by seed, and its mean stands before its {CONFIDENCE:.0%} confidence interval "
        "(Student's t). **Bold**: the interval does not have zero in it. Everything else is "
        "within noise, but for *diverged*: a loss was infinite, and there is no difference to speak of."
    )
    return "\n\n".join(
        [
            "# The paper's ablation, on small images",
            f"{result['setting']}. {explanation}",
            report.table(header, lines),
            "![The table as a picture](ablation.png)",
            report.machine_note(result["machine"]),
            "benchmarks/README.md says how this was set up, and what the paper's experiment had different.\n",
        ]
    )


def _in_the_paper(name: str) -> str:
    """Returns a row's accuracy in the paper's table and, in brackets, its change to the row before there."""
    if name not in IN_THE_PAPER:
        return "–"
    rows = list(IN_THE_PAPER)
    place = rows.index(name)
    change = IN_THE_PAPER[name] - IN_THE_PAPER[rows[place - 1]]
    return f"{IN_THE_PAPER[name]:.2f}" + (f" ({change:+.2f})" if place else "")


def picture(result: dict[str, Any], path: Path) -> None:
    """Draws test error and loss of every row with its seeds, and the change of each row."""
    rows = result["rows"]
    pyplot = report.plotting()
    from matplotlib.ticker import SymmetricalLogLocator

    figure, panels = pyplot.subplot_mosaic(
        [["error", "error change", "loss", "loss change", "paper"]],
        figsize=(16.5, 5.8),
        width_ratios=[1, 1, 1, 1, 0.4],
        layout="constrained",
    )
    for what, title, decimals, linear in (
        ("error", "Test error (%)", 2, 1.0),
        ("loss", "Test loss", 3, 0.05),
    ):
        values_panel, changes_panel = panels[what], panels[f"{what} change"]
        drawn: list[float] = []
        for place, row in enumerate(rows.values()):
            values, mean, std, change = _lower_is_better(row, what)
            finite = [value for value in values if math.isfinite(value)]
            drawn += finite
            values_panel.plot(finite, [place] * len(finite), "o", color=report.GREYS[0], markersize=6)
            if std is not None:
                values_panel.errorbar(mean, place, xerr=std, fmt="|", color="black", markersize=14, capsize=3)
            values_panel.annotate(
                "  " + report.number(mean, f".{decimals}f"),
                (max([*finite, mean + (std or 0)]), place) if std is not None else (1, place),
                xycoords="data" if std is not None else values_panel.get_yaxis_transform(),
                va="center",
                fontsize=9,
            )
            if place == 0 and math.isfinite(mean):
                values_panel.axvline(mean, color=report.GREYS[1], linestyle=":", linewidth=1)
            if place:
                _draw_change(changes_panel, place, change, decimals)
        report.dress(values_panel, title, "dots: seeds · lower")
        # Logarithmic down to the smallest nonzero value, and linear below, so that zero is visible.
        smallest = min((value for value in drawn if value > 0), default=1.0)
        values_panel.set_xscale("symlog", linthresh=smallest, linscale=0.3)
        values_panel.margins(x=0.2)
        values_panel.xaxis.set_major_locator(
            SymmetricalLogLocator(base=10, linthresh=smallest, subs=(1, 2, 5))
        )
        values_panel.xaxis.set_major_formatter("{x:g}")
        values_panel.xaxis.set_minor_formatter("")
        report.dress(changes_panel, "Change to the row before", "grey: within noise · lower")
        changes_panel.axvline(0, color="black", linewidth=0.8)
        changes_panel.set_xscale("symlog", linthresh=linear)
        changes_panel.set_xticks([-10 * linear, -linear, 0, linear, 10 * linear])
        changes_panel.xaxis.set_major_formatter("{x:+g}")
        changes_panel.margins(x=0.15)
    report.dress(panels["paper"], "In the paper", "")
    panels["paper"].set_xlabel("top-1 in %", color="#555555")
    panels["paper"].spines[:].set_visible(False)
    panels["paper"].set_xticks([])
    for place, name in enumerate(rows):
        panels["paper"].text(0, place, _in_the_paper(name), va="center", fontsize=9)
    for name, panel in panels.items():
        panel.set_yticks(range(len(rows)), list(rows) if name == "error" else [""] * len(rows))
        panel.set_ylim(len(rows) - 0.5, -0.5)
    panels["paper"].set_yticks([])
    report.save_figure(
        figure,
        path,
        "The paper's tricks, one after another, on a large batch",
        f"{result['setting']}. Lines: standard deviation; {CONFIDENCE:.0%} confidence interval",
        result["machine"],
    )


def _lower_is_better(row: dict[str, Any], what: str) -> tuple[list[float], float, float | None, Difference]:
    """Returns values of all seeds, mean, deviation and change to the row before, of the error in % or the loss."""
    if what == "loss":
        column = row["loss"]
        return column["seeds"], column["mean"], column["std"], _change(row, "loss", "to_row_before")
    column, change = row["accuracy"], _change(row, "accuracy", "to_row_before")
    return (
        [100 * (1 - value) for value in column["seeds"]],
        100 * (1 - column["mean"]),
        None if column["std"] is None else 100 * column["std"],
        Difference(-100 * change.mean, -100 * change.high, -100 * change.low),
    )


def _draw_change(axes: Axes, place: int, change: Difference, decimals: int) -> None:
    if change.diverged:
        axes.text(0, place, " diverged", va="center", fontsize=9)
        return
    noise = change.within_noise
    axes.errorbar(
        change.mean,
        place,
        xerr=[[change.mean - change.low], [change.high - change.mean]],
        fmt="o",
        color=report.GREYS[1] if noise else report.OURS_COLOUR,
        capsize=3,
    )
    axes.text(
        change.mean,
        place - 0.3,
        f"{change.mean:+.{decimals}f}",
        ha="center",
        fontsize=9,
        fontweight="normal" if noise else "bold",
    )


def main(arguments: Sequence[str]) -> None:
    """Trains the missing rows and writes ablation.json, ablation.md and ablation.png."""
    options, setting, images = parse(arguments)
    gpu.use(setting.device, deterministic=True)
    record = machine.describe("benchmarks.ablation", arguments, setting.device)
    log = open_log(options.output / "ablation.jsonl", options, setting, record)
    outcomes = train_all({row.name: (row, setting) for row in ROWS}, images, range(options.seeds), log)
    result: dict[str, Any] = {
        "benchmark": "ablation",
        "machine": record,
        "setting": f"{describe(options, setting)}, learning rate {setting.lr:g} for a batch of 256",
        "confidence": CONFIDENCE,
        "rows": summarise(outcomes, setting, len(images.train)),  # type: ignore[arg-type]
    }
    report.write(options.output, result, markdown(result), picture)
    log.path.unlink()


if __name__ == "__main__":
    main(sys.argv[1:])
