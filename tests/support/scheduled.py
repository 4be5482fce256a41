"""Optimizers with a schedule, and the rates that they use."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

FACTORS = [0.25, 0.5, 0.75, 1.0, 1.0, 0.75, 0.25, 0.0, 0.0]
"""The factors for total_steps=7 and warmup_steps=4, which include a cosine of three updates."""


def parameter() -> Parameter:
    param = Parameter(torch.ones(2, 2))
    param.grad = torch.ones(2, 2)
    return param


def two_groups(lr: Any = 0.1, other: Any = 0.4) -> Optimizer:
    return torch.optim.SGD(
        [{"params": parameter()}, {"params": parameter(), "lr": other}], lr=lr, momentum=0.9
    )


def rates(optimizer: Optimizer) -> list[float]:
    return [float(group["lr"]) for group in optimizer.param_groups]


def run(optimizer: Optimizer, schedule: LRScheduler, updates: int) -> list[list[float]]:
    """Runs the next updates, and returns their rates."""
    used = []
    for _ in range(updates):
        used.append(rates(optimizer))
        optimizer.step()
        schedule.step()
    return used
