"""The host-time benchmark measures every trick, and can still switch each of them off."""

from __future__ import annotations

import json
import shutil
import subprocess
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("torchvision", reason="the benchmarks take their networks from torchvision")

from benchmarks.host_time import __main__ as host_time
from benchmarks.host_time.tricks import LEFT_OUT, TRICKS, Trick
from benchmarks.lib import report, variants
from benchmarks.lib.variants import Edit
from fused_tricks.extension import load_extension
from support.backends import unusable_because

CSRC = Path(__file__).parents[2] / "csrc"
has_extension = pytest.mark.skipif(
    unusable_because("cpu") is not None, reason=f"backend cpu: {unusable_because('cpu')}"
)


@has_extension
def test_the_result_has_the_saving_of_every_trick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_time, "load", lambda trick: load_extension())
    monkeypatch.setattr(host_time, "SETTINGS", {"one": "synthetic:3:1", "two": "synthetic:2:40"})
    host_time.main(["--rounds", "2", "--steps", "2", "--output", str(tmp_path)])
    result = json.loads((tmp_path / "host_time.json").read_text(encoding="utf-8"))
    page = (tmp_path / "host_time.md").read_text(encoding="utf-8")
    for found in result["settings"].values():
        assert list(found["saved_us"]) == ["nothing", *(trick.name for trick in TRICKS)]
        assert all(saved["samples"] == 2 for saved in found["saved_us"].values())
    for trick in TRICKS:
        (row,) = (line for line in page.splitlines() if line.startswith(f"| {trick.name} |"))
        assert trick.where in row and trick.goes in row


def test_the_documentation_has_the_kept_savings_of_every_trick() -> None:
    kept = json.loads((report.RESULTS / "host_time.json").read_text(encoding="utf-8"))
    page = (CSRC.parent / "docs" / "how_it_works.md").read_text(encoding="utf-8")
    for trick in TRICKS:
        (row,) = (line for line in page.splitlines() if line.startswith(f"| {trick.name} |"))
        for found in kept["settings"].values():
            assert f"| {found['saved_us'][trick.name]['median']:.1f} |" in row


@pytest.mark.parametrize(
    "edits", [LEFT_OUT, *(trick.edits for trick in TRICKS if trick.edits)], ids=lambda edits: edits[0].file
)
def test_every_edit_fits_the_source(tmp_path: Path, edits: tuple[Edit, ...]) -> None:
    source = Path(shutil.copytree(CSRC, tmp_path / "csrc"))
    for edit in edits:
        before = (source / edit.file).read_text()
        edit.apply(source)
        assert (source / edit.file).read_text() != before


def test_an_edit_of_text_that_is_gone_names_it(tmp_path: Path) -> None:
    source = Path(shutil.copytree(CSRC, tmp_path / "csrc"))
    with pytest.raises(
        ValueError,
        match=r"csrc/python/plan_guard\.cpp no longer has 'int gone;'",
    ):
        Edit("python/plan_guard.cpp", "int gone;", "").apply(source)


def test_every_trick_is_switched_off_by_something() -> None:
    ways = [[f"{value}" for value in (t.edits, t.without, t.patches, t.optimizer)] for t in TRICKS]
    none = Trick("")
    unchanged = [f"{v}" for v in (none.edits, none.without, none.patches, none.optimizer)]
    assert all(way != unchanged for way in ways)


def test_a_variant_is_compiled_from_edited_sources_and_only_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = []

    def compile_in(command: list[str], cwd: Path, **options: Any) -> SimpleNamespace:
        compiled.append((cwd / "csrc" / edit.file).read_text())
        (cwd / "fused_tricks" / f"_extension{EXTENSION_SUFFIXES[0]}").touch()
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(variants, "BUILT", tmp_path)
    monkeypatch.setattr(subprocess, "run", compile_in)
    trick = next(trick for trick in TRICKS if trick.edits)
    (edit, *_) = trick.edits
    paths = [variants.build(trick.edits, LEFT_OUT) for _ in range(2)]
    assert paths[0] == paths[1] and paths[0].is_relative_to(tmp_path)
    source = (CSRC / edit.file).read_text()
    assert compiled == [source, source.replace(edit.old, edit.new)]


def test_what_a_compiler_says_is_in_the_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(variants, "BUILT", tmp_path)
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(RuntimeError, match="cannot be built(.|\n)*no-such-compiler"):
        variants.build((), LEFT_OUT)


@has_extension
def test_steps_are_taken_by_the_variant() -> None:
    extension = load_extension()
    made = []

    def cpu_step(guard: Any) -> Any:
        made.append(guard)
        return extension.CpuStep(guard)

    variant = ModuleType("variant")
    variant.PlanGuard, variant.CpuStep = extension.PlanGuard, cpu_step  # type: ignore[attr-defined]
    steps = host_time.Steps("synthetic:2:3")
    steps.time(Trick("first"), variant, 1)
    assert made
    count = len(made)
    steps.time(Trick("second"), extension, 1)
    assert len(made) == count
