"""Result files: JSON for programs, Markdown for readers, and the common drawing of the pictures."""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import math
import re
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.lib import machine as machines
from benchmarks.lib.harness import Spread

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

RESULTS = Path(__file__).parent.parent / "results"
"""The folder of the results that are kept in the repository."""
OUTPUT = "build/benchmarks"
"""The default folder of results."""

# From Okabe and Ito's palette, for readers with any colour vision. Greys are the references.
OURS_COLOUR = "#0072B2"
MARK_COLOUR = "#D55E00"
GREYS = ("#C4C4C4", "#A0A0A0", "#7A7A7A", "#5A5A5A", "#404040")
LINE_COLOURS = ("#E69F00", "#56B4E9", "#009E73", "#CC79A7", "#000000", "#8C510A", "#999999", "#B8A900")
"""The colours of lines that are told apart by colour alone."""


def output_folder(text: str) -> Path:
    """Returns a folder of the command line, after creating it if it does not exist, and checks that it is writable."""
    folder = Path(text)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise argparse.ArgumentTypeError(f"cannot write to {text}: {error.strerror}") from error
    return folder


def output_file(text: str) -> Path:
    """Returns a file of the command line, after creating its folder if it does not exist."""
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"must be the name of a file, got the folder {text}")
    return output_folder(str(path.parent)) / path.name


def add_output_to(parser: argparse.ArgumentParser) -> None:
    """Adds `--output`."""
    parser.add_argument(
        "--output",
        type=output_folder,
        default=OUTPUT,
        metavar="DIR",
        help=f"folder for the result ({OUTPUT})",
    )


def write(
    folder: Path,
    result: Mapping[str, Any],
    page: str,
    picture: Callable[[dict[str, Any], Path], None] | None = None,
) -> None:
    """Writes a result as NAME.json and NAME.md, its picture, if any, as NAME.png, and prints the page.

    NAME is the result's benchmark. Without matplotlib a sentence on the page replaces the picture.
    """
    name = result["benchmark"]
    write_json(folder / f"{name}.json", result)
    if picture is not None:
        if importlib.util.find_spec("matplotlib") is None:
            page = re.sub(r"!\[[^\]]*\]\([^)]*\)", "(No picture: matplotlib is not installed.)", page)
        else:
            picture(dict(result), folder / f"{name}.png")
    write_page(folder / f"{name}.md", page)


def write_page(path: Path, page: str) -> None:
    """Writes a page, prints it, and prints its path on stderr."""
    path.write_text(page, encoding="utf-8")
    print(page)
    print(f"{path} has the result", file=sys.stderr)


def plotting() -> Any:
    """Returns `matplotlib.pyplot`, set up for drawing into files."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def write_json(path: Path, result: Mapping[str, Any]) -> None:
    """Writes a result, indented, with each list of plain values on one line.

    Numbers that JSON cannot express become strings that `float` reads: "inf", "-inf" and "nan".
    """
    text = json.dumps(_strict(result), indent=2, ensure_ascii=False, allow_nan=False)
    text = re.sub(r"\[[^\[\]{}]*\]", lambda match: re.sub(r"\s*\n\s*", " ", match[0]), text)
    path.write_text(text + "\n", encoding="utf-8")


def _strict(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _strict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def number(value: float, form: str) -> str:
    """Returns the number in the form of a format string, such as `.3g`, or ∞ if it is infinite."""
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    return format(value, form)


def mean_text(mean: float, deviation: float | None, factor: float, decimals: int) -> str:
    """Returns `mean ± standard deviation`, both times the factor; only the mean without a deviation."""
    text = number(factor * mean, f".{decimals}f")
    return text if deviation is None else f"{text} ± {factor * deviation:.{decimals}f}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a Markdown table. The first column is left-aligned, all other columns are right-aligned."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def machine_note(machine: Mapping[str, Any]) -> str:
    """Returns the machine as a Markdown list."""
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    lines = [
        f"- Command: `{machine['command']}`",
        f"- Date: {machine['date']}",
        f"- CPU: {machine['cpu']} ({machine['cpu_capability']}), {machines.threads_text(machine)}",
        *([_gpu_line(machine["gpu"])] if machine["gpu"] else []),
        f"- Versions: {versions}",
    ]
    return "\n".join(lines)


def _gpu_line(gpu: Mapping[str, Any]) -> str:
    return (
        f"- GPU: {gpu['name']} (architecture {gpu['architecture']}, {gpu['multiprocessors']} multiprocessors, "
        f"{gpu['memory_gib']} GiB, {gpu['l2_mib']} MiB of L2 cache), driver {gpu['driver']}"
    )


def colours(names: Sequence[str], ours: Sequence[str]) -> list[str]:
    """Returns a colour for each name: blue for `ours`, greys in turn for the rest."""
    greys = itertools.cycle(GREYS)
    return [OURS_COLOUR if name in ours else next(greys) for name in names]


def line_colours(names: Sequence[str], ours: Sequence[str]) -> list[str]:
    """Returns a colour for each line: blue for `ours`, a different one for each of the rest, as far as they go."""
    others = itertools.cycle(LINE_COLOURS)
    return [OURS_COLOUR if name in ours else next(others) for name in names]


def label_lines(axes: Axes, ends: Sequence[tuple[float, float, str, str]], fontsize: float = 9) -> None:
    """Writes the names of lines to the right of a panel, in the order of their right ends and without overlap.

    The limits of the axes must be final.

    Args:
        axes: The panel.
        ends: The last x, the last y, the name and the colour of each line.
        fontsize: The size of the names.
    """

    def height(x: float, y: float) -> float:
        return float(axes.transAxes.inverted().transform(axes.transData.transform((x, y)))[1])

    ends = sorted((end for end in ends if math.isfinite(end[1])), key=lambda end: end[1])
    panel_height = axes.get_window_extent().height / axes.figure.dpi
    line = 1.5 * fontsize / 72 / panel_height
    halves = [line * (1 + name.count("\n")) / 2 for *_, name, _ in ends]
    heights: list[float] = []
    lowest = -math.inf
    for (x, y, _, _), half in zip(ends, halves):
        heights.append(max(height(x, y), lowest + half))
        lowest = heights[-1] + half
    highest = 1.0
    for place, half in reversed(list(enumerate(halves))):
        heights[place] = min(heights[place], highest - half)
        highest = heights[place] - half
    for (x, y, name, colour), label_height in zip(ends, heights):
        axes.annotate(
            name,
            (x, y),
            (1.04, label_height),
            textcoords="axes fraction",
            color=colour,
            fontsize=fontsize,
            fontweight="bold" if colour == OURS_COLOUR else "normal",
            va="center",
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": colour,
                "linewidth": 0.7,
                "relpos": (0, 0.5),
                "shrinkA": 1,
                "shrinkB": 0,
            },
        )


def bars(
    axes: Axes,
    spreads: Sequence[Spread],
    colour: Sequence[str],
    *,
    title: str,
    better: str,
    decimals: int,
) -> None:
    """Draws horizontal bars from the top down: medians, with a line over the quartiles and the number at its end.

    Args:
        axes: The panel. The caller sets its vertical tick labels.
        spreads: The numbers, one for each bar.
        colour: The colours, one for each bar.
        title: The quantity and its unit.
        better: `higher` or `lower`.
        decimals: The number of decimals.
    """
    places = range(len(spreads))
    medians = [spread.median for spread in spreads]
    whiskers = [
        [spread.median - spread.lower_quartile for spread in spreads],
        [spread.upper_quartile - spread.median for spread in spreads],
    ]
    axes.barh(places, medians, height=0.68, color=colour)
    axes.errorbar(medians, places, xerr=whiskers, fmt="none", ecolor="black", elinewidth=1.2, capsize=3)
    longest = max(spread.upper_quartile for spread in spreads)
    for place, spread in zip(places, spreads):
        axes.text(
            spread.upper_quartile + longest * 0.025,
            place,
            f"{spread.median:,.{decimals}f}",
            va="center",
            fontweight="bold" if colour[place] == OURS_COLOUR else "normal",
        )
    axes.set_xlim(0, longest * 1.22)
    dress(axes, title, better)
    axes.invert_yaxis()


def dress(axes: Axes, title: str, better: str) -> None:
    """Gives a panel the common look."""
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
    axes.set_xlabel(f"{better} is better" if better else "", color="#555555")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", color="#E3E3E3", linewidth=0.8)
    axes.set_axisbelow(True)


def save_figure(figure: Figure, path: Path, title: str, subtitle: str, machine: dict[str, object]) -> None:
    """Adds headings and the machine to a figure, and writes the PNG."""
    figure.set_layout_engine("constrained", rect=(0, 0.03, 1, 0.85), h_pad=0.1)
    figure.text(0.012, 0.975, title, fontsize=15, fontweight="bold", va="top")
    figure.text(0.012, 0.915, subtitle, fontsize=10.5, color="#444444", va="top")
    figure.text(0.012, 0.012, machines.one_line(machine), fontsize=8.5, color="#777777")
    figure.savefig(path, dpi=150)
    plotting().close(figure)
