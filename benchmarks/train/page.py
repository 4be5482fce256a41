"""The page and the picture of a result of benchmarks.train."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.lib import report
from benchmarks.lib.harness import Spread
from benchmarks.lib.names import GRAPH, OURS
from benchmarks.train.contestants import UNSCALED

ANOTHER_RUN = (
    f"*{OURS}* begins from the weights that `cast_model` has rounded, so that its losses and accuracy are those of "
    "another run: a difference between rows is no gain and no loss."
)


def markdown(result: dict[str, Any]) -> str:
    """Returns the page with one table."""
    header = [
        "contestant",
        "images/s",
        f"speed, {result['baseline']} = 1",
        "its time / ours",
        "forward ms",
        "backward ms",
        "optimizer ms",
        "host µs a step",
        "peak memory MiB",
        "test accuracy %",
        "last update checked",
    ]
    rows = [_row(name, row, len(header)) for name, row in result["contestants"].items()]
    explanation = (
        "Numbers are median (lower – upper quartile) over the timed steps of all seeds; speed is the ratio of step "
        "times taken step by step; accuracy is mean ± standard deviation over seeds."
        + (f" {ANOTHER_RUN}" if _rounds(result) else "")
    )
    return "\n\n".join(
        [
            "# Training with torch.amp and with fused_tricks",
            f"{result['setting']}. {explanation}",
            report.table(header, rows),
            *_without_scaler(result),
            f"Loading a batch, once for all: {Spread(**result['data_ms']).text(1)} ms.",
            "![The table as a picture](train.png)",
            report.machine_note(result["machine"]),
            "benchmarks/README.md says what each column counts.\n",
        ]
    )


def _without_scaler(result: dict[str, Any]) -> list[str]:
    """Returns the sentence that compares ours with BF16 without loss scaling, if there is such a row."""
    row = result["contestants"].get(UNSCALED)
    if row is None or not row["passed"]:
        return []
    with_scaler = Spread(**result["contestants"][result["baseline"]]["time_over_ours"])
    without = Spread(**row["time_over_ours"])
    return [
        f"BF16 needs no loss scale, and PyTorch's documentation trains without one: *{OURS}* is "
        f"{without.text(2)} × as fast as *{UNSCALED}*, and {with_scaler.text(2)} × as fast as *{result['baseline']}*."
    ]


def picture(result: dict[str, Any], path: Path) -> None:
    """Draws the table as panels of bars, the parts of a step's time, and the training loss."""
    rows = {name: row for name, row in result["contestants"].items() if row["passed"]}
    names = list(rows)
    ours = [name for name in names if name.startswith(OURS)]
    colour = report.colours(names, ours)
    pyplot = report.plotting()
    figure, panels = pyplot.subplot_mosaic(
        [["speed", "optimizer", "memory", "accuracy"], ["time", "time", "loss", "loss"]],
        figsize=(16, 7.6),
        layout="constrained",
    )
    for panel, column, title, better, decimals in (
        ("speed", "images_per_second", "Throughput (images/s)", "higher", 0),
        ("optimizer", "optimizer_ms", "Optimizer step (ms)", "lower", 2),
        ("memory", "peak_memory_mib", "Peak memory (MiB)", "lower", 0),
    ):
        report.bars(
            panels[panel],
            [Spread(**row[column]) for row in rows.values()],
            colour,
            title=title,
            better=better,
            decimals=decimals,
        )

    for place, row in enumerate(rows.values()):
        percent = [100 * value for value in row["accuracies"]]
        panels["accuracy"].plot(percent, [place] * len(percent), "o", color=colour[place], markersize=8)
        parts = [row[f"{part}_ms"]["median"] for part in ("forward", "backward", "optimizer")]
        begins = [0.0, parts[0], parts[0] + parts[1]]
        panels["time"].barh(place, parts[0], height=0.68, color=colour[place], alpha=0.7)
        panels["time"].barh(place, parts[1], left=begins[1], height=0.68, color=colour[place])
        panels["time"].barh(place, parts[2], left=begins[2], height=0.68, color=report.MARK_COLOUR)
        panels["time"].text(
            sum(parts) * 1.01, place, " + ".join(f"{part:.1f}" for part in parts), va="center"
        )
    report.dress(panels["accuracy"], "Test accuracy (%), dots: seeds", "")
    if _rounds(result):
        panels["accuracy"].set_xlabel(
            f"{OURS} starts from rounded weights:\nanother run, no gain or loss", color="#555555"
        )
    panels["accuracy"].margins(x=0.25)
    panels["accuracy"].locator_params(axis="x", nbins=5)
    panels["accuracy"].set_ylim(len(names) - 0.4, -0.7)
    report.dress(
        panels["time"], "Time of a step (ms): forward (light), backward, optimizer (orange)", "lower"
    )
    panels["time"].margins(x=0.2)
    panels["time"].invert_yaxis()
    labels = {
        "speed": [
            name if name in ours else f"{name}\nours: {rows[name]['time_over_ours']['median']:.2f} × as fast"
            for name in names
        ],
        "time": names,
    }
    for panel in ("speed", "optimizer", "memory", "accuracy", "time"):
        panels[panel].set_yticks(range(len(names)), labels.get(panel, [""] * len(names)))

    loss, ends = panels["loss"], []
    # A thin line on a thick one shows both where they coincide.
    widths = [1.2 + 1.6 * place for place in reversed(range(len(names)))]
    for name, line_colour, width in zip(names, report.line_colours(names, ours), widths):
        losses = _smooth([statistics.fmean(step) for step in zip(*rows[name]["losses"])])
        seeds = list(zip(*map(_smooth, rows[name]["losses"])))
        loss.plot(losses, color=line_colour, linewidth=width)
        if name in (result["baseline"], OURS):
            steps, lowest, highest = range(len(seeds)), list(map(min, seeds)), list(map(max, seeds))
            loss.fill_between(steps, lowest, highest, color=line_colour, alpha=0.15, linewidth=0)
        ends.append((len(losses) - 1, losses[-1], name.removeprefix("torch.amp, "), line_colour))
    report.dress(loss, "Training loss, mean of 10 steps, band over seeds", "")
    loss.set_xlabel("step", color="#555555")
    loss.set_yscale("log")
    loss.margins(x=0)
    report.label_lines(loss, ends)
    report.save_figure(
        figure,
        path,
        "fused_tricks and torch.amp, trained side by side",
        result["setting"] + ". Bars are medians, black lines quartiles.",
        result["machine"],
    )


def _rounds(result: dict[str, Any]) -> bool:
    """True if ours begins from rounded weights, and the other contestants from the weights themselves."""
    return bool(result["dtype"] != "float32")


def _smooth(losses: Sequence[float]) -> list[float]:
    return [statistics.fmean(losses[max(0, end - 10) : end]) for end in range(1, len(losses) + 1)]


def _row(name: str, row: dict[str, Any], length: int) -> list[str]:
    if not row["passed"]:
        return [name, row["check"], *["–"] * (length - 3), "**no**"]
    whole = name.endswith(GRAPH)
    return [
        name,
        Spread(**row["images_per_second"]).text(0),
        Spread(**row["speed_over_baseline"]).text(3),
        Spread(**row["time_over_ours"]).text(2),
        Spread(**row["forward_ms"]).text(1) + (" in all" if whole else ""),
        "–" if whole else Spread(**row["backward_ms"]).text(1),
        "–" if whole else Spread(**row["optimizer_ms"]).text(2),
        "–" if whole else Spread(**row["optimizer_host_us"]).text(0),
        Spread(**row["peak_memory_mib"]).text(1),
        report.mean_text(row["accuracy_mean"], row["accuracy_std"], 100, 2),
        row["check"],
    ]
