"""The position in a schedule by updates that a FusedSGD has applied, counted on the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from ..optimizer import FusedSGD
from ..step.device_lr import DeviceLR, FactorTable, device_lr_of, following
from .curve import WarmupCosine


class AppliedCount:
    """The count of applied updates, and the learning rates that follow the count on the device.

    Args:
        optimizer: The optimizer; update 0 is the next that it applies.
        curve: The schedule.

    Attributes:
        origin: The number of updates that the optimizer had applied before update 0.

    Raises:
        TypeError: The optimizer is not a `FusedSGD`.
        ValueError: The schedule has no end.
    """

    name = "applied"
    sets_last_rates = False

    def __init__(self, optimizer: Optimizer, curve: WarmupCosine) -> None:
        if not isinstance(optimizer, FusedSGD):
            raise TypeError(
                "count='applied' requires a FusedSGD, which counts its applied updates, got "
                f"{type(optimizer).__name__}; use count='calls'"
            )
        if curve.total_steps is None:
            raise ValueError(
                "count='applied' requires total_steps, because a table has the factors of all updates"
            )
        self._optimizer = optimizer
        self._factors = FactorTable(curve.factors(curve.total_steps + 1))
        self._resumes_at: int | None = None
        self.go_to(0)

    @property
    def t(self) -> int:
        """The number of the next update. Synchronises."""
        return max(0, self._optimizer._step_state.read().applied_steps - self.origin)

    @property
    def known_t(self) -> int:
        """`t` if it can be read without a synchronisation, otherwise 0."""
        return self.t if self._optimizer._step_state.block.device.type == "cpu" else 0

    def assign(self, t: int) -> None:
        """Raises RuntimeError, because the device counts."""
        raise RuntimeError(
            "last_epoch cannot be set with count='applied', and such a schedule cannot be used in SequentialLR; use "
            "step(t), or count='calls'"
        )

    def go_to(self, t: int) -> None:
        """Makes the next update number `t`. Synchronises."""
        self._resumes_at = None
        self.origin = self._optimizer._step_state.read().applied_steps - t

    def advance(self) -> None:
        """Records that training continues. The device counts."""
        self._resumes_at = None

    def write_rates(self, bases: Sequence[float | Tensor]) -> bool:
        """Lets every group follow from its base rate, and updates the value of its `lr`. Returns False."""
        for group, base in zip(self._optimizer.param_groups, bases, strict=True):
            self.enter(group, base)
        return False

    def enter(self, group: dict[str, Any], base: float | Tensor) -> bool:
        """Lets one group follow, as `write_rates`."""
        applied_steps = self._optimizer._step_state.applied_steps
        # A tensor on a GPU would be read in every step.
        group["initial_lr"] = float(base)
        rate = DeviceLR(group["initial_lr"], self._factors, self.origin)
        if device_lr_of(group["lr"]) != rate or group["lr"].device != applied_steps.device:
            group["lr"] = following(rate, applied_steps.device)
            self._optimizer._replan()
        rate.write(group["lr"], applied_steps)
        return False

    def saved(self) -> dict[str, Any]:
        """Returns the entries of a state dict beside `last_epoch`."""
        return {"origin": self.origin}

    def restore(self, t: int, origin: int | None) -> None:
        """Continues at the position of a state dict; without an `origin` the next update becomes number `t`."""
        if origin is None:
            self.go_to(t)
            self.expect_load(t)
        else:
            self._resumes_at = None
            self.origin = origin

    def expect_load(self, t: int) -> None:
        """Stores the next update's number, because an optimizer that is loaded before it has a count of its own."""
        self._resumes_at = t

    def after_load(self) -> None:
        """Continues at the stored number after the optimizer was loaded."""
        t = self._resumes_at
        if t is not None:
            self.go_to(t)
            self.expect_load(t)
