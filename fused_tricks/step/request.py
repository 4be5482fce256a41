"""The request for one optimizer step, and its outcome."""

from __future__ import annotations

import enum
from typing import NamedTuple

from torch import Tensor

from ..loss_scale import DynamicLossScale, ScaleRule
from .shared_memory import has_memory


class StepRequest(NamedTuple):
    """The options of one step.

    Attributes:
        unscales: True if the gradients carry a factor: the optimizer's loss scale, or `grad_scale`.
        grad_scale: The factor of a `GradScaler`, which has checked the gradients itself; otherwise None.
        found_inf: The `found_inf` of a `GradScaler`: nonzero if a gradient is not finite; otherwise None.
        max_norm: The global norm to clip to; None to neither measure nor clip.
        scale_rule: The rule that adjusts the loss scale (`DynamicLossScale.rule()`); None to keep the scale.
    """

    unscales: bool
    grad_scale: Tensor | None
    found_inf: Tensor | None
    max_norm: float | None
    scale_rule: ScaleRule | None

    @property
    def scans(self) -> bool:
        """True if the step must read all gradients before the update uses any."""
        return (self.unscales and self.grad_scale is None) or self.max_norm is not None

    @property
    def has_found(self) -> bool:
        """True if the `GradScaler` has found a gradient that is not finite. Synchronises with the device."""
        return self.found_inf is not None and has_memory(self.found_inf) and float(self.found_inf) != 0


def step_request(
    loss_scale: float | DynamicLossScale | None,
    max_grad_norm: float | None,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> StepRequest:
    """Returns the request of one step.

    Args:
        loss_scale: The optimizer's loss scaling.
        max_grad_norm: The global norm to clip to, or None.
        grad_scale: The factor of a `GradScaler`, or None.
        found_inf: The `found_inf` of a `GradScaler`; None without a `GradScaler`.

    Raises:
        RuntimeError: Both a loss scale and a `GradScaler` are in use.
    """
    if found_inf is None:
        rule = loss_scale.rule() if isinstance(loss_scale, DynamicLossScale) else None
        return StepRequest(loss_scale is not None, None, None, max_grad_norm, rule)
    if loss_scale is not None:
        raise RuntimeError(
            "this FusedSGD scales its own loss (loss_scale is set) and was stepped by a GradScaler; use "
            "optimizer.scale(loss).backward() and optimizer.step() without the GradScaler, or loss_scale=None"
        )
    # GradScaler passes the sum over its devices, which is the int 0 if no device has a gradient.
    on_device = found_inf if isinstance(found_inf, Tensor) else None
    return StepRequest(grad_scale is not None, grad_scale, on_device, max_grad_norm, None)


class Outcome(enum.IntEnum):
    """The outcome of a step. The compiled backends return the same numbers.

    Attributes:
        STALE: The plan is stale. Nothing was changed.
        SKIPPED: A gradient was not finite, and the step was skipped.
        APPLIED: The parameters were updated, or the update was launched on a GPU.
    """

    STALE = 0
    SKIPPED = 1
    APPLIED = 2
