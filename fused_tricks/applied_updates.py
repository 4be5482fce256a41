"""A schedule by the updates that a FusedSGD has applied, which its device counts."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.optim import Optimizer

from .applied_rate import AppliedRate, FactorTable, applied_rate_of, following
from .optimizer import FusedSGD
from .warmup_cosine import WarmupCosine


class AppliedUpdates:
    """Where an optimizer is in a schedule, and how its groups follow it.

    Args:
        optimizer: The optimizer; update 0 is the next that it applies.
        curve: The schedule.

    Attributes:
        origin: How many updates the optimizer had applied before update 0.

    Raises:
        TypeError: The optimizer is no ``FusedSGD``.
        ValueError: The schedule has no end.
    """

    def __init__(self, optimizer: Optimizer, curve: WarmupCosine) -> None:
        if not isinstance(optimizer, FusedSGD):
            raise TypeError(
                "count='applied' needs a FusedSGD, which counts the updates that it applies, got "
                f"{type(optimizer).__name__}; use count='calls'"
            )
        if curve.total_steps is None:
            raise ValueError(
                "count='applied' needs total_steps: the factors of all updates are laid out in a table"
            )
        self._optimizer = optimizer
        self._factors = FactorTable(curve.factors(curve.total_steps + 1))
        self.go_to(0)

    @property
    def t(self) -> int:
        """The number of the next update. Synchronises."""
        return max(0, self._optimizer._step_state.read().applied_steps - self.origin)

    @property
    def is_on_host(self) -> bool:
        """True if :attr:`t` is read without a sync."""
        return self._optimizer._step_state.block.device.type == "cpu"

    def go_to(self, t: int) -> None:
        """Makes the next update number ``t``. Synchronises."""
        self.origin = self._optimizer._step_state.read().applied_steps - t

    def write_rates(self, bases: Sequence[float | Tensor]) -> None:
        """Lets every group follow, from its base rate, and renews what its ``lr`` reads."""
        applied_steps = self._optimizer._step_state.applied_steps
        for group, base in zip(self._optimizer.param_groups, bases, strict=True):
            # A tensor may be on a GPU, and would have to be read in every step.
            group["initial_lr"] = float(base)
            rate = AppliedRate(group["initial_lr"], self._factors, self.origin)
            if applied_rate_of(group["lr"]) != rate or group["lr"].device != applied_steps.device:
                group["lr"] = following(rate, applied_steps.device)
                self._optimizer._replan()
            rate.write(group["lr"], applied_steps)
