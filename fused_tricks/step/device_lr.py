"""A learning rate that follows the number of applied steps, which on a GPU only the device counts."""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .ordinary_tensors import outside_all_modes


class FactorTable:
    """A table of FP64 factors, one for each update. Updates after the last factor use the last factor.

    Args:
        factors: At least one factor, in an array of type `"d"`.
    """

    def __init__(self, factors: array[float]) -> None:
        with outside_all_modes():
            self._copies = {torch.device("cpu"): torch.frombuffer(factors, dtype=torch.float64).clone()}

    def __getstate__(self) -> dict[str, Any]:
        return {"_copies": {torch.device("cpu"): self.on(torch.device("cpu"))}}

    def on(self, device: torch.device) -> Tensor:
        """Returns the factors as a tensor on `device`. The first call for a device copies them."""
        if device not in self._copies:
            with outside_all_modes():
                self._copies[device] = self._copies[torch.device("cpu")].to(device)
        return self._copies[device]


@dataclass(frozen=True)
class DeviceLR:
    """The rule behind a tensor in a group's `lr`: the learning rate is `base` times a factor.

    Attributes:
        base: The learning rate at factor 1.
        factors: The factors of consecutive updates.
        origin: The number of applied steps before the update that uses the first factor.
    """

    base: float
    factors: FactorTable
    origin: int

    def after(self, applied: int) -> float:
        """Returns the learning rate of the update that follows `applied` updates."""
        factors = self.factors.on(torch.device("cpu"))
        with outside_all_modes():
            return self.base * float(factors[min(max(applied - self.origin, 0), len(factors) - 1)])

    def write(self, lr: Tensor, applied_steps: Tensor) -> None:
        """Writes the learning rate of the next update into `lr`, on the device of `lr` and without a sync.

        Args:
            lr: 0-dim FP64 tensor.
            applied_steps: 0-dim INT64 tensor on the same device.
        """
        factors = self.factors.on(lr.device)
        with outside_all_modes():
            due = (applied_steps - self.origin).clamp(0, len(factors) - 1)
            torch.mul(factors.take(due), self.base, out=lr)


def following(rate: DeviceLR, device: torch.device) -> Tensor:
    """Returns a tensor for a group's `lr` that makes the kernels use `rate`.

    The kernels ignore the value of this 0-dim FP64 tensor. User code may read the value, and `DeviceLR.write`
    updates the value.
    """
    with outside_all_modes():
        lr = torch.zeros((), dtype=torch.float64, device=device)
    lr._device_lr = rate  # type: ignore[attr-defined]
    return lr


def device_lr_of(lr: Any) -> DeviceLR | None:
    """Returns the rule behind a group's `lr`; None if `lr` is a number or an ordinary tensor."""
    return getattr(lr, "_device_lr", None) if isinstance(lr, Tensor) else None
