"""The page and the picture of a result of benchmarks.step.sizes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.lib import report
from benchmarks.lib.harness import Spread
from benchmarks.lib.names import FOR_LOOP, FOREACH, FUSED, OURS
from benchmarks.step import compiled, peers
from benchmarks.step.contestants import CASTS, FUSED_CASTS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TENSOR_SIZE = 100
"""The elements of a tensor in the sets of growing numbers of tensors."""
ELEMENT_TENSORS = 100
"""The tensors of the sets of growing numbers of elements."""

LINES = (FOR_LOOP, FOREACH, FUSED, FUSED_CASTS, compiled.SGD, compiled.MASTERS, peers.HEAVYBALL, peers.APEX)
"""The contestants that are drawn beside ours."""
LIMIT = "limit: our bytes at the\nin-place loop's bandwidth"
HEADINGS = {
    "models": "Networks",
    "tensors": f"More tensors, of {TENSOR_SIZE} elements each",
    "elements": f"More elements, in {ELEMENT_TENSORS} tensors",
}


def markdown(result: dict[str, Any]) -> str:
    """Returns the page of the result: for each kind of set the times, and their ratios to ours."""
    parts = [
        "# The optimizer step on many sets of parameters",
        f"{result['setting']}. Numbers are median (lower – upper quartile) over rounds; ratios are taken within each "
        "round. *Limit* is the time that the bytes of our step take at the bandwidth of the in-place loop.",
    ]
    if drawn(result):
        parts.append("![The sweeps as a picture](step_sizes.png)")
    for kind, points in result["sweeps"].items():
        if not points:
            continue
        names = list(dict.fromkeys(name for point in points for name in point["ms"]))
        head = [[point["name"], f"{point['tensors']:,}", f"{point['elements']:,}"] for point in points]
        times = [
            [*start, *(_time(point, name) for name in names), f"{point['limit_ms']:,.3f}"]
            for start, point in zip(head, points)
        ]
        others = [name for name in names if name != OURS]
        shares = [
            [
                *start,
                *(_text(point["speed"], name, 2) for name in others),
                f"{point['bytes'] / point['elements']:.1f}",
                Spread(**point["gb_per_second"]).text(1),
                f"{point['limit_ms'] / point['ms'][OURS]['median']:.2f}",
                Spread(**point["share_of_copy"]).text(2),
            ]
            for start, point in zip(head, points)
        ]
        columns = ["set", "tensors", "elements"]
        parts += [
            f"## {HEADINGS[kind]}",
            "ms a step:",
            report.table([*columns, *names, "limit"], times),
            "Time of the others / ours; of our step, bytes an element, bandwidth, limit / time, and share of the copy "
            "loop's bandwidth. It can exceed 1 on a CPU, where the copy also reads the lines that it overwrites, and "
            "these bytes are not counted:",
            report.table(
                [*columns, *others, "bytes", "GB/s", "limit / time", "share of the copy loop"], shares
            ),
        ]
        checks = [
            [*start, *(point["checks"].get(name, "–") for name in names)]
            for start, point in zip(head, points)
        ]
        parts += ["Numbers checked:", report.table([*columns, *names], checks)]
        names_compiled = [name for name in names if any(name in point["compile_seconds"] for point in points)]
        if names_compiled:
            seconds = [
                [*start, *(_seconds(point["compile_seconds"], name) for name in names_compiled)]
                for start, point in zip(head, points)
            ]
            parts += ["Compiled in, s:", report.table([*columns, *names_compiled], seconds)]
        if points[0]["host_us"]:
            hosts = [
                [*start, *(_text(point["host_us"], name, 0) for name in names)]
                for start, point in zip(head, points)
            ]
            parts += ["Host time, µs a step:", report.table([*columns, *names], hosts)]
        if kind == "models":
            peaks = [
                [*start, *(_megabytes(point["peak_memory_bytes"], name) for name in names)]
                for start, point in zip(head, points)
            ]
            parts += ["Peak memory, MB:", report.table([*columns, *names], peaks)]
    left_out = {
        name: reason
        for points in result["sweeps"].values()
        for point in points
        for name, reason in point["left_out"].items()
    }
    left_out |= result["skipped"]
    if left_out:
        parts.append("Not measured:\n\n" + "\n".join(f"- {name}: {why}" for name, why in left_out.items()))
    return "\n\n".join([*parts, report.machine_note(result["machine"]) + "\n"])


def _time(point: dict[str, Any], name: str) -> str:
    why = point["left_out"].get(name, "–")
    return _text(point["ms"], name, 3) if name in point["ms"] or "check failed" not in why else why


def _text(spreads: dict[str, Any], name: str, decimals: int) -> str:
    return Spread(**spreads[name]).text(decimals) if name in spreads else "–"


def _seconds(seconds: dict[str, float], name: str) -> str:
    return f"{seconds[name]:.0f}" if name in seconds else "–"


def _megabytes(sizes: dict[str, int], name: str) -> str:
    return f"{sizes[name] / 1e6:,.1f}" if name in sizes else "–"


def drawn(result: dict[str, Any]) -> list[str]:
    """The kinds of sets in the picture."""
    return [kind for kind in ("tensors", "elements") if result["sweeps"][kind]]


def picture(result: dict[str, Any], path: Path) -> None:
    """Draws a panel for each sweep, with logarithmic axes: time over tensors, and over elements."""
    kinds = drawn(result)
    pyplot = report.plotting()
    figure, panels = pyplot.subplots(
        1, len(kinds), figsize=(7.5 * len(kinds), 6.5), layout="constrained", squeeze=False
    )
    for panel, kind in zip(panels[0], kinds):
        _draw(panel, kind, result["sweeps"][kind])
    report.save_figure(
        figure,
        path,
        "How the cost of a step grows",
        result["setting"]
        + ". Medians; the band is between the quartiles. The page has the contestants that are not drawn.",
        result["machine"],
    )


def _draw(panel: Axes, kind: str, points: list[dict[str, Any]]) -> None:
    measured = dict.fromkeys(name for point in points for name in point["ms"])
    names = [name for name in measured if name in LINES or name.startswith(OURS)]
    ours = [name for name in names if name.startswith(OURS)]
    ends = []
    for name, colour in zip(names, report.line_colours(names, ours)):
        rows = [(point[kind], point["ms"][name]) for point in points if name in point["ms"]]
        places = [place for place, _ in rows]
        medians = [row["median"] for _, row in rows]
        panel.plot(
            places,
            medians,
            marker="o",
            markersize=4,
            color=colour,
            linestyle=":" if CASTS in name else "-",
            linewidth=2.5 if name in ours else 1.5,
            zorder=3 if name in ours else 2,
        )
        panel.fill_between(
            places,
            [row["lower_quartile"] for _, row in rows],
            [row["upper_quartile"] for _, row in rows],
            color=colour,
            alpha=0.2,
        )
        ends.append((places[-1], medians[-1], name, colour))
    limits = [point["limit_ms"] for point in points]
    panel.plot([point[kind] for point in points], limits, color=report.MARK_COLOUR, linestyle="--")
    ends.append((points[-1][kind], limits[-1], LIMIT, report.MARK_COLOUR))
    panel.set_xscale("log")
    panel.set_yscale("log")
    panel.set_xlabel(f"{kind}, logarithmic", color="#555555")
    panel.set_ylabel("ms a step, logarithmic", color="#555555")
    panel.set_title(HEADINGS[kind], loc="left", fontsize=11, fontweight="bold")
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(color="#E3E3E3", linewidth=0.8)
    report.label_lines(panel, ends)
