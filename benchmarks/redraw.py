"""The page and the picture of a kept result, made again from its JSON after a change of their form.

`python -m benchmarks.redraw benchmarks/results/step.json` writes step.md and step.png beside the file.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import losslessness
from benchmarks.ablation import page as ablation_page
from benchmarks.lib import report
from benchmarks.step import page as step_page
from benchmarks.step import sizes_page
from benchmarks.train import page as train_page

Picture = Callable[[dict[str, Any], Path], None]
PAGES: dict[str, tuple[Callable[[dict[str, Any]], str], Picture]] = {
    "ablation": (ablation_page.markdown, ablation_page.picture),
    "losslessness": (losslessness.markdown, losslessness.picture),
    "step": (step_page.markdown, step_page.picture),
    "step_sizes": (sizes_page.markdown, sizes_page.picture),
    "train": (train_page.markdown, train_page.picture),
}


def main(arguments: Sequence[str]) -> None:
    """Writes the page and the picture of each result."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.redraw", description=__doc__.splitlines()[0])
    parser.add_argument("results", nargs="+", type=Path, metavar="JSON", help=f"of {', '.join(PAGES)}")
    for path in parser.parse_args(arguments).results:
        result = json.loads(path.read_text(encoding="utf-8"))
        if result["benchmark"] not in PAGES:
            parser.error(f"{path} is a result of {result['benchmark']}; choose one of {', '.join(PAGES)}")
        markdown, picture = PAGES[result["benchmark"]]
        report.write(path.parent, result, markdown(result), picture)


if __name__ == "__main__":
    main(sys.argv[1:])
