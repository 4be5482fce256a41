"""The step on many sets of parameters: every set has its times, its limit and its picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib", reason="the benchmarks draw with matplotlib")
pytest.importorskip("torchvision", reason="the benchmarks take their networks from torchvision")

from benchmarks.lib import report
from benchmarks.lib.names import OURS
from benchmarks.step import lineup as step_lineup
from benchmarks.step import peers, sizes_page
from benchmarks.step import sizes as step_sizes
from benchmarks.step.contestants import CASTS, FUSED_NEW_CASTS, SCALE
from benchmarks.step.lineup import FORMS

pytestmark = pytest.mark.slow

PEERS = {
    peers.OPTIMI,
    peers.OPTIMI_KAHAN,
    peers.SGDW,
    peers.BITSANDBYTES,
    peers.APEX,
    peers.APEX_MASTERS,
    peers.TRANSFORMER_ENGINE,
    peers.FLASHOPTIM,
    peers.FLASHOPTIM_32,
}
QUICK = ["--seconds", "0.001", "--most-rounds", "1", "--loop-mib", "1", "--device", "cpu", "--no-compiled"]


def read(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "step_sizes.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("count", ["0", "-100", "150", "10"])
def test_elements_that_the_tensors_cannot_share_evenly_are_refused(
    capsys: pytest.CaptureFixture[str], count: str
) -> None:
    with pytest.raises(SystemExit):
        step_sizes.parse([f"--element-counts={count}"])
    assert f"must be a positive multiple of 100, got {count}" in capsys.readouterr().err


def test_step_sizes_reports_every_set_and_its_limit(tmp_path: Path) -> None:
    sets = ["--models", "mobilenet_v3_small", "--tensor-counts", "1", "3", "--element-counts", "100", "1000"]
    step_sizes.main([*sets, *QUICK, "--output", str(tmp_path)])
    result = read(tmp_path)
    points = [point for sweep in result["sweeps"].values() for point in sweep]
    assert [(point["tensors"], point["elements"]) for point in points] == [
        (142, 2_542_856),
        (1, 100),
        (3, 300),
        (100, 100),
        (100, 1000),
    ]
    for point in points:
        names = {*FORMS, *(f"{form}{CASTS}" for form in FORMS), FUSED_NEW_CASTS, OURS}
        assert set(point["ms"]) - PEERS == names
        assert set(point["ms"]) | set(point["left_out"]) == names | PEERS
        assert point["limit_ms"] > 0
        assert point["gb_per_second"]["median"] == pytest.approx(
            point["bytes"] / point["ms"][OURS]["median"] / 1e6
        )
        assert point["share_of_copy"]["median"] > 0 and point["host_us"] == {}
    assert points[1]["bytes"] == 22 * 100
    assert [point["limit_ms"] / point["bytes"] for point in points] == pytest.approx(
        [point["loop_ms"][SCALE]["median"] / (3 * 2**20) for point in points]
    )
    assert set(points[0]["peak_memory_bytes"]) == set(points[0]["ms"])
    page = (tmp_path / "step_sizes.md").read_text(encoding="utf-8")
    assert all(f"| {point['name']} |" in page for point in points)
    assert (tmp_path / "step_sizes.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_step_sizes_compiles_sets_of_few_tensors_and_names_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step_sizes, "MOST_COMPILED", 2)
    asked: list[bool] = []
    of_a_model = step_lineup.of_a_model

    def lineup(*arguments: Any, compiles: bool, **options: Any) -> list[step_lineup.Candidate]:
        asked.append(compiles)
        return of_a_model(*arguments, **options)

    monkeypatch.setattr(step_lineup, "of_a_model", lineup)
    sets = ["--models", "--tensor-counts", "2", "3", "--element-counts", "--output", str(tmp_path)]
    step_sizes.main([*sets, *(word for word in QUICK if word != "--no-compiled")])
    points = read(tmp_path)["sweeps"]["tensors"]
    assert asked == [True, False]
    reasons = [{point["left_out"].get(name) for name in step_lineup.COMPILED} for point in points]
    assert reasons == [{None}, {"compiled only for sets of at most 2 tensors"}]


def test_step_sizes_draws_each_sweep_that_has_a_point_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    titles: list[str] = []
    monkeypatch.setattr(
        report,
        "save_figure",
        lambda figure, *others: titles.extend(axes.get_title(loc="left") for axes in figure.axes),
    )
    step_sizes.main(
        ["--models", "--tensor-counts", "2", "--element-counts", *QUICK, "--output", str(tmp_path)]
    )
    page = (tmp_path / "step_sizes.md").read_text(encoding="utf-8")
    assert [title for title in titles if title] == [sizes_page.HEADINGS["tensors"]]
    assert "step_sizes.png" in page and sizes_page.HEADINGS["elements"] not in page


def test_step_sizes_of_networks_only_has_no_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        step_sizes, "sweeps", lambda options: [({"models": [], "tensors": [], "elements": []}, {})]
    )
    step_sizes.main([*QUICK, "--output", str(tmp_path)])
    assert "png" not in (tmp_path / "step_sizes.md").read_text(encoding="utf-8")
    assert not (tmp_path / "step_sizes.png").exists()
