"""The averages of the weights: export, and evaluation with them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .fp32_weights import fp32_state_dict
from .optimizer import FusedSGD


def ema_state_dict(model: nn.Module, optimizer: FusedSGD) -> dict[str, Any]:
    """Returns `model.state_dict()` with the averages in FP32 in place of the weights."""
    state = fp32_state_dict(model, optimizer)
    for name, param in model.named_parameters():
        average = optimizer.state.get(param, {}).get("ema_param")
        if average is not None:
            state[name] = average.detach().clone()
    return state


@contextmanager
@torch.no_grad()
def ema_weights(model: nn.Module, optimizer: FusedSGD) -> Iterator[None]:
    """Evaluates with the rounded averages, and restores every bit afterwards."""
    held = [
        (param, param.detach().clone(), optimizer.state[param]["ema_param"])
        for param in model.parameters()
        if "ema_param" in optimizer.state.get(param, {})
    ]
    for param, _, average in held:
        param.copy_(average)
    try:
        yield
    finally:
        for param, weight, _ in held:
            param.copy_(weight)
