"""The counter of `count="calls"`: calls of `step`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from .curve import WarmupCosine


class CallCount:
    """The position of an optimizer in a schedule, counted in calls of `step`.

    Args:
        optimizer: The optimizer, of any class.
        curve: The schedule.

    Attributes:
        t: The number of the next update; -1 until a `SequentialLR` begins this schedule.
    """

    name = "calls"
    sets_last_rates = True

    def __init__(self, optimizer: Optimizer, curve: WarmupCosine) -> None:
        self._optimizer = optimizer
        self._curve = curve
        self.t = -1

    @property
    def known_t(self) -> int:
        """Returns `t`, which is always known on the host."""
        return self.t

    def assign(self, t: int) -> None:
        """Makes `t` the number of the next update."""
        self.t = t

    def go_to(self, t: int) -> None:
        """Makes `t` the number of the next update."""
        self.t = t

    def advance(self) -> None:
        """Increments `t`."""
        self.t += 1

    def write_rates(self, bases: Sequence[float | Tensor]) -> bool:
        """Writes the learning rate of every group. Returns True if the schedule has begun; else writes nothing."""
        for group, base in zip(self._optimizer.param_groups, bases, strict=True):
            self.enter(group, base)
        return self.t >= 0

    def enter(self, group: dict[str, Any], base: float | Tensor) -> bool:
        """Writes the learning rate of one group. Returns True if the schedule has begun; else writes nothing."""
        if self.t < 0:
            return False
        rate = base * self._curve.factor(self.t)
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate.reshape(()) if isinstance(rate, Tensor) else rate)
        else:
            group["lr"] = rate
        return True

    def saved(self) -> dict[str, Any]:
        """Returns an empty dict: a state dict has only `last_epoch` and the arguments."""
        return {}

    def restore(self, t: int, origin: int | None) -> None:
        """Restores the position of a state dict; ignores `origin`."""
        self.t = t

    def expect_load(self, t: int) -> None:
        """Does nothing: loading the optimizer leaves the count unchanged."""

    def after_load(self) -> None:
        """Does nothing: loading the optimizer leaves the count unchanged."""
