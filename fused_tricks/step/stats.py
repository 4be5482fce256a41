"""The step statistics that `FusedSGD.stats()` returns."""

from __future__ import annotations

from typing import NamedTuple

from .device_state import StepReading


class StepStats(NamedTuple):
    """The step statistics of a `FusedSGD`, as returned by `FusedSGD.stats()`.

    Attributes:
        scale: The loss scale of the next `scale(loss)`; None without loss scaling.
        applied_steps: The number of applied steps, those before a loaded checkpoint included.
        skipped_steps: The number of steps skipped because a gradient was not finite, those before a loaded checkpoint
            included.
        grad_norm: The unscaled L2 norm of all gradients of the last step, before clipping; None without
            `max_grad_norm`.
        last_step_skipped: True if the last step was skipped.
        skipped_in_a_row: The number of skipped steps since the last applied step. Loading the state dict of a
            `FusedSGD` sets the count to 0.

    Example:
        ```python
        import torch
        import fused_tricks as ft

        model = torch.nn.Linear(4, 2)
        optimizer = ft.FusedSGD(model.parameters(), lr=0.1, loss_scale="dynamic")
        stats = optimizer.stats()
        print(stats.scale, stats.applied_steps, stats.skipped_steps)
        ```
    """

    scale: float | None
    applied_steps: int
    skipped_steps: int
    grad_norm: float | None
    last_step_skipped: bool
    skipped_in_a_row: int

    @classmethod
    def of(cls, reading: StepReading, has_scale: bool, has_norm: bool) -> StepStats:
        """Builds the statistics from a reading of the step state."""
        return cls(
            scale=reading.scale if has_scale else None,
            applied_steps=reading.applied_steps,
            skipped_steps=reading.skipped_steps,
            grad_norm=reading.grad_norm if has_norm else None,
            last_step_skipped=bool(reading.skip),
            skipped_in_a_row=reading.skipped_in_a_row,
        )
