"""An optimizer in the middle of a training."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import Parameter

from fused_tricks import FusedSGD

from .comparison import gradients, parameters, set_gradients


def in_training(
    backend: str,
    device: torch.device,
    last: torch.dtype,
    *,
    steps: int = 2,
    names: bool = False,
    **options: Any,
) -> tuple[FusedSGD, list[Parameter]]:
    """Returns an optimizer over two groups after some applied steps, with gradients for the next step."""
    params = parameters(
        [(4,), (2, 3), (5,), (6,)], [torch.float16, torch.float32, torch.float32, last], device
    )
    items = list(zip(("stem", "conv", "norm", "head.weight"), params, strict=True)) if names else params
    groups = [{"params": items[:1]}, {"params": items[1:]}]
    optimizer = FusedSGD(groups, lr=0.1, momentum=0.9, backend=backend, **options)
    *good, last_ones = gradients(params, steps + 1)
    for grads in good:
        set_gradients(params, grads)
        optimizer.step()
    set_gradients(params, last_ones)
    return optimizer, params
