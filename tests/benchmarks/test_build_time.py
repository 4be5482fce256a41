"""The time of a build is that of a wheel from a copy of the sources."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

pytest.importorskip("torchvision", reason="the record of a benchmark names the version of torchvision")
pytest.importorskip("setuptools", reason="the benchmark builds the wheel without isolation")

from benchmarks import build_time

pytestmark = pytest.mark.slow


def test_a_pure_python_build_is_timed(tmp_path: Path) -> None:
    build_time.main(["--builds", "pure Python", "--output", str(tmp_path)])
    result = json.loads((tmp_path / "build_time.json").read_text(encoding="utf-8"))
    found = result["builds"]["pure Python"]
    assert found["seconds"] > 0 and found["processor_seconds"] > 0
    assert 50_000 < found["wheel_bytes"] < 1_000_000
    page = (tmp_path / "build_time.md").read_text(encoding="utf-8")
    assert f"| pure Python | {found['seconds']:.0f} |" in page


def test_a_failed_build_is_listed_with_its_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in build_time.SOURCES:
        source = build_time.ROOT / name
        (shutil.copytree if source.is_dir() else shutil.copy2)(source, tmp_path / name)
    (tmp_path / "setup.py").write_text("raise SystemExit('this setup.py is broken')\n")
    monkeypatch.setattr(build_time, "ROOT", tmp_path)
    build_time.main(["--builds", "pure Python", "--output", str(tmp_path)])
    page = (tmp_path / "build_time.md").read_text(encoding="utf-8")
    assert "| pure Python | not built: " in page
