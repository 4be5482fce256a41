"""The table of the norms that `zero_gamma_` finds in the libraries' networks."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("matplotlib", reason="the tables are written with the benchmarks' report")
pytest.importorskip("torchvision", reason="the networks are torchvision's")
pytest.importorskip("tqdm", reason="the benchmarks show their progress with tqdm")

from benchmarks import zero_gamma

pytestmark = pytest.mark.slow


def test_the_table_tells_what_is_found_and_names_the_other_networks(tmp_path: Path) -> None:
    path = tmp_path / "docs" / "table.md"
    zero_gamma.main(["--torchvision", "resnet18", "alexnet", "mobilenet_v2", "--timm", "--output", str(path)])
    text = path.read_text(encoding="utf-8")
    assert "| resnet18 | 8 of 20 | `layer*.*.bn2` | – | the same |" in text
    assert "| mobilenet_v2 | 10 of 52 | `features.*.conv.3` | – | – |" in text
    assert "No norms found in: alexnet." in text
    assert "## timm" not in text


def test_a_difference_to_the_library_is_counted() -> None:
    finding = zero_gamma.Finding("network", {"a", "b"}, 5, 2, {"b", "c", "d"})
    assert finding.row() == ["network", "2 of 5", "`a`, `b`", "2", "2 only theirs, 1 only ours"]
