"""The counter of `count="applied"`: updates applied by a `FusedSGD`, counted on its device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from ..optimizer import FusedSGD
from ..step.device_lr import DeviceLR, FactorTable, device_lr_of, following
from .curve import WarmupCosine


class AppliedCount:
    """The position of a `FusedSGD` in a schedule, counted in applied updates.

    Args:
        optimizer: The optimizer. Its next applied update is update 0 of the schedule.
        curve: The schedule.

    Attributes:
        origin: The number of updates that the optimizer applied before update 0 of the schedule.

    Raises:
        TypeError: `optimizer` is not a `FusedSGD`.
        ValueError: The `total_steps` of the schedule is None.
    """

    name = "applied"
    sets_last_rates = False

    def __init__(self, optimizer: Optimizer, curve: WarmupCosine) -> None:
        if not isinstance(optimizer, FusedSGD):
            raise TypeError(
                f"optimizer must be a FusedSGD for count='applied', got {type(optimizer).__name__}; use count='calls'"
            )
        if curve.total_steps is None:
            raise ValueError(
                "total_steps must be an integer for count='applied', got None; pass total_steps or use count='calls'"
            )
        self._optimizer = optimizer
        self._factors = FactorTable(curve.factors(curve.total_steps + 1))
        self._resumes_at: int | None = None
        self.go_to(0)

    @property
    def t(self) -> int:
        """Returns the number of the next update, at least 0. Synchronises."""
        return max(0, self._optimizer._step_state.read().applied_steps - self.origin)

    @property
    def known_t(self) -> int:
        """Returns `t` if the count is in the host's memory, else 0. Never synchronises."""
        return self.t if self._optimizer._step_state.block.device.type == "cpu" else 0

    def assign(self, t: int) -> None:
        """Raises RuntimeError, because the device counts the updates."""
        raise RuntimeError(
            "last_epoch cannot be set with count='applied', and such a schedule cannot be used in SequentialLR; use "
            "step(t), or count='calls'"
        )

    def go_to(self, t: int) -> None:
        """Makes `t` the number of the next update. Synchronises."""
        self._resumes_at = None
        self.origin = self._optimizer._step_state.read().applied_steps - t

    def advance(self) -> None:
        """Discards the number stored by `expect_load`. The device counts the updates."""
        self._resumes_at = None

    def write_rates(self, bases: Sequence[float | Tensor]) -> bool:
        """Calls `enter` for every group with its base rate. Returns False, as `enter` does."""
        for group, base in zip(self._optimizer.param_groups, bases, strict=True):
            self.enter(group, base)
        return False

    def enter(self, group: dict[str, Any], base: float | Tensor) -> bool:
        """Makes the group's `lr` a tensor that follows the schedule, and writes the rate of the next update into it.

        Returns False: the schedule computes its last rates on demand.
        """
        applied_steps = self._optimizer._step_state.applied_steps
        # A tensor on a GPU would have to be read in every step.
        group["initial_lr"] = float(base)
        rate = DeviceLR(group["initial_lr"], self._factors, self.origin)
        if device_lr_of(group["lr"]) != rate or group["lr"].device != applied_steps.device:
            group["lr"] = following(rate, applied_steps.device)
            self._optimizer._replan()
        rate.write(group["lr"], applied_steps)
        return False

    def saved(self) -> dict[str, Any]:
        """Returns the items that a state dict has in addition to `last_epoch` and the arguments."""
        return {"origin": self.origin}

    def restore(self, t: int, origin: int | None) -> None:
        """Restores the position of a state dict: its `origin`, or update `t` if `origin` is None."""
        if origin is None:
            self.go_to(t)
            self.expect_load(t)
        else:
            self._resumes_at = None
            self.origin = origin

    def expect_load(self, t: int) -> None:
        """Stores `t` for `after_load`. Loading the optimizer before the next update replaces the applied count."""
        self._resumes_at = t

    def after_load(self) -> None:
        """Goes back to the stored number, if there is one, after the optimizer was loaded."""
        t = self._resumes_at
        if t is not None:
            self.go_to(t)
            self.expect_load(t)
