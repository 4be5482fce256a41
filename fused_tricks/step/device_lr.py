"""A learning rate that follows the number of updates applied, which may be known on the device alone."""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .ordinary_tensors import outside_all_modes


class FactorTable:
    """FP64 factors, one for each update; the last is for all updates that follow.

    Args:
        factors: At least one, of type `"d"`.
    """

    def __init__(self, factors: array[float]) -> None:
        with outside_all_modes():
            self._copies = {torch.device("cpu"): torch.frombuffer(factors, dtype=torch.float64).clone()}

    def __getstate__(self) -> dict[str, Any]:
        return {"_copies": {torch.device("cpu"): self.on(torch.device("cpu"))}}

    def on(self, device: torch.device) -> Tensor:
        """The factors as a tensor on a device; copied there once."""
        if device not in self._copies:
            with outside_all_modes():
                self._copies[device] = self._copies[torch.device("cpu")].to(device)
        return self._copies[device]


@dataclass(frozen=True)
class DeviceLR:
    """What a tensor in a group's `lr` stands for: `base` times a factor.

    Attributes:
        base: The rate at factor 1.
        factors: The factors of consecutive updates.
        origin: How many updates were applied before the one that takes the first factor.
    """

    base: float
    factors: FactorTable
    origin: int

    def after(self, applied: int) -> float:
        """The rate of the update that follows `applied` others."""
        factors = self.factors.on(torch.device("cpu"))
        with outside_all_modes():
            return self.base * float(factors[min(max(applied - self.origin, 0), len(factors) - 1)])

    def write(self, lr: Tensor, applied_steps: Tensor) -> None:
        """Writes the rate of the next update into `lr`, on its device and without a sync.

        Args:
            lr: FP64 of no dimension.
            applied_steps: INT64 of no dimension, on the same device.
        """
        factors = self.factors.on(lr.device)
        with outside_all_modes():
            due = (applied_steps - self.origin).clamp(0, len(factors) - 1)
            torch.mul(factors.take(due), self.base, out=lr)


def following(rate: DeviceLR, device: torch.device) -> Tensor:
    """A tensor for a group's `lr` that the kernels take for `rate`.

    Its own value, FP64 of no dimension, is for people and other code to read; `DeviceLR.write` renews it.
    """
    with outside_all_modes():
        lr = torch.zeros((), dtype=torch.float64, device=device)
    lr._device_lr = rate  # type: ignore[attr-defined]
    return lr


def device_lr_of(lr: Any) -> DeviceLR | None:
    """What a group's `lr` stands for; None where it is just a number or a tensor."""
    return getattr(lr, "_device_lr", None) if isinstance(lr, Tensor) else None
