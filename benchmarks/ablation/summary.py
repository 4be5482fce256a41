"""The numbers of the ablation's rows, and their differences beside the noise of the seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from scipy import stats

from benchmarks.ablation.recipe import ROWS, Outcome, Setting
from benchmarks.lib.harness import mean_and_deviation

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Difference:
    """Mean difference between two rows, seed by seed, and the ends of its confidence interval.

    The numbers are not finite if a training diverged, and noise is then undefined.
    """

    mean: float
    low: float
    high: float

    @classmethod
    def between(cls, before: Sequence[float], after: Sequence[float]) -> Difference:
        """Returns the change between two rows with the same seeds, at least two, in the same order (Student's t)."""
        differences = [b - a for a, b in zip(before, after)]
        mean, deviation = mean_and_deviation(differences)
        if deviation is None:
            return cls(mean, math.nan, math.nan)
        error = deviation / len(differences) ** 0.5
        half = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(differences) - 1)) * error
        return cls(mean, mean - half, mean + half)

    @property
    def diverged(self) -> bool:
        """True if a training of one of the rows diverged."""
        return not math.isfinite(self.mean)

    @property
    def within_noise(self) -> bool:
        """True if the interval contains zero."""
        return self.low <= 0 <= self.high

    def text(self, factor: float, decimals: int) -> str:
        """Returns `mean (low … high)`, in bold if it exceeds noise, or `diverged`."""
        if self.diverged:
            return "diverged"
        numbers = (factor * number for number in (self.mean, self.low, self.high))
        text = "{} ({} … {})".format(*(f"{number:+.{decimals}f}" for number in numbers))
        return text if self.within_noise else f"**{text}**"


def summarise(
    outcomes: Mapping[str, Sequence[Outcome]], setting: Setting, count: int
) -> dict[str, dict[str, Any]]:
    """Returns the numbers of every row at one depth, and the raw numbers of every seed.

    Args:
        outcomes: The outcomes of every row, one for each seed, in the same order in all rows.
        setting: The setting of all rows.
        count: The number of training images.
    """
    summary: dict[str, dict[str, Any]] = {}
    first = before = ROWS[0]
    for row in ROWS:
        columns: dict[str, Any] = {
            "batch_size": setting.batch_size(row),
            "lr": setting.peak_lr(row),
            "steps": setting.steps(row, count),
            "warmup_steps": setting.warmup_steps(row, count),
        }
        for what in ("accuracy", "loss"):
            values, values_before, values_first = (
                [getattr(outcome, what) for outcome in outcomes[name]]
                for name in (row.name, before.name, first.name)
            )
            mean, deviation = mean_and_deviation(values)
            columns[what] = {
                "seeds": values,
                "mean": mean,
                "std": deviation,
                "to_row_before": asdict(Difference.between(values_before, values)),
                "to_first_row": asdict(Difference.between(values_first, values)),
            }
        summary[row.name] = columns
        before = row
    return summary
