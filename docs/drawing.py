"""The common style of the pictures in `docs/`."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.lib.report import MARK_COLOUR, OURS_COLOUR

OURS, MARK = OURS_COLOUR, MARK_COLOUR
QUIET, INK = "#8A8A8A", "#333333"
# Inches. A page is about as wide, so that a label has its size in print.
WIDTH = 7.2

matplotlib.rcParams.update({"font.size": 10, "axes.titlesize": 10, "svg.hashsalt": "fused_tricks"})


def tidy(axes: Axes, title: str, xlabel: str = "", ylabel: str = "") -> None:
    """Gives a panel its title and labels, without a frame at the top and right."""
    axes.set_title(title, loc="left")
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.spines[["top", "right"]].set_visible(False)


def save(figure: Figure, script: str) -> None:
    """Writes the picture beside its script, as SVG with the same name."""
    # A date would change the file in every run.
    figure.savefig(Path(script).with_suffix(".svg"), metadata={"Date": None})
