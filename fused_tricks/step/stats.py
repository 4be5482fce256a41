"""What an optimizer tells of its steps."""

from __future__ import annotations

from typing import NamedTuple

from .device_state import StepReading


class StepStats(NamedTuple):
    """What `stats` reports.

    Attributes:
        scale: The loss scale that the next `scale(loss)` uses; None without loss scaling.
        applied_steps: Updates applied since the optimizer (or the checkpoint it continues) was made.
        skipped_steps: Updates skipped because a gradient was not finite.
        grad_norm: The unscaled L2 norm over all gradients of the last step; None without `max_grad_norm`.
        last_step_skipped: Whether the last step was skipped.
        skipped_in_a_row: Updates skipped since the last one that was applied; 0 in training that works. A resumed run
            counts from 0.
    """

    scale: float | None
    applied_steps: int
    skipped_steps: int
    grad_norm: float | None
    last_step_skipped: bool
    skipped_in_a_row: int

    @classmethod
    def of(cls, reading: StepReading, has_scale: bool, has_norm: bool) -> StepStats:
        """Returns the statistics in a reading of an optimizer with or without a loss scale and a norm to clip to."""
        return cls(
            scale=reading.scale if has_scale else None,
            applied_steps=reading.applied_steps,
            skipped_steps=reading.skipped_steps,
            grad_norm=reading.grad_norm if has_norm else None,
            last_step_skipped=bool(reading.skip),
            skipped_in_a_row=reading.skipped_in_a_row,
        )
