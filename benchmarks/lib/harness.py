"""Interleaved timing: contestants take turns, so that noise of the machine affects all of them."""

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
    """Median and quartiles of a list of samples, in the unit of the samples."""

    median: float
    lower_quartile: float
    upper_quartile: float
    samples: int

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """Returns the spread of one or more values."""
        array = numpy.asarray(list(values), dtype=numpy.float64)
        lower, median, upper = numpy.percentile(array, [25, 50, 75])
        return cls(float(median), float(lower), float(upper), len(array))

    def text(self, decimals: int) -> str:
        """Returns `median (lower quartile – upper quartile)`."""
        numbers = (self.median, self.lower_quartile, self.upper_quartile)
        return "{} ({} – {})".format(*(f"{number:,.{decimals}f}" for number in numbers))


@dataclass(frozen=True)
class Section:
    """The work between two marks of a `Clock`, in seconds.

    Attributes:
        host: The time until the calls returned.
        device: The time until the work was done. On a CPU it equals `host`.
        waited: True if the GPU began before the last call was issued, so that `device` may include waiting for the
            host. Always False without a head start.
    """

    host: float
    device: float
    waited: bool = False


class Clock:
    """Times consecutive sections of work on one device; CUDA events on a GPU, `perf_counter` on a CPU.

    Args:
        device: The device of the work; on a GPU, the current device.
        head_start: True keeps a GPU busy until the host has issued the calls of the first section, as a backward pass
            does in training. Without a head start `Section.device` begins with the first launch.
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
    """One of several implementations of the same work.

    Attributes:
        name: The name in tables and pictures.
        run: The timed work.
        prepare: Runs before every `run`, untimed. It restores inputs that `run` overwrites.
    """

    name: str
    run: Callable[[], object]
    prepare: Callable[[], object] = lambda: None


def shuffled(items: Sequence[T], dice: random.Random) -> list[T]:
    """Returns the items in a new random order, so that no item always runs behind the same other item."""
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
        contestants: The contestants, with unique names.
        rounds: The number of timed rounds.
        warmup: The number of untimed rounds before the timed rounds.
        device: The device of the work.
        repeats: The number of runs back to back in one turn, prepared once; a sample is their mean. With more than one,
            an untimed run comes first, so that no timed run has the caches of another contestant.
        between: Runs untimed after `prepare` and before `run`, for every contestant; evicts caches, for example.
        head_start: As in `Clock`.
        shown_as: The words before the progress bar, which moves between the rounds.

    Returns:
        One `Section` per round for every name. Sample `i` of all names is from the same round, so ratios can be taken
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
    """Returns mean and standard deviation. The deviation is None for one value, and if a value is not finite."""
    if not all(map(math.isfinite, values)):
        return sum(values) / len(values), None
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def ratios(numerators: Sequence[float], denominators: Sequence[float]) -> Spread:
    """Returns the spread of the ratios round by round, which cancels a slowdown of a whole round."""
    return Spread.of(a / b for a, b in zip(numerators, denominators))
