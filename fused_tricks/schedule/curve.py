"""The curve of the learning rate: a linear warm-up, then one cosine or cycles of cosines."""

from __future__ import annotations

import math
from array import array
from bisect import bisect_right
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from itertools import repeat

from ..validation import integer, real, shown

# π to 37 decimal places, so that an angle computed from integers is rounded once.
_PI = Fraction(2646693125139304345, 842468587426513207)


@dataclass(frozen=True)
class WarmupCosine:
    """The factor of the learning rate at each update: a pure function of the update's number.

    `WarmupCosineLR` documents the arguments.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument is outside its range or conflicts with another argument.
    """

    total_steps: int | None
    warmup_steps: int = 0
    warmup_start: float = 0.0
    min_ratio: float = 0.0
    T_0: int | None = None
    T_mult: float = 1.0
    peak_decay: float = 1.0
    warmup_every_cycle: bool = False

    def __post_init__(self) -> None:
        checked = {
            "total_steps": None if self.total_steps is None else integer("total_steps", self.total_steps, 1),
            "warmup_steps": integer("warmup_steps", self.warmup_steps, 0),
            "warmup_start": real("warmup_start", self.warmup_start, 0, 1),
            "min_ratio": real("min_ratio", self.min_ratio, 0, 1),
            "T_0": None if self.T_0 is None else integer("T_0", self.T_0, 1),
            "T_mult": real("T_mult", self.T_mult, 1),
            "peak_decay": real("peak_decay", self.peak_decay, 0, 1),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)
        if not isinstance(self.warmup_every_cycle, bool):
            raise TypeError(f"warmup_every_cycle must be True or False, got {self.warmup_every_cycle!r}")
        self._check_together()

    def _check_together(self) -> None:
        if self.total_steps is None and self.T_0 is None:
            raise ValueError(
                "total_steps must be an integer unless T_0 is given, got None; pass total_steps or T_0"
            )
        if self.total_steps is not None and self.warmup_steps > self.total_steps:
            raise ValueError(
                f"warmup_steps={shown(self.warmup_steps)} must be at most total_steps={shown(self.total_steps)}, "
                "which includes the warm-up; reduce warmup_steps or raise total_steps"
            )
        if self.T_0 is None:
            for name, without_effect in (("T_mult", 1), ("peak_decay", 1), ("warmup_every_cycle", False)):
                if getattr(self, name) != without_effect:
                    raise ValueError(
                        f"{name} must be {without_effect} without restarts, got {shown(getattr(self, name))}; "
                        "pass T_0 to turn restarts on"
                    )

    def factor(self, t: int) -> float:
        """Returns the factor of update `t`, for any `t` in any order. The first update is 0.

        A factor on a cosine is within 5 units in the last place of the exact value, up to the end of the cosine.

        Raises:
            TypeError: `t` is not an integer.
            ValueError: `t` is negative.
        """
        t = integer("t", t, least=0)
        if self.total_steps is not None and t >= self.total_steps:
            return self.min_ratio
        cycle, place, length = self._locate(t)
        return self._stretch(cycle, place, place + 1, length)[0]

    def factors(self, count: int) -> array[float]:
        """Returns the factors of updates 0 to `count - 1`, each bit for bit equal to that of `factor`."""
        factors = array("d")
        end = count if self.total_steps is None else min(count, self.total_steps)
        while len(factors) < end:
            cycle, place, length = self._locate(len(factors))
            stop = min(length, place + end - len(factors))
            factors.extend(self._stretch(cycle, place, stop, length))
        factors.extend(repeat(self.min_ratio, count - end))
        return factors

    def _stretch(self, cycle: int, begin: int, end: int, length: int) -> list[float]:
        """Returns the factors at the places `begin` to `end - 1` of a cycle. Places in the warm-up are negative."""
        floor, steps = self.min_ratio, self.warmup_steps
        # A larger exponent may overflow a float. The power of 2**1000 is already 0 or 1.
        peak = max(self.peak_decay ** min(cycle, 2**1000), floor)
        start = min(self.warmup_start, peak)
        warmup = [
            start + (peak - start) * ((place + steps + 1) / steps) for place in range(begin, min(end, 0))
        ]
        return warmup + [floor + (peak - floor) * half for half in _half_cosines(max(begin, 0), end, length)]

    def _locate(self, t: int) -> tuple[int, int, int]:
        """Returns the cycle, the place in its cosine (negative in its warm-up) and the cosine's length, in updates."""
        if self.T_0 is None:
            assert self.total_steps is not None
            return 0, t - self.warmup_steps, self.total_steps - self.warmup_steps
        if t < self.warmup_steps:
            return 0, t - self.warmup_steps, self.T_0
        return self._cycles.find(t - self.warmup_steps)

    @cached_property
    def _cycles(self) -> _Cycles:
        assert self.T_0 is not None
        return _Cycles(self.T_0, Fraction(self.T_mult), self.warmup_steps if self.warmup_every_cycle else 0)


def _half_cosines(begin: int, end: int, length: int) -> list[float]:
    """Returns `(1 + cos(π place / length)) / 2`, which falls from 1 towards 0, for `begin` to `end - 1`."""
    middle = min(max(length // 2 + 1, begin), end)
    pi, divisor = _PI.numerator, _PI.denominator * length
    falling = [(1 + math.cos(pi * place / divisor)) / 2 for place in range(begin, middle)]
    # The same function as sin²: near the end, 1 + cos cancels.
    divisor *= 2
    return falling + [math.sin(pi * (length - place) / divisor) ** 2 for place in range(middle, end)]


@dataclass
class _Run:
    """A run of consecutive cycles whose cosines have the same length.

    Attributes:
        start: The distance from the first cosine of all to the first cosine of the run, in updates.
        cycle: The number of the first cycle.
        length: The length of each cosine, in updates.
        cycles: The number of cycles.
    """

    start: int
    cycle: int
    length: int
    cycles: int = 1


class _Cycles:
    """The cycles, whose cosines have T_0, T_0·T_mult, T_0·T_mult², … updates, each rounded once, to even in a tie.

    Positions are exact sums of integers. A logarithm would give the cycle of an update directly, but rounding makes
    the result off by one near the start of a cycle. Here a logarithm only estimates how many cycles have the same
    length, and bounds of the exact length verify the estimate.
    """

    # The fraction bits of the bounds below. Fewer bits would cost time, not accuracy.
    bits = 128

    def __init__(self, T_0: int, T_mult: Fraction, warmup_steps: int) -> None:
        self._T_0 = T_0
        self._T_mult = T_mult
        self._warmup_steps = warmup_steps
        self._runs = [_Run(0, 0, T_0)]
        # Bounds of the last length before rounding.
        self._lower = self._upper = T_0 << self.bits

    def find(self, t: int) -> tuple[int, int, int]:
        """Returns the cycle, the place in its cosine and the cosine's length.

        The place is negative in the warm-up of a later cycle.

        Args:
            t: The number of updates after the start of the first cosine, at least 0.
        """
        if self._T_mult == 1:
            run = self._runs[0]
        else:
            while t + self._warmup_steps >= self._end_of(self._runs[-1]):
                self._append()
            run = self._runs[bisect_right(self._runs, t + self._warmup_steps, key=lambda run: run.start) - 1]
        cycles, place = divmod(t + self._warmup_steps - run.start, run.length + self._warmup_steps)
        return run.cycle + cycles, place - self._warmup_steps, run.length

    def _end_of(self, run: _Run) -> int:
        """Returns the `start` of a run that follows this run."""
        return run.start + run.cycles * (run.length + self._warmup_steps)

    def _append(self) -> None:
        last = self._runs[-1]
        if self._extend(last):
            return
        self._lower, self._upper = self._bounds_after(1)
        cycle = last.cycle + last.cycles
        length = self._rounded(self._lower)
        if length != self._rounded(self._upper):
            # Exact but slow: the number of digits grows with the number of the cycle.
            length = round(self._T_0 * self._T_mult**cycle)
        if length == last.length:
            last.cycles += 1
        else:
            self._runs.append(_Run(self._end_of(last), cycle, length))

    def _extend(self, run: _Run) -> bool:
        """Extends the last run by cycles that are proven to have its length.

        Returns False, and changes nothing, if there are too few or the proof fails.
        """
        growth = float(self._T_mult - 1)
        if growth * run.length > 0.01:
            return False
        left = math.log((run.length + 0.5) / (self._lower / (1 << self.bits))) / math.log1p(growth)
        cycles = int(left * 0.999) - 1
        if cycles < 16:
            return False
        lower, upper = self._bounds_after(cycles)
        # Lengths never decrease: if the last cycle has this length, the cycles before it have it too.
        if not self._rounded(lower) == self._rounded(upper) == run.length:
            return False
        self._lower, self._upper = lower, upper
        run.cycles += cycles
        return True

    def _bounds_after(self, cycles: int) -> tuple[int, int]:
        """Returns the bounds of the length `cycles` cycles after the last one."""
        bits, factor = self.bits, self._T_mult
        lower, upper = self._lower, self._upper
        # Bounds of T_mult**(2**i).
        lower_power = (factor.numerator << bits) // factor.denominator
        upper_power = -((-factor.numerator << bits) // factor.denominator)
        while cycles:
            if cycles & 1:
                lower = lower * lower_power >> bits
                upper = -(-upper * upper_power >> bits)
            lower_power = lower_power * lower_power >> bits
            upper_power = -(-upper_power * upper_power >> bits)
            cycles >>= 1
        return lower, upper

    def _rounded(self, bound: int) -> int:
        return round(Fraction(bound, 1 << self.bits))
