"""The sweep of the CPU backend measures every variant, and each edit fits the source."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

pytest.importorskip("torchvision", reason="the benchmarks take their networks from torchvision")

import torch

from benchmarks import cpu_sweep
from benchmarks.lib import variants
from fused_tricks.extension import load_extension
from support.backends import unusable_because

CSRC = Path(__file__).parents[2] / "csrc"


has_extension = pytest.mark.skipif(
    unusable_because("cpu") is not None, reason=f"backend cpu: {unusable_because('cpu')}"
)


@has_extension
def test_the_result_has_every_variant_in_every_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = (
        cpu_sweep.Setting("low", "synthetic:2:40", torch.float16, True),
        cpu_sweep.Setting("full", "synthetic:2:40", torch.float32, False),
    )
    monkeypatch.setattr(cpu_sweep, "SETTINGS", settings)
    monkeypatch.setattr(variants, "build", lambda edits: tmp_path)
    monkeypatch.setattr(variants, "load", lambda path: load_extension())
    chosen = load_extension().selected_instruction_set()
    arguments = ["--rounds", "2", "--steps", "1", "--loop-mebibytes", "1", "--instruction-set", chosen]
    cpu_sweep.main([*arguments, "--output", str(tmp_path)])
    result = json.loads((tmp_path / "cpu_sweep.json").read_text(encoding="utf-8"))
    page = (tmp_path / "cpu_sweep.md").read_text(encoding="utf-8")
    assert list(result["settings"]) == ["low", "full"]
    for found in result["settings"].values():
        assert list(found) == list(cpu_sweep.VARIANTS)
    assert all(f"| {name} |" in page for name in cpu_sweep.VARIANTS)


@pytest.mark.parametrize("name", [name for name, edits in cpu_sweep.VARIANTS.items() if edits])
def test_every_edit_fits_the_source(tmp_path: Path, name: str) -> None:
    source = Path(shutil.copytree(CSRC, tmp_path / "csrc"))
    for edit in cpu_sweep.VARIANTS[name]:
        before = (source / edit.file).read_text()
        edit.apply(source)
        assert (source / edit.file).read_text() != before


@has_extension
@pytest.mark.parametrize(
    ("dtype", "scales", "size"),
    [(torch.float16, True, 22), (torch.float32, True, 24), (torch.float32, False, 20)],
)
def test_a_step_moves_the_bytes_of_its_scan_and_its_update(
    dtype: torch.dtype, scales: bool, size: int
) -> None:
    steps = cpu_sweep.Steps(cpu_sweep.Setting("", "synthetic:2:40", dtype, scales))
    assert steps.bytes == 80 * size
