"""The page and the picture of a result of benchmarks.step."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from benchmarks.lib import report
from benchmarks.lib.harness import Spread
from benchmarks.lib.names import OURS
from benchmarks.step.contestants import COPY

COPY_ON_CPU = f"{COPY} (also reads the lines that it overwrites, uncounted: an update in place can be faster)"


def markdown(result: dict[str, Any]) -> str:
    """Returns the page of tables."""
    on_gpu = result["machine"]["gpu"] is not None
    compiles = any(row["compile_seconds"] for row in result["contestants"].values())
    steps = [
        [
            name,
            Spread(**row["ms"]).text(3 if on_gpu else 2),
            Spread(**row["ours_is_faster_by"]).text(2) if row["ours_is_faster_by"] else "–",
            *([f"{row['rounds_that_waited_for_the_host'] / row['ms']['samples']:.0%}"] if on_gpu else []),
            row["check"],
            *([_compiled_in(row)] if compiles else []),
        ]
        for name, row in result["contestants"].items()
    ]
    failed = {name: why for name, why in result["left_out"].items() if why.startswith("check failed")}
    steps += [
        [name, why, "–", *(["–"] if on_gpu else []), "**no**", *(["–"] if compiles else [])]
        for name, why in failed.items()
    ]
    step_header = ["contestant", "ms a step", "its time / ours", "numbers checked"]
    if on_gpu:
        step_header.insert(3, "waited for the host")
    if compiles:
        step_header.append("compiled in, s")
    works = [
        [
            name,
            f"{row['work']['low_bytes']:g}",
            f"{row['work']['fp32_bytes']:g}",
            f"{row['bytes'] / 1e6:,.1f}",
            f"{row['peak_memory_bytes'] / 1e6:,.1f}",
            row["work"]["keeps"],
            row["work"]["overflow"],
        ]
        for name, row in result["contestants"].items()
    ]
    work_header = [
        "what a step does",
        "bytes, 16-bit element",
        "bytes, FP32 element",
        "MB moved",
        "peak memory, MB",
        "keeps",
        "unscales and skips",
    ]
    bandwidths = [
        [
            COPY_ON_CPU if name == COPY and not on_gpu else name,
            f"{row['bytes'] / 1e6:,.1f}",
            Spread(**row["gb_per_second"]).text(1),
            Spread(**row["share_of_copy"]).text(2),
        ]
        for name, row in result["bandwidth"].items()
    ]
    hosts = [
        [name, Spread(**row["us"]).text(1), Spread(**row["alternating_us"]).text(1)]
        for name, row in result["host"].items()
    ]
    promises = [
        [
            row["what"],
            Spread(**row["spread"]).text(row["decimals"]),
            row["budget"],
            "yes" if row["met"] else "**no**",
        ]
        for row in result["budgets"]
    ]
    left_out = "\n".join(
        f"- {name}: {reason}" for name, reason in result["left_out"].items() if name not in failed
    )
    explanation = (
        "Numbers are median (lower – upper quartile) over rounds; ratios are taken within each round, and where a step "
        "also averages the weights, to ours with an average."
    )
    return "\n\n".join(
        [
            "# The optimizer step alone",
            f"{result['setting']}. {explanation}",
            *([report.table(["what", "measured", "budget", "met"], promises)] if promises else []),
            report.table(step_header, steps),
            *([f"Not measured:\n\n{left_out}"] if left_out else []),
            report.table(work_header, works),
            report.table(["loop", "MB moved", "GB/s", "share of the copy loop"], bandwidths),
            report.table(
                [
                    "host time, 161 one-element parameters",
                    "µs a step, back to back",
                    "µs a step, new gradients, after another's",
                ],
                hosts,
            ),
            "![The tables as a picture](step.png)",
            report.machine_note(result["machine"]),
            "benchmarks/README.md says what each number counts.\n",
        ]
    )


def _in_lines(name: str, on_gpu: bool) -> str:
    if name == COPY and not on_gpu:
        return f"{COPY}, which also reads\nwhat it overwrites, uncounted"
    return re.sub(" (?=with|CUDA|AveragedModel$|timm's|of an)", "\n", name)


def _compiled_in(row: dict[str, Any]) -> str:
    seconds = row["compile_seconds"]
    return f"{seconds:.0f}" if seconds else "–"


def picture(result: dict[str, Any], path: Path) -> None:
    """Draws three panels: time of a step, bandwidth, host time."""
    on_gpu = result["machine"]["gpu"] is not None
    pyplot = report.plotting()
    figure, panels = pyplot.subplot_mosaic(
        [["time", "bandwidth"], ["time", "host"]],
        figsize=(13, max(5.8, 1.6 + 0.5 * len(result["contestants"]))),
        layout="constrained",
        width_ratios=(1.15, 1),
        height_ratios=(len(result["bandwidth"]), len(result["host"])),
    )
    for panel, rows, column, title, better, decimals in (
        ("time", result["contestants"], "ms", "Time of a step (ms)", "lower", 2 if on_gpu else 1),
        ("bandwidth", result["bandwidth"], "gb_per_second", "Memory bandwidth (GB/s)", "higher", 1),
        ("host", result["host"], "us", "Host time, 161 one-element parameters (µs)", "lower", 0),
    ):
        names = list(rows)
        report.bars(
            panels[panel],
            [Spread(**row[column]) for row in rows.values()],
            report.colours(names, [name for name in names if name.startswith(OURS)]),
            title=title,
            better=better,
            decimals=decimals,
        )
        panels[panel].set_yticks(
            range(len(names)),
            [_in_lines(name, on_gpu) for name in names],
        )
    report.save_figure(
        figure,
        path,
        "The optimizer step alone: fused_tricks and torch.amp",
        result["setting"] + ". Bars are medians, black lines quartiles.",
        result["machine"],
    )
