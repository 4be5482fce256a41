"""The request for one optimizer step, and its outcome."""

from __future__ import annotations

import enum
from typing import NamedTuple

from torch import Tensor

from ..loss_scale import DynamicLossScale, ScaleRule
from .shared_memory import has_memory


class StepRequest(NamedTuple):
    """The step's own options.

    Attributes:
        unscales: Gradients carry a factor: the optimizer's loss scale, or `grad_scale`.
        grad_scale: The factor that a `GradScaler` handed over; it has looked for non-finite gradients itself.
        found_inf: The `GradScaler`'s verdict: not zero when a gradient is not finite.
        max_norm: Measure the global norm, and clip to this.
        scale_rule: How to adjust the loss scale after the step (`DynamicLossScale.rule()`); None leaves it.
    """

    unscales: bool
    grad_scale: Tensor | None
    found_inf: Tensor | None
    max_norm: float | None
    scale_rule: ScaleRule | None

    @property
    def scans(self) -> bool:
        """Whether gradients must be read once before any is used."""
        return (self.unscales and self.grad_scale is None) or self.max_norm is not None

    @property
    def has_found(self) -> bool:
        """The `GradScaler`'s verdict, read on the host."""
        return self.found_inf is not None and has_memory(self.found_inf) and float(self.found_inf) != 0


def step_request(
    loss_scale: float | DynamicLossScale | None,
    max_grad_norm: float | None,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> StepRequest:
    """Returns the request of one step.

    Args:
        loss_scale: The optimizer's own loss scale.
        max_grad_norm: The optimizer's norm to clip to.
        grad_scale: The factor of a `GradScaler`.
        found_inf: The verdict of a `GradScaler`; None where there is no scaler.

    Raises:
        RuntimeError: There are both a loss scale and a `GradScaler`.
    """
    if found_inf is None:
        rule = loss_scale.rule() if isinstance(loss_scale, DynamicLossScale) else None
        return StepRequest(loss_scale is not None, None, None, max_grad_norm, rule)
    if loss_scale is not None:
        raise RuntimeError(
            "this FusedSGD scales its own loss (loss_scale is set) and was stepped by a GradScaler; use "
            "optimizer.scale(loss).backward() and optimizer.step() without the GradScaler, or loss_scale=None"
        )
    # GradScaler sums the verdicts of its devices, and says 0 where there was no gradient on any.
    verdict = found_inf if isinstance(found_inf, Tensor) else None
    return StepRequest(grad_scale is not None, grad_scale, verdict, max_grad_norm, None)


class Outcome(enum.IntEnum):
    """The outcome of a step. The compiled backends return the same numbers.

    Attributes:
        STALE: The plan no longer holds. Nothing was touched.
        SKIPPED: A gradient was not finite.
        APPLIED: Parameters were updated, or the update was launched on a GPU.
    """

    STALE = 0
    SKIPPED = 1
    APPLIED = 2
