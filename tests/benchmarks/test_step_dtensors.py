"""The benchmark of the step on DTensors checks and times every way in each setting."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("torchvision", reason="the benchmarks record the version of torchvision")

import torch

from benchmarks.step import dtensors
from support.backends import unusable_because

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(unusable_because("cpu") is not None, reason=f"backend cpu: {unusable_because('cpu')}"),
]
NAMES = [way.name for way in dtensors.WAYS]


def test_every_way_is_timed_or_its_reason_is_given(tmp_path: Path) -> None:
    arguments = ["--tensors", "3", "--size", "4", "--rounds", "2", "--processes", "1", "2"]
    dtensors.main([*arguments, "--output", str(tmp_path)])
    result = json.loads((tmp_path / "step_dtensors.json").read_text(encoding="utf-8"))
    page = (tmp_path / "step_dtensors.md").read_text(encoding="utf-8")
    assert list(result["settings"]) == [
        "Plain tensors, 1 process",
        "DTensors, 1 process",
        "DTensors, 2 processes",
    ]
    for found in result["settings"].values():
        assert sorted([*found["rows"], *found["not_measured"]]) == sorted(NAMES)
        assert set(found["not_measured"]) <= {"torch.optim.SGD, fused"}
        assert found["rows"]["fused_tricks"]["check"] == "every bit"
    assert all(name in page for name in NAMES)


@pytest.mark.parametrize("lr", [0.5, float("nan")])
def test_a_way_that_computes_something_else_is_not_timed(lr: float) -> None:
    wrong = dtensors.Way("wrong", lambda parameters: torch.optim.SGD(parameters, lr=torch.tensor(lr)))
    right = next(way for way in dtensors.WAYS if way.name == dtensors.FOR_LOOP)
    trainings = [dtensors.Training(way, 3, 4, sharded=False) for way in (wrong, right)]
    outcomes, refused = dtensors.checked(trainings)
    assert list(outcomes) == [dtensors.FOR_LOOP]
    assert refused["wrong"].startswith("check failed")
