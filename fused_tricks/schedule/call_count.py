"""A schedule by the calls of its `step`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from .curve import WarmupCosine


class CallCount:
    """Counts calls, and writes the learning rates of the update that is due.

    Args:
        optimizer: The optimizer, of any class.
        curve: The schedule.

    Attributes:
        t: The number of the next update; -1 until a `SequentialLR` comes to this schedule.
    """

    name = "calls"
    sets_last_rates = True

    def __init__(self, optimizer: Optimizer, curve: WarmupCosine) -> None:
        self._optimizer = optimizer
        self._curve = curve
        self.t = -1

    @property
    def known_t(self) -> int:
        """The number of the next update, always known on the host."""
        return self.t

    def assign(self, t: int) -> None:
        """Makes the next update number `t`."""
        self.t = t

    def go_to(self, t: int) -> None:
        """Makes the next update number `t`."""
        self.t = t

    def advance(self) -> None:
        """Goes to the next update."""
        self.t += 1

    def write_rates(self, bases: Sequence[float | Tensor]) -> bool:
        """Writes the learning rate of every group. Returns False before the schedule's turn in a `SequentialLR`."""
        for group, base in zip(self._optimizer.param_groups, bases, strict=True):
            self.enter(group, base)
        return self.t >= 0

    def enter(self, group: dict[str, Any], base: float | Tensor) -> bool:
        """Writes the learning rate of one group. Returns False before the schedule's turn in a `SequentialLR`."""
        if self.t < 0:
            return False
        rate = base * self._curve.factor(self.t)
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate.reshape(()) if isinstance(rate, Tensor) else rate)
        else:
            group["lr"] = rate
        return True

    def saved(self) -> dict[str, Any]:
        """Returns the entries of a state dict beside `last_epoch`: none."""
        return {}

    def restore(self, t: int, origin: int | None) -> None:
        """Continues at the position of a state dict."""
        self.t = t

    def expect_load(self, t: int) -> None:
        """Does nothing: an optimizer that is loaded later does not change the count."""

    def after_load(self) -> None:
        """Does nothing, as `expect_load`."""
