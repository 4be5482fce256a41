"""The picture of the arguments of WarmupCosineLR: `python -m docs.schedule` writes `docs/schedule.png`."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes

from benchmarks.lib.report import MARK_COLOUR, OURS_COLOUR
from fused_tricks.schedule.curve import WarmupCosine

PICTURE = Path(__file__).with_suffix(".png")
UPDATES = 400
# The heights of arrows, in units of the factor.
LOW, HIGH = 1.08, 1.24


def main() -> None:
    """Draws the four panels and writes the picture."""
    figure, ((single, restarts), (decayed, warmed)) = pyplot.subplots(
        2, 2, figsize=(11, 6.4), sharex=True, sharey=True, layout="constrained"
    )
    draw(single, WarmupCosine(350, 50, min_ratio=0.1), "total_steps=350, warmup_steps=50, min_ratio=0.1")
    span(single, 0, 50, "warmup_steps", LOW)
    span(single, 0, 350, "total_steps", HIGH)
    level(single, 0.1, "min_ratio")

    draw(
        restarts,
        WarmupCosine(350, 50, T_0=50, T_mult=2),
        "total_steps=350, warmup_steps=50,\nT_0=50, T_mult=2",
    )
    span(restarts, 50, 100, "T_0", LOW)
    span(restarts, 100, 200, "T_0 · T_mult", LOW)
    span(restarts, 200, UPDATES, "T_0 · T_mult²", LOW)
    span(restarts, 0, 350, "total_steps", HIGH)

    draw(
        decayed,
        WarmupCosine(None, 50, T_0=50, peak_decay=0.8, min_ratio=0.1),
        "total_steps=None, warmup_steps=50,\nT_0=50, peak_decay=0.8, min_ratio=0.1",
    )
    span(decayed, 50, 100, "T_0", LOW)
    span(decayed, 100, 150, "T_0", LOW)
    level(decayed, 0.1, "min_ratio")
    mark(decayed, 104, 0.8, "peak_decay")
    mark(decayed, 154, 0.8**2, "peak_decay²")

    draw(
        warmed,
        WarmupCosine(None, 25, warmup_start=0.2, T_0=75, peak_decay=0.8, warmup_every_cycle=True),
        "total_steps=None, warmup_steps=25, warmup_start=0.2,\nT_0=75, peak_decay=0.8, warmup_every_cycle=True",
    )
    for begin in (0, 100):
        span(warmed, begin, begin + 25, "warmup_steps", HIGH)
        span(warmed, begin + 25, begin + 100, "T_0", LOW)
    level(warmed, 0.2, "warmup_start")

    for axes in (decayed, warmed):
        axes.set_xlabel("update t")
    for axes in (single, decayed):
        axes.set_ylabel("factor(t)")
    figure.savefig(PICTURE, dpi=130)


def draw(axes: Axes, curve: WarmupCosine, arguments: str) -> None:
    """Draws the curve with one tread per update, so that a restart is a jump and not a slope."""
    factors = [curve.factor(t) for t in range(UPDATES)]
    axes.stairs(factors, range(UPDATES + 1), baseline=None, color=OURS_COLOUR, linewidth=1.8)
    axes.set_title(arguments, loc="left", fontsize=9, family="monospace")
    axes.set_xlim(0, UPDATES)
    axes.set_ylim(0, 1.38)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1])
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#E3E3E3", linewidth=0.8)
    axes.set_axisbelow(True)


def span(axes: Axes, first: int, last: int, name: str, height: float) -> None:
    """Draws a labelled arrow over some updates."""
    ends = {"arrowstyle": "<->", "color": MARK_COLOUR, "shrinkA": 0, "shrinkB": 0, "mutation_scale": 8}
    axes.annotate("", (first, height), (last, height), arrowprops=ends)
    mark(axes, first + 3, height, name)


def level(axes: Axes, factor: float, name: str) -> None:
    """Draws a labelled horizontal line."""
    axes.axhline(factor, color=MARK_COLOUR, linewidth=0.9, linestyle=(0, (4, 3)))
    mark(axes, 5, factor - 0.085, name)


def mark(axes: Axes, t: int, height: float, name: str) -> None:
    """Writes a label at update `t`."""
    axes.text(t, height + 0.02, name, color=MARK_COLOUR, fontsize=9)


if __name__ == "__main__":
    main()
