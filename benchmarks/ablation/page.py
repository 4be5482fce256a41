"""The page and the picture of the ablation."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.ablation.recipe import MOMENTUM, WEIGHT_DECAY
from benchmarks.ablation.summary import Difference
from benchmarks.lib import report

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Top-1 accuracy in % from the paper's Table 4: ResNet-50 on ImageNet, batch 256 in the first row, 1024 in the rest.
IN_THE_PAPER = {
    "small batch": 75.87,
    "+ linear scaling": 75.17,
    "+ warm-up": 75.93,
    "+ zero γ": 76.37,
    "+ no bias decay": 76.03,
    "+ low precision": 76.21,
}
# From Okabe and Ito's palette, for readers with any colour vision; the marker also distinguishes the depths.
STYLES = (("#D55E00", "o"), ("#0072B2", "s"), ("#009E73", "^"), ("#CC79A7", "D"), ("#000000", "v"))
COLLAPSE = 0.05
"""The loss of accuracy to the small batch beyond which a training counts as collapsed."""
LABEL_WIDTH = 0.25
"""The least distance between two labels of lines, as a share of the panel's width."""
LEAST_SEEDS = 3
"""The least number of seeds for a confidence interval: that of two reaches far beyond all accuracies."""
DODGE = 0.14
"""The distance between the lines of two depths in a row, in rows."""


def _in_the_paper(name: str) -> str:
    """Returns a row's accuracy in the paper's table and, in brackets, its change to the row before there."""
    if name not in IN_THE_PAPER:
        return "–"
    change = _change_in_the_paper(name)
    return f"{IN_THE_PAPER[name]:.2f}" + (f" ({change})" if change else "")


def _change_in_the_paper(name: str) -> str:
    """Returns a row's change to the row before in the paper's table; empty for the first row and for other rows."""
    rows = list(IN_THE_PAPER)
    if name not in rows[1:]:
        return ""
    before = rows[rows.index(name) - 1]
    return f"{IN_THE_PAPER[name] - IN_THE_PAPER[before]:+.2f}"


def _change(row: dict[str, Any], what: str, to: str) -> Difference:
    return Difference(**row[what][to])


def _change_text(row: dict[str, Any], what: str, to: str, factor: float, decimals: int) -> str:
    """Returns the mean change, with its confidence interval if there are enough seeds."""
    change = _change(row, what, to)
    if _is_judged(row) or change.diverged:
        return change.text(factor, decimals)
    return f"{factor * change.mean:+.{decimals}f}"


def _is_judged(row: dict[str, Any]) -> bool:
    return len(row["accuracy"]["seeds"]) >= LEAST_SEEDS


def _listed(words: Sequence[str]) -> str:
    """Returns `a`, `a and b`, or `a, b and c`."""
    *rest, last = words
    return f"{', '.join(rest)} and {last}" if rest else last


def markdown(result: dict[str, Any]) -> str:
    """Returns the page: accuracies and changes of all depths, each depth in detail, and the method."""
    depths = result["depths"]
    some_rows = next(iter(depths.values()))
    depth_names = [f"{depth} layers" for depth in depths]
    seeds = [
        f"{len(rows['small batch']['accuracy']['seeds'])} at {depth} layers" for depth, rows in depths.items()
    ]
    accuracies = [
        [
            name,
            str(row["batch_size"]),
            f"{row['lr']:g}",
            str(row["steps"]),
            *(_accuracy_text(rows[name]) for rows in depths.values()),
            _in_the_paper(name),
        ]
        for name, row in some_rows.items()
    ]
    later = list(some_rows)[1:]
    changes = [
        [
            name,
            *(_change_text(rows[name], "accuracy", "to_row_before", 100, 2) for rows in depths.values()),
            _change_in_the_paper(name) or "–",
        ]
        for name in later
    ]
    parts = [
        "# The paper's ablation, on small images, by depth",
        f"Residual networks {result['setting']}, learning rate {result['lr']:g} for a batch of 256. Each row has the "
        f"tricks of the rows before it and one more. Seeds: {_listed(seeds)}.",
        "![Test error over the rows, a line for each depth](ablation.png)",
        "## Test accuracy, %",
        report.table(
            ["trained with", "batch", "learning rate", "updates", *depth_names, "the paper's top-1"],
            accuracies,
        ),
        "Mean ± standard deviation over seeds, and the lowest seed in brackets. The paper's column is Table 4 "
        "(ResNet-50 on ImageNet, batch 256 in the first row, 1024 below), with the change to the row "
        "before in brackets.",
        "## Change to the row before, points",
        report.table(["trained with", *depth_names, "in the paper"], changes),
        "A difference is taken seed by seed. Its mean stands before its "
        f"{result['confidence']:.0%} confidence interval (Student's t, pairs). "
        "**Bold**: the interval excludes zero. Other changes with an interval are within noise. A change of fewer than "
        f"{LEAST_SEEDS} seeds has no interval.",
        "\n".join(
            f"- *{name.removeprefix('+ ')}* {_verdicts(name, depths)}.{_collapses(before, name, depths)}"
            for before, name in itertools.pairwise(some_rows)
        ),
        f"A seed *collapses* if its accuracy is more than {100 * COLLAPSE:g} points below that of its small batch.",
    ]
    for depth, rows in depths.items():
        parts += [f"## {depth} layers", _details(rows)]
    return "\n\n".join([*parts, "## Method", _method(result), report.machine_note(result["machine"]) + "\n"])


def _accuracy_text(row: dict[str, Any]) -> str:
    accuracy = row["accuracy"]
    mean = report.mean_text(accuracy["mean"], accuracy["std"], 100, 2)
    return f"{mean} ({100 * min(accuracy['seeds']):.1f})"


def _verdicts(name: str, depths: dict[str, dict[str, Any]]) -> str:
    """Returns at which depths a trick gains accuracy, costs accuracy, does neither beyond noise, or is not judged."""
    found: dict[str, list[str]] = {}
    for depth, rows in depths.items():
        change = _change(rows[name], "accuracy", "to_row_before")
        if not _is_judged(rows[name]):
            verdict = "has too few seeds"
        elif change.within_noise:
            verdict = "is within noise"
        else:
            verdict = "helps" if change.mean > 0 else "costs accuracy"
        found.setdefault(verdict, []).append(depth)
    return "; ".join(f"{verdict} at {_listed(at)} layers" for verdict, at in found.items())


def _collapses(before: str, name: str, depths: dict[str, dict[str, Any]]) -> str:
    """Returns a sentence with the seeds that collapse without and with a trick; empty if no seed does."""
    found = []
    for depth, rows in depths.items():
        without, with_trick = _collapsed(rows, before), _collapsed(rows, name)
        if without or with_trick:
            count = len(rows[name]["accuracy"]["seeds"])
            found.append(f"{without} → {with_trick} of {count} at {depth} layers")
    return f" Collapsed seeds: {_listed(found)}." if found else ""


def _collapsed(rows: dict[str, Any], name: str) -> int:
    """Returns the number of seeds of a row whose accuracy is far below that of their small batch."""
    pairs = zip(rows["small batch"]["accuracy"]["seeds"], rows[name]["accuracy"]["seeds"])
    return sum(accuracy < small_batch - COLLAPSE for small_batch, accuracy in pairs)


def _details(rows: dict[str, Any]) -> str:
    """Returns the table of one depth."""
    header = ["trained with", "test accuracy of each seed, %", "to the small batch, points", "test loss"]
    header.append("loss, to the row before")
    lines = []
    for place, (name, row) in enumerate(rows.items()):
        accuracy, loss = row["accuracy"], row["loss"]
        lines.append(
            [
                name,
                ", ".join(f"{100 * value:.1f}" for value in accuracy["seeds"]),
                _change_text(row, "accuracy", "to_first_row", 100, 2) if place else "",
                report.mean_text(loss["mean"], loss["std"], 1, 3),
                _change_text(row, "loss", "to_row_before", 1, 3) if place else "",
            ]
        )
    return report.table(header, lines)


def _method(result: dict[str, Any]) -> str:
    depths, images = result["depths"], result["images"]
    count = sum(len(rows) - 1 for rows in depths.values() if _is_judged(rows["small batch"]))
    return f"""\
- All rows of a seed begin with the same weights and train on the same images in the same order, cut into batches of
  their size. All rows see equally many images, so the large batch has proportionally fewer updates.
- The networks are the residual networks for CIFAR-10 of arXiv 1512.03385, with 6 · n + 2 layers. Every row trains with
  `FusedSGD`.
- As in the paper: Nesterov momentum {MOMENTUM:g}, weight decay {WEIGHT_DECAY:g}, learning rate divided by
  ten after each quarter of the training, warm-up for 5/120 of it. *Low precision* is `cast_model` and
  `loss_scale="dynamic"`. *Cosine* replaces the divisions by ten.
- {images["train"]:,} images train, and {images["test"]:,} test: one test image is {100 / images["test"]:.2g} points.
  Seeds vary the weights and the order, not the images.
- The second table has {count} intervals, uncorrected. One in twenty is bold by chance. A seed that collapses
  widens the interval, and a large mean can then be within noise. The collapsed seeds are therefore counted beside it.
- *Diverged*: a loss was infinite, and the difference is undefined.
- The default learning rate, 0.4 for a batch of 256, was chosen with 14 layers by the small batch alone, on two seeds
  that the ablation does not use ([pilot](ablation_pilot.md)). It had the lowest test loss of the first seed. With both
  seeds 0.8 was lower, by less than the seeds differ. Every depth has the same rate.
- The default depths were chosen after trials of two seeds with linear scaling, warm-up and zero γ at 56 and 110 layers.
  The warm-up was one epoch in a first trial at 14 layers, and then became the paper's share.
- The paper trains ResNet-50 on ImageNet, for 120 epochs of 5,000 updates (batch 256) or 1,250 (batch 1024). Its Table 4
  has neither the large batch without linear scaling nor the cosine."""


def picture(result: dict[str, Any], path: Path) -> None:
    """Draws the test error of every row, a line for each depth, beside the paper's changes."""
    depths = result["depths"]
    names = list(next(iter(depths.values())))
    pyplot = report.plotting()
    figure, panels = pyplot.subplot_mosaic(
        [["error", "paper"]], figsize=(8.2, 6.6), width_ratios=[1, 0.26], layout="constrained"
    )
    axes = panels["error"]
    errors = {
        depth: [[100 * (1 - value) for value in rows[name]["accuracy"]["seeds"]] for name in names]
        for depth, rows in depths.items()
    }
    ends = {}
    middle = (len(errors) - 1) / 2
    for index, ((depth, of_rows), (colour, marker)) in enumerate(
        zip(errors.items(), itertools.cycle(STYLES))
    ):
        # Equal errors of two depths stay visible side by side.
        places = [place + DODGE * (index - middle) for place in range(len(names))]
        for place, values in zip(places, of_rows):
            axes.plot(
                values,
                [place] * len(values),
                marker,
                color=colour,
                alpha=0.35,
                markersize=7,
                markeredgewidth=0,
            )
        means = [sum(values) / len(values) for values in of_rows]
        axes.plot(means, places, f"{marker}-", color=colour, linewidth=2.5, markersize=8.5)
        ends[f"{depth} layers"] = (means[-1], colour)
    drawn = [value for of_rows in errors.values() for values in of_rows for value in values]
    axes.margins(x=0.08)
    scale = _log_axis(axes, drawn)
    report.dress(axes, "Test error (%)", f"{scale}; faint: single seeds · lower")
    axes.set_ylim(len(names) - 0.2, -0.5)
    axes.set_yticks(range(len(names)), names)
    _label(axes, ends, len(names) - 0.45)
    _paper_column(panels["paper"], names)
    for panel in panels.values():
        panel.tick_params(labelsize=13)
        panel.title.set_fontsize(13)
        panel.xaxis.label.set_fontsize(12)
    report.save_figure(
        figure,
        path,
        "The paper's tricks, one after another, by depth",
        f"Residual networks {result['setting']}",
        result["machine"],
    )


def _log_axis(axes: Axes, values: Sequence[float]) -> str:
    """Makes the horizontal axis logarithmic, or linear next to zero if a value is zero, and returns its name."""
    from matplotlib.ticker import LogLocator, SymmetricalLogLocator

    smallest = min((value for value in values if value > 0), default=1.0)
    if min(values) > 0:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        name = "logarithmic"
    else:
        axes.set_xscale("symlog", linthresh=smallest, linscale=0.3)
        axes.xaxis.set_major_locator(SymmetricalLogLocator(base=10, linthresh=smallest, subs=(1, 2, 5)))
        name = f"symmetric logarithmic, linear below {smallest:.2g}"
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("")
    return name


def _label(axes: Axes, ends: dict[str, tuple[float, str]], height: float) -> None:
    """Writes a label under the end of each line, in its colour, with labels far enough from each other to be read."""
    axes.autoscale_view()
    to_share = axes.transData + axes.transAxes.inverted()
    ordered = sorted(ends.items(), key=lambda item: item[1][0])
    shares = [float(to_share.transform((value, 0))[0]) for _, (value, _) in ordered]
    spread = list(shares)
    for place in range(1, len(spread)):
        spread[place] = max(spread[place], spread[place - 1] + LABEL_WIDTH)
    centring = (sum(spread) - sum(shares)) / len(shares)
    shift = min(max(-centring, LABEL_WIDTH / 2 - spread[0]), 1 - LABEL_WIDTH / 2 - spread[-1])
    for (text, (_, colour)), share in zip(ordered, spread):
        axes.text(
            share + shift,
            height,
            text,
            transform=axes.get_yaxis_transform(),
            color=colour,
            fontsize=13,
            fontweight="bold",
            ha="center",
            va="center",
        )


def _paper_column(axes: Axes, names: Sequence[str]) -> None:
    report.dress(axes, "Paper's Table 4", "")
    axes.set_xlabel("change of top-1\nerror, points", color="#555555")
    axes.spines[:].set_visible(False)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_ylim(len(names) - 0.2, -0.5)
    for place, name in enumerate(names):
        change = _change_in_the_paper(name)
        # The picture has errors, and the table has accuracies.
        text = change.translate(str.maketrans("+-", "-+")) if change else "–"
        axes.text(0.5, place, text, ha="center", va="center", fontsize=13)
