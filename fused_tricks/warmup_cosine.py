"""The curve of a learning rate: a linear warm-up, then a cosine, once or in cycles."""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

from .arguments import integer, real

# π to 37 digits, so that an angle made of integers is rounded once.
_PI = Fraction(2646693125139304345, 842468587426513207)


@dataclass(frozen=True)
class WarmupCosine:
    """What a learning rate is multiplied by at each update: a pure function of the update's number.

    The arguments are those of :class:`~fused_tricks.WarmupCosineLR`, where they are explained.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument is outside its range, or does not go with the others.
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
            raise ValueError("total_steps may be None only for restarts without end: give total_steps or T_0")
        if self.total_steps is not None and self.warmup_steps > self.total_steps:
            raise ValueError(
                f"warmup_steps={self.warmup_steps} must be at most total_steps={self.total_steps}, "
                "which counts the warm-up"
            )
        if self.T_0 is None:
            for name, without_effect in (("T_mult", 1), ("peak_decay", 1), ("warmup_every_cycle", False)):
                if getattr(self, name) != without_effect:
                    raise ValueError(f"{name} is about restarts, which T_0 turns on: give T_0 as well")

    def factor(self, t: int) -> float:
        """The factor of update ``t``, which is 0 for the first. Any ``t`` may be asked for, in any order.

        A cosine is within 5 units in the last place of its exact value, to its very end.

        Raises:
            TypeError, ValueError: ``t`` is not an integer, or negative.
        """
        t = integer("t", t, least=0)
        if self.total_steps is not None and t >= self.total_steps:
            return self.min_ratio
        cycle, place, length = self._locate(t)
        peak = max(self.peak_decay**cycle, self.min_ratio)
        if place < 0:
            start = min(self.warmup_start, peak)
            return start + (peak - start) * ((place + self.warmup_steps + 1) / self.warmup_steps)
        return self.min_ratio + (peak - self.min_ratio) * _half_cosine(place, length)

    def _locate(self, t: int) -> tuple[int, int, int]:
        """The cycle, the place in its cosine (negative in its warm-up) and the length of that cosine, in updates."""
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


def _half_cosine(place: int, length: int) -> float:
    """``(1 + cos(π place / length)) / 2`` for ``0 <= place < length``: falls from 1 towards 0."""
    left = length - place
    if place <= left:
        return (1 + math.cos(_PI.numerator * place / (_PI.denominator * length))) / 2
    # The same number. Near the end 1 + cos would cancel.
    return math.sin(_PI.numerator * left / (_PI.denominator * 2 * length)) ** 2


class _Cycles:
    """Cycles whose cosines have T_0, T_0·T_mult, T_0·T_mult², … updates, each rounded once, to even in a tie.

    They are laid end to end in integers: the logarithm that would find a cycle at once is off by one where a cycle
    begins.
    """

    # The fraction bits of the bounds below; fewer would only cost time.
    bits = 128

    def __init__(self, T_0: int, T_mult: Fraction, warmup_steps: int) -> None:
        self._T_mult = T_mult
        self._warmup_steps = warmup_steps
        # Of each cosine, counted from the start of the first.
        self._starts = [0]
        self._lengths = [T_0]
        # The last length before rounding is between these.
        self._lower = self._upper = T_0 << self.bits

    def find(self, t: int) -> tuple[int, int, int]:
        """The cycle, the place in its cosine and its length, ``t >= 0`` updates after the start of the first cosine.

        The place is negative in the warm-up of a later cycle.
        """
        if self._T_mult == 1:
            cycle, place = divmod(t + self._warmup_steps, self._lengths[0] + self._warmup_steps)
            return cycle, place - self._warmup_steps, self._lengths[0]
        while t >= self._starts[-1] + self._lengths[-1]:
            self._append()
        cycle = bisect_right(self._starts, t + self._warmup_steps) - 1
        return cycle, t - self._starts[cycle], self._lengths[cycle]

    def _append(self) -> None:
        self._starts.append(self._starts[-1] + self._lengths[-1] + self._warmup_steps)
        self._lower = self._lower * self._T_mult.numerator // self._T_mult.denominator
        self._upper = -(-self._upper * self._T_mult.numerator // self._T_mult.denominator)
        length = round(Fraction(self._lower, 1 << self.bits))
        if length != round(Fraction(self._upper, 1 << self.bits)):
            # Numbers of as many digits as there are cycles: exact, and too slow to be the rule.
            length = round(self._lengths[0] * self._T_mult ** len(self._lengths))
        self._lengths.append(length)
