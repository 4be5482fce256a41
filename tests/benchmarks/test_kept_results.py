"""The pages in benchmarks/results are those that the code of today writes from the kept numbers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("torchvision", reason="the benchmarks take their networks from torchvision")
pytest.importorskip("scipy", reason="the ablation computes its intervals with SciPy")

from benchmarks.redraw import PAGES

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


@pytest.mark.parametrize("name", PAGES)
def test_a_kept_page_is_written_again_from_its_numbers(name: str) -> None:
    result = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    markdown, _ = PAGES[name]
    assert markdown(result) == (RESULTS / f"{name}.md").read_text(encoding="utf-8")
