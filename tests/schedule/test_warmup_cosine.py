"""The curve against a transcription of its definition in exact arithmetic."""

from __future__ import annotations

import itertools
import math
import random
from fractions import Fraction
from typing import Any

import mpmath  # type: ignore[import-untyped]  # torch needs sympy, which needs mpmath
import pytest

from fused_tricks.schedule.curve import WarmupCosine, _Cycles

# Units in the last place. Three random roundings meet in the squared sine, and as many in the interpolation.
TOLERANCE = 5


def exact_factor(curve: WarmupCosine, t: int) -> Any:
    """Returns the factor by its definition, in exact arithmetic, and a cosine in 200 bits."""
    floor = Fraction(curve.min_ratio)
    if curve.total_steps is not None and t >= curve.total_steps:
        return _mpf(floor)
    begin = 0
    for cycle in itertools.count():
        warmup = curve.warmup_steps if cycle == 0 or curve.warmup_every_cycle else 0
        T_0 = curve.total_steps - warmup if curve.T_0 is None else curve.T_0
        length = round(T_0 * Fraction(curve.T_mult) ** cycle)
        if t < begin + warmup + length:
            break
        begin += warmup + length
    peak = max(Fraction(curve.peak_decay) ** cycle, floor)
    if t < begin + warmup:
        start = min(Fraction(curve.warmup_start), peak)
        return _mpf(start + (peak - start) * Fraction(t - begin + 1, warmup))
    u = Fraction(t - begin - warmup, length)
    with mpmath.workprec(200):
        return _mpf(floor) + _mpf(peak - floor) * (1 + mpmath.cos(mpmath.pi * _mpf(u))) / 2


def _mpf(number: Fraction) -> Any:
    with mpmath.workprec(200):
        return mpmath.mpf(number.numerator) / number.denominator


def error_in_ulps(value: float, exact: Any) -> float:
    with mpmath.workprec(200):
        return float(abs(mpmath.mpf(value) - exact) / math.ulp(float(exact)))


def random_curve(draw: random.Random) -> WarmupCosine:
    warmup_steps = draw.choice([0, 1, 2, 7, 100])
    arguments: dict[str, Any] = {
        "total_steps": warmup_steps + draw.choice([1, 2, 10, 333, 2000]),
        "warmup_steps": warmup_steps,
        "warmup_start": draw.choice([0.0, 0.1, 1.0, draw.random()]),
        "min_ratio": draw.choice([0.0, 0.0, 1e-3, 1.0, draw.random()]),
    }
    if draw.random() < 0.7:
        arguments |= {
            "total_steps": draw.choice([None, arguments["total_steps"]]),
            "T_0": draw.choice([4, 5, 10, 64]),
            "T_mult": draw.choice([1, 1, 2, 3, 1.5, 1.1, 1 + draw.random()]),
            "peak_decay": draw.choice([1.0, 0.5, 0.9, draw.uniform(0.3, 1)]),
            "warmup_every_cycle": draw.random() < 0.5,
        }
    return WarmupCosine(**arguments)


def test_random_curves_are_exact_to_a_few_units_in_the_last_place() -> None:
    for seed in range(150):
        draw = random.Random(seed)
        curve = random_curve(draw)
        updates = [*range(12), *(draw.randrange(2500) for _ in range(40))]
        for t in updates:
            exact = exact_factor(curve, t)
            assert error_in_ulps(curve.factor(t), exact) <= TOLERANCE, (curve, t)


def test_the_order_of_questions_does_not_matter() -> None:
    arguments: dict[str, Any] = {"total_steps": None, "T_0": 3, "T_mult": 1.3, "warmup_steps": 2}
    forwards = WarmupCosine(**arguments)
    backwards = WarmupCosine(**arguments)
    assert [forwards.factor(t) for t in range(500)] == [backwards.factor(t) for t in range(499, -1, -1)][::-1]


@pytest.mark.parametrize("warmup_start", [0.0, 0.3])
def test_the_warmup_is_the_papers_and_meets_the_cosine_without_a_jump(warmup_start: float) -> None:
    curve = WarmupCosine(total_steps=100, warmup_steps=10, warmup_start=warmup_start)
    assert [curve.factor(t) for t in range(10)] == pytest.approx(
        [warmup_start + (1 - warmup_start) * i / 10 for i in range(1, 11)], rel=1e-15
    )
    assert curve.factor(9) == curve.factor(10) == 1.0


def test_the_cosine_is_halfway_down_at_half_its_length() -> None:
    assert WarmupCosine(total_steps=110, warmup_steps=10).factor(60) == 0.5


def test_the_last_update_of_a_long_run_is_as_exact_as_the_first() -> None:
    curve = WarmupCosine(total_steps=10**7)
    assert curve.factor(10**7 - 1) == pytest.approx((math.pi / 2 / 10**7) ** 2, rel=1e-12)


@pytest.mark.parametrize("restarts", [{}, {"T_0": 30}, {"T_0": 30, "T_mult": 2, "warmup_every_cycle": True}])
def test_after_the_end_the_floor_is_never_left(restarts: dict[str, Any]) -> None:
    curve = WarmupCosine(total_steps=100, warmup_steps=10, min_ratio=0.01, **restarts)
    assert {curve.factor(t) for t in [*range(100, 500), 10**6, 10**30]} == {0.01}


def test_a_run_that_is_all_warmup_ends_at_the_floor() -> None:
    curve = WarmupCosine(total_steps=4, warmup_steps=4)
    assert [curve.factor(t) for t in range(6)] == [0.25, 0.5, 0.75, 1.0, 0.0, 0.0]


def test_total_steps_cuts_a_cycle_short_and_does_not_squeeze_it() -> None:
    cut = WarmupCosine(total_steps=15, T_0=10, min_ratio=0.1)
    endless = WarmupCosine(total_steps=None, T_0=10, min_ratio=0.1)
    assert [cut.factor(t) for t in range(15)] == [endless.factor(t) for t in range(15)]
    assert cut.factor(15) == 0.1


@pytest.mark.parametrize("T_0", [1, 7, 10])
@pytest.mark.parametrize("T_mult", range(2, 11))
def test_each_cycle_begins_at_its_peak_however_many_came_before(T_0: int, T_mult: int) -> None:
    curve = WarmupCosine(total_steps=None, T_0=T_0, T_mult=T_mult)
    for cycle in range(1, 40):
        start = T_0 * (T_mult**cycle - 1) // (T_mult - 1)
        assert curve.factor(start) == 1.0
        assert curve.factor(start - 1) < 1.0 or T_0 * T_mult ** (cycle - 1) == 1


def test_lengths_are_rounded_once_from_the_exact_product() -> None:
    curve = WarmupCosine(total_steps=None, T_0=5, T_mult=1.5)
    # 5, 7.5, 11.25, 16.875, 25.3125, 37.96875; rounding each from the one before would give 5, 8, 12, 18, 27, 40.
    starts = list(itertools.accumulate([5, 8, 11, 17, 25, 38], initial=0))
    assert [t for t in range(starts[-1] + 1) if curve.factor(t) == 1.0] == starts


@pytest.mark.parametrize("T_mult", [1.5, 1.1, 1.01, 1.25])
def test_lengths_do_not_depend_on_the_precision_of_their_bounds(
    T_mult: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    precise = _Cycles(8, Fraction(T_mult), 3)
    expected = [precise.find(t) for t in range(2000)]
    monkeypatch.setattr(_Cycles, "bits", 2)
    coarse = _Cycles(8, Fraction(T_mult), 3)
    assert [coarse.find(t) for t in range(2000)] == expected


def test_ten_million_updates_in_cycles_of_one_length_are_no_work() -> None:
    curve = WarmupCosine(total_steps=None, warmup_steps=3, T_0=7)
    assert curve.factor(3 + 7 * 10**7) == 1.0
    assert len(curve._cycles._runs) == 1


@pytest.mark.parametrize("T_mult", [1, 2])
def test_peaks_decay_and_the_floor_stays(T_mult: int) -> None:
    curve = WarmupCosine(total_steps=None, T_0=10, T_mult=T_mult, peak_decay=0.5, min_ratio=0.2)
    starts = [0, 10, 10 + 10 * T_mult, 10 + 10 * T_mult + 10 * T_mult**2]
    assert [curve.factor(t) for t in starts] == [1.0, 0.5, 0.25, 0.2]
    assert min(curve.factor(t) for t in range(200)) == 0.2


@pytest.mark.parametrize("T_mult", [1, 2])
def test_a_warmup_in_every_cycle_comes_before_its_cosine_and_does_not_shorten_it(T_mult: int) -> None:
    with_warmups = WarmupCosine(
        total_steps=None, warmup_steps=4, T_0=10, T_mult=T_mult, peak_decay=0.5, warmup_every_cycle=True
    )
    without = WarmupCosine(total_steps=None, T_0=10, T_mult=T_mult, peak_decay=0.5)
    begin = since = 0
    for cycle in range(4):
        peak, length = 0.5**cycle, 10 * T_mult**cycle
        assert [with_warmups.factor(begin + i) for i in range(4)] == [peak * (i + 1) / 4 for i in range(4)]
        assert [with_warmups.factor(begin + 4 + i) for i in range(length)] == [
            without.factor(since + i) for i in range(length)
        ]
        begin, since = begin + 4 + length, since + length


def test_a_warmup_never_goes_down_to_a_peak_below_its_start() -> None:
    curve = WarmupCosine(
        None, warmup_steps=2, warmup_start=0.5, T_0=3, peak_decay=0.25, warmup_every_cycle=True
    )
    assert [curve.factor(t) for t in (5, 6, 7)] == [0.25, 0.25, 0.25]


@pytest.mark.parametrize(
    "name, value, error",
    [
        ("total_steps", 0, ValueError),
        ("total_steps", 100.0, TypeError),
        ("total_steps", True, TypeError),
        ("warmup_steps", -1, ValueError),
        ("warmup_steps", 2.5, TypeError),
        ("warmup_steps", None, TypeError),
        ("warmup_start", -0.1, ValueError),
        ("warmup_start", 1.1, ValueError),
        ("warmup_start", "0", TypeError),
        ("min_ratio", 1.5, ValueError),
        ("min_ratio", math.nan, ValueError),
        ("min_ratio", None, TypeError),
        ("T_0", 0, ValueError),
        ("T_0", 10.0, TypeError),
        ("T_mult", 0.9, ValueError),
        ("T_mult", math.inf, ValueError),
        ("T_mult", "2", TypeError),
        ("peak_decay", 1.1, ValueError),
        ("peak_decay", -0.5, ValueError),
        ("warmup_every_cycle", 1, TypeError),
    ],
)
def test_an_impossible_argument_is_refused_by_name(name: str, value: object, error: type[Exception]) -> None:
    arguments: dict[str, Any] = {"total_steps": 100, "T_0": 10, name: value}
    with pytest.raises(error, match=f"^{name} must be "):
        WarmupCosine(**arguments)


@pytest.mark.parametrize("t, error", [(-1, ValueError), (1.0, TypeError)])
def test_an_impossible_update_is_refused(t: object, error: type[Exception]) -> None:
    with pytest.raises(error, match="^t must be "):
        WarmupCosine(total_steps=10).factor(t)


def test_no_end_without_restarts_is_refused() -> None:
    with pytest.raises(ValueError, match="^total_steps must be an integer unless T_0 is given"):
        WarmupCosine(total_steps=None)


def test_a_warmup_longer_than_the_run_is_refused() -> None:
    with pytest.raises(ValueError, match="^warmup_steps=11 must be at most total_steps=10"):
        WarmupCosine(total_steps=10, warmup_steps=11)


@pytest.mark.parametrize("option", [{"T_mult": 2}, {"peak_decay": 0.9}, {"warmup_every_cycle": True}])
def test_options_of_restarts_without_restarts_are_refused(option: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"^{next(iter(option))} must be .* without restarts"):
        WarmupCosine(total_steps=10, **option)


RANDOM_CURVES = range(40)


@pytest.mark.parametrize("seed", RANDOM_CURVES)
def test_a_table_of_factors_has_the_bits_of_single_ones(seed: int) -> None:
    rng = random.Random(seed)
    restarts = {
        "T_0": rng.choice([1, 2, 7, 40]),
        "T_mult": rng.choice([1.0, 1.5, 2.0, 1 + 10 ** rng.uniform(-16, 0)]),
        "peak_decay": rng.random(),
        "warmup_every_cycle": rng.random() < 0.5,
    }
    curve = WarmupCosine(
        rng.choice([None, 900]) if seed % 2 else rng.randint(50, 1200),
        warmup_steps=rng.randint(0, 50),
        warmup_start=rng.random(),
        min_ratio=rng.random() / 2,
        **(restarts if seed % 2 else {}),
    )
    assert list(curve.factors(1000)) == [curve.factor(t) for t in range(1000)]


@pytest.mark.parametrize("warmup_steps", [0, 3])
@pytest.mark.parametrize("T_mult", [1 + 1e-7, 1 + 1e-4, 1 + 2.0**-20])
def test_cycles_that_hardly_grow_have_their_exact_lengths(T_mult: float, warmup_steps: int) -> None:
    """The number of the cycle comes from a logarithm, and from exact comparisons around the result."""
    curve = WarmupCosine(None, warmup_steps=warmup_steps, T_0=2, T_mult=T_mult, warmup_every_cycle=True)
    find = curve._cycles.find
    for t in (10**6, 10**7, 10**9):
        cycle, place, length = find(t)
        assert -warmup_steps <= place < length
        # 2 T_mult**cycle in fixed point with 400 bits.
        bits = 400
        power = base = 1 << bits
        factor = int(Fraction(T_mult) * 2**bits)
        base, exponent = factor, cycle
        while exponent:
            power = power * base >> bits if exponent & 1 else power
            base, exponent = base * base >> bits, exponent >> 1
        assert length == round(Fraction(2 * power, 1 << bits))


def test_a_million_cycles_of_one_length_are_one_run() -> None:
    curve = WarmupCosine(None, T_0=1, T_mult=1 + 1e-7)
    assert curve.factor(10**6) == 1.0
    assert len(curve._cycles._runs) == 1


def test_no_number_of_an_update_is_too_large() -> None:
    assert WarmupCosine(None, T_0=3, peak_decay=0.5, min_ratio=0.25).factor(10**400) == 0.25
