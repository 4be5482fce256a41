"""Interleaved timing: contestants take turns, so that the machine's noise falls on all of them alike."""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy
import torch

from benchmarks.lib import gpu, progress

T = TypeVar("T")


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of a list of samples, in the samples' own unit."""

    median: float
    lower_quartile: float
    upper_quartile: float
    samples: int

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """Summarises at least one value."""
        array = numpy.asarray(list(values), dtype=numpy.float64)
        lower, median, upper = numpy.percentile(array, [25, 50, 75])
        return cls(float(median), float(lower), float(upper), len(array))

    def text(self, decimals: int) -> str:
        """`median (lower quartile – upper quartile)`."""
        numbers = (self.median, self.lower_quartile, self.upper_quartile)
        return "{} ({} – {})".format(*(f"{number:,.{decimals}f}" for number in numbers))


@dataclass(frozen=True)
class Section:
    """What ran between two marks of a `Clock`, in seconds.

    Attributes:
        host: until the calls returned.
        device: until the work was done. On a CPU the two are the same.
        waited: the GPU began before the last call was issued, so `device` may have waiting for the host in it. Known
            only where the host had a head start.
    """

    host: float
    device: float
    waited: bool = False


class Clock:
    """Times consecutive sections of work on one device; CUDA events on a GPU, `perf_counter` on a CPU.

    Args:
        device: where the work runs; on a GPU, the current device.
        head_start: keep a GPU busy until the host has issued the calls of the first section, as a backward pass
            does in training. Without it `Section.device` begins with the host's first launch.
    """

    def __init__(self, device: torch.device, *, head_start: bool = False) -> None:
        self._is_gpu = gpu.is_gpu(device)
        self._head_start = head_start and self._is_gpu

    def start(self) -> None:
        """Waits for earlier work and begins the first section."""
        if self._is_gpu:
            torch.cuda.synchronize()
        self._ended: list[float] = []
        self._began: list[float] = []
        self._events: list[torch.cuda.Event] = []
        self._waited: list[bool] = []
        if self._head_start:
            gpu.give_head_start()
        self.mark()

    def mark(self) -> None:
        """Ends the running section and begins the next one."""
        # Two readings, so that recording the event belongs to no section.
        self._ended.append(time.perf_counter())
        if self._is_gpu:
            self._waited.append(self._head_start and bool(self._events) and self._events[-1].query())
            self._events.append(gpu.recorded_event())
        self._began.append(time.perf_counter())

    def sections(self) -> list[Section]:
        """Waits for the work and returns one `Section` for every pair of consecutive marks."""
        hosts = [ended - began for began, ended in zip(self._began, self._ended[1:])]
        if not self._is_gpu:
            return [Section(host, host) for host in hosts]
        torch.cuda.synchronize()
        devices = [a.elapsed_time(b) / 1e3 for a, b in zip(self._events, self._events[1:])]
        return [Section(*section) for section in zip(hosts, devices, self._waited[1:])]


@dataclass(frozen=True)
class Contestant:
    """One way to do the same work.

    Attributes:
        name: as it appears in tables and pictures.
        run: the work that is timed.
        prepare: runs before every `run`, untimed; puts inputs that `run` spoils back in place.
    """

    name: str
    run: Callable[[], object]
    prepare: Callable[[], object] = lambda: None


def shuffled(items: Sequence[T], dice: random.Random) -> list[T]:
    """The items in a random order: in another one each round, so that none always runs behind the same one."""
    return dice.sample(items, len(items))


def interleave(
    contestants: Sequence[Contestant],
    *,
    rounds: int,
    warmup: int,
    device: torch.device,
    repeats: int = 1,
    between: Callable[[], object] = lambda: None,
    head_start: bool = False,
    shown_as: str = "rounds",
) -> dict[str, list[Section]]:
    """Runs every contestant once a round, in a new random order, the same in each run, and times each run by itself.

    Args:
        contestants: who takes part; names must be unique.
        rounds: how many rounds are timed.
        warmup: how many rounds run before them, untimed.
        device: where the work runs.
        repeats: how often a contestant runs back to back in its turn, prepared once; a sample is the mean of these. If
            that is more than once, an untimed run comes before, so that none of them has the caches of another.
        between: runs untimed after `prepare` and before `run`, for every contestant; evicts caches, for example.
        head_start: as of `Clock`.
        shown_as: the words before the progress bar, which moves between the rounds.

    Returns:
        For every name one `Section` a round. Sample `i` of all names is of the same round, so ratios can be taken
        round by round.
    """
    clock = Clock(device, head_start=head_start)
    dice = random.Random(0)
    samples: dict[str, list[Section]] = {contestant.name: [] for contestant in contestants}
    for turn in progress.bar(range(warmup + rounds), desc=shown_as, unit="round"):
        for contestant in shuffled(contestants, dice):
            contestant.prepare()
            if repeats > 1:
                contestant.run()
            between()
            clock.start()
            for _ in range(repeats):
                contestant.run()
            clock.mark()
            (section,) = clock.sections()
            if turn >= warmup:
                mean = Section(section.host / repeats, section.device / repeats, section.waited)
                samples[contestant.name].append(mean)
    return samples


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and standard deviation; None for the deviation of a single value, and of values that are not all finite."""
    if not all(map(math.isfinite, values)):
        return sum(values) / len(values), None
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def ratios(numerators: Sequence[float], denominators: Sequence[float]) -> Spread:
    """The spread of the ratios taken round by round, which cancels what slowed a whole round."""
    return Spread.of(a / b for a, b in zip(numerators, denominators))
