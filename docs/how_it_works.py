"""The picture of a step: `python -m docs.how_it_works` writes `docs/how_it_works.svg`."""

from __future__ import annotations

import itertools

from matplotlib import pyplot
from matplotlib.axes import Axes

from docs.drawing import INK, MARK, OURS, QUIET, WIDTH, save, tidy

# Bytes of a 16-bit element with momentum, as docs/how_it_works.md counts them.
TRAFFIC = {
    "fused_tricks": [("scan", 2), ("read", 10), ("write", 10)],
    "torch.amp, fused": [("check", 8), ("update", 24)],
    "and its casts": [("check", 8), ("update", 24), ("casts", 12)],
}


def main() -> None:
    """Draws the phases of a step and the bytes that it moves."""
    figure = pyplot.figure(figsize=(WIDTH, 3.9))
    draw_phases(figure.add_axes((0, 0.5, 1, 0.5)))
    draw_traffic(figure.add_axes((0.21, 0.01, 0.78, 0.4)))
    save(figure, __file__)


def draw_phases(axes: Axes) -> None:
    """Draws plan, scan, decide and update, with what each reads and writes."""
    axes.set_xlim(0, 100)
    axes.set_ylim(0, 42)
    axes.set_axis_off()
    phases = [
        ("plan", "addresses and layouts,\ncached between steps", 12),
        ("scan", "reads all gradients:\ninfinite? norm?", 37),
        ("decide", "64 bytes: skip? clip?\nnext scale", 62),
        ("update", "reads and writes\neverything once", 87),
    ]
    arrow = {"arrowstyle": "->", "color": INK, "linewidth": 1.2}
    for name, words, place in phases:
        is_kernel = name != "plan"
        axes.text(
            place,
            28,
            name,
            ha="center",
            va="center",
            fontsize=12,
            bbox={
                "boxstyle": "round,pad=0.55",
                "facecolor": "#E3EEF6" if is_kernel else "#F2F2F2",
                "edgecolor": OURS if is_kernel else QUIET,
            },
        )
        axes.text(place, 19.5, words, ha="center", va="top", fontsize=9, color=INK)
    for (_, _, left), (_, _, right) in itertools.pairwise(phases):
        axes.annotate("", (right - 7, 28), (left + 7, 28), arrowprops=arrow)
    axes.annotate("", (62, 41), (62, 33), arrowprops={**arrow, "color": MARK})
    axes.text(64, 37.5, "skip: nothing else changes", color=MARK, fontsize=9, va="center")
    axes.plot([29, 96], [6, 6], color=OURS, linewidth=1.2)
    axes.text(62, 4.8, "on the device: the host does not wait", color=OURS, fontsize=9, ha="center", va="top")


def draw_traffic(axes: Axes) -> None:
    """Draws the bytes for each element as bars."""
    for row, (name, parts) in enumerate(reversed(TRAFFIC.items())):
        colour = OURS if name == "fused_tricks" else INK
        left = 0
        for index, (part, count) in enumerate(parts):
            axes.barh(
                row, count, left=left, height=0.62, color=colour, alpha=0.16 + 0.1 * index, edgecolor="white"
            )
            label = f"{part} {count}" if count > 2 else f"{count}"
            axes.text(left + count / 2, row, label, ha="center", va="center", color=colour, fontsize=8)
            left += count
        axes.text(left + 0.5, row, f"{left} bytes", va="center", color=colour, fontweight="bold")
    axes.set_yticks(range(len(TRAFFIC)), list(reversed(TRAFFIC)))
    axes.set_xticks([])
    axes.set_xlim(0, 51)
    tidy(axes, "bytes that a step moves for each 16-bit element")
    axes.spines[["bottom", "left"]].set_visible(False)
    axes.tick_params(left=False)


if __name__ == "__main__":
    main()
