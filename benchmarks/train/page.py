"""The page and the picture of a result of benchmarks.train."""

from __future__ import annotations

import itertools
import statistics
from pathlib import Path
from typing import Any

from benchmarks.lib import report
from benchmarks.lib.harness import Spread
from benchmarks.lib.names import GRAPH, OURS

LINE_STYLES = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (5, 1.5, 1, 1.5)))


def markdown(result: dict[str, Any]) -> str:
    """Returns the page with one table."""
    header = [
        "contestant",
        "images/s",
        f"speed, {result['baseline']} = 1",
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
    )
    return "\n\n".join(
        [
            "# Training with torch.amp and with fused_tricks",
            f"{result['setting']}. {explanation}",
            report.table(header, rows),
            f"Loading a batch, once for all: {Spread(**result['data_ms']).text(1)} ms.",
            "![The table as a picture](train.png)",
            report.machine_note(result["machine"]),
            "benchmarks/README.md says what each column counts.\n",
        ]
    )


def picture(result: dict[str, Any], path: Path) -> None:
    """Draws the table as panels of bars, the parts of a step's time, and the training loss."""
    rows = {name: row for name, row in result["contestants"].items() if row["passed"]}
    names = list(rows)
    colour = report.colours(names, [name for name in names if name.startswith(OURS)])
    pyplot = report.plotting()
    figure, panels = pyplot.subplot_mosaic(
        [["speed", "optimizer", "memory", "accuracy"], ["time", "time", "loss", "loss"]],
        figsize=(13.5, 7.6),
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
        mean = 100 * row["accuracy_mean"]
        panels["accuracy"].plot(percent, [place] * len(percent), "o", color=colour[place], markersize=8)
        panels["accuracy"].plot(mean, place, "|", color="black", markersize=18, markeredgewidth=1.6)
        panels["accuracy"].text(mean, place - 0.36, f"{mean:.2f}", ha="center", va="center", fontsize=9)
        parts = [row[f"{part}_ms"]["median"] for part in ("forward", "backward", "optimizer")]
        begins = [0.0, parts[0], parts[0] + parts[1]]
        panels["time"].barh(place, parts[0], height=0.68, color=colour[place], alpha=0.7)
        panels["time"].barh(place, parts[1], left=begins[1], height=0.68, color=colour[place])
        panels["time"].barh(place, parts[2], left=begins[2], height=0.68, color=report.MARK_COLOUR)
        panels["time"].text(
            sum(parts) * 1.01, place, " + ".join(f"{part:.1f}" for part in parts), va="center"
        )
    report.dress(panels["accuracy"], "Test accuracy (%)", "dots: seeds · higher")
    panels["accuracy"].margins(x=0.25)
    panels["accuracy"].locator_params(axis="x", nbins=5)
    panels["accuracy"].set_ylim(len(names) - 0.4, -0.7)
    report.dress(
        panels["time"], "Time of a step (ms): forward (light), backward, optimizer (orange)", "lower"
    )
    panels["time"].margins(x=0.2)
    panels["time"].invert_yaxis()
    for panel in ("speed", "optimizer", "memory", "accuracy", "time"):
        panels[panel].set_yticks(
            range(len(names)), names if panel in ("speed", "time") else [""] * len(names)
        )

    for name, line_colour, style in zip(names, colour, itertools.cycle(LINE_STYLES)):
        losses = [statistics.fmean(step) for step in zip(*rows[name]["losses"])]
        smooth = [statistics.fmean(losses[max(0, end - 10) : end]) for end in range(1, len(losses) + 1)]
        panels["loss"].plot(smooth, color=line_colour, linestyle=style, linewidth=1.5, label=name)
    report.dress(panels["loss"], "Training loss, mean of all seeds and of 10 steps", "")
    panels["loss"].set_xlabel("step", color="#555555")
    panels["loss"].set_yscale("log")
    panels["loss"].legend(frameon=False)
    report.save_figure(
        figure,
        path,
        "fused_tricks and torch.amp, trained side by side",
        result["setting"] + ". Bars are medians, black lines quartiles.",
        result["machine"],
    )


def _row(name: str, row: dict[str, Any], length: int) -> list[str]:
    if not row["passed"]:
        return [name, row["check"], *["–"] * (length - 3), "**no**"]
    whole = name.endswith(GRAPH)
    return [
        name,
        Spread(**row["images_per_second"]).text(0),
        Spread(**row["speed_over_baseline"]).text(3),
        Spread(**row["forward_ms"]).text(1) + (" in all" if whole else ""),
        "–" if whole else Spread(**row["backward_ms"]).text(1),
        "–" if whole else Spread(**row["optimizer_ms"]).text(2),
        "–" if whole else Spread(**row["optimizer_host_us"]).text(0),
        Spread(**row["peak_memory_mib"]).text(1),
        report.mean_text(row["accuracy_mean"], row["accuracy_std"], 100, 2),
        row["check"],
    ]
