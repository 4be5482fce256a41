"""What an optimizer asks of a backend in one step, and what it hears back."""

from __future__ import annotations

import enum
from typing import NamedTuple

from torch import Tensor

from ..shared_memory import has_memory


class StepRequest(NamedTuple):
    """The step's own options.

    Attributes:
        unscales: Gradients carry a factor: the optimizer's loss scale, or ``grad_scale``.
        grad_scale: The factor that a ``GradScaler`` handed over; it has looked for non-finite gradients itself.
        found_inf: The ``GradScaler``'s verdict: not zero when a gradient is not finite.
        max_norm: Measure the global norm, and clip to this.
        scale_rule: How to adjust the loss scale after the step (``DynamicLossScale.rule()``); None leaves it.
    """

    unscales: bool
    grad_scale: Tensor | None
    found_inf: Tensor | None
    max_norm: float | None
    scale_rule: tuple[float, float, float, float, int, int] | None

    @property
    def scans(self) -> bool:
        """Whether gradients must be read once before any is used."""
        return (self.unscales and self.grad_scale is None) or self.max_norm is not None

    @property
    def has_found(self) -> bool:
        """The ``GradScaler``'s verdict, read on the host."""
        return self.found_inf is not None and has_memory(self.found_inf) and float(self.found_inf) != 0


class Outcome(enum.Enum):
    """How a step ended; the compiled backends answer with the position in this order."""

    STALE = "the plan no longer holds, nothing was touched"
    SKIPPED = "a gradient was not finite"
    APPLIED = "parameters were updated"
