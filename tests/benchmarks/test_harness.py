"""Contestants take turns in a random order, samples are summarised, and results are written as strict JSON."""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib", reason="the benchmarks draw with matplotlib")
pytest.importorskip("torchvision", reason="a result names the version of torchvision")

from benchmarks.lib import report
from benchmarks.lib.harness import Clock, Contestant, Spread, interleave, mean_and_deviation, ratios

pytestmark = pytest.mark.slow


def order_of_runs(rounds: int) -> tuple[list[str], dict[str, int]]:
    """The order of three contestants in each round, warm-up included, and how many samples each has."""
    order: list[str] = []
    samples = interleave(
        [Contestant(name, lambda name=name: order.append(name)) for name in "abc"],
        rounds=rounds,
        warmup=1,
        device=torch.device("cpu"),
    )
    turns = ["".join(order[begin : begin + 3]) for begin in range(0, len(order), 3)]
    return turns, {name: len(sections) for name, sections in samples.items()}


def test_interleaving_runs_everybody_once_a_round_and_keeps_a_sample_a_round() -> None:
    turns, samples = order_of_runs(rounds=3)
    assert ["".join(sorted(turn)) for turn in turns] == ["abc"] * 4
    assert samples == {"a": 3, "b": 3, "c": 3}


def test_interleaving_draws_a_new_order_each_round_so_that_nobody_always_follows_the_same_one() -> None:
    turns, _ = order_of_runs(rounds=60)
    counts = Counter(pair for turn in turns for pair in itertools.pairwise(turn))
    assert len(counts) == 6 and max(counts.values()) < 2 * min(counts.values())


def test_interleaving_has_the_same_order_in_each_run() -> None:
    assert order_of_runs(rounds=9) == order_of_runs(rounds=9)


def test_interleaving_prepares_once_for_runs_back_to_back_and_one_before_them() -> None:
    order: list[str] = []
    interleave(
        [Contestant("a", lambda: order.append("run"), lambda: order.append("prepare"))],
        rounds=1,
        warmup=1,
        device=torch.device("cpu"),
        repeats=2,
    )
    assert order == ["prepare", "run", "run", "run"] * 2


def test_a_clock_returns_a_section_between_each_two_marks() -> None:
    clock = Clock(torch.device("cpu"))
    for _ in range(2):
        clock.start()
        clock.mark()
        clock.mark()
        assert len(clock.sections()) == 2


def test_a_spread_is_the_median_and_the_quartiles() -> None:
    assert Spread.of([5, 1, 2, 4, 3]) == Spread(3, 2, 4, samples=5)
    assert ratios([2, 9], [1, 3]).median == 2.5


def test_json_keeps_a_list_of_numbers_on_one_line_and_every_bit(tmp_path: Path) -> None:
    result = {"losses": [[0.1, 1 / 3], [2.0]], "name": "a [b]"}
    report.write_json(tmp_path / "result.json", result)
    text = (tmp_path / "result.json").read_text(encoding="utf-8")
    assert json.loads(text) == result
    assert "[ 0.1, 0.3333333333333333 ]" in text


def test_json_is_strict_where_a_number_is_not_finite(tmp_path: Path) -> None:
    report.write_json(tmp_path / "result.json", {"losses": [[0.5, math.inf], (-math.inf, math.nan)]})

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    text = (tmp_path / "result.json").read_text(encoding="utf-8")
    assert json.loads(text, parse_constant=refuse) == {"losses": [[0.5, "inf"], ["-inf", "nan"]]}


def test_values_that_are_not_finite_have_a_mean_and_no_deviation() -> None:
    mean, deviation = mean_and_deviation([1.0, math.inf])
    assert math.isinf(mean) and deviation is None
    assert report.mean_text(mean, deviation, 100, 2) == "∞"
