"""Sets of parameters to time an optimizer on: those of well-known networks, and synthetic ones."""

from __future__ import annotations

import torch
import torchvision
from torch import nn

MODELS = ("resnet18", "resnet50", "resnet152", "mobilenet_v3_small", "mobilenet_v3_large", "vit_b_16")


def check(name: str) -> None:
    """Refuses what `build` does not know.

    Raises:
        ValueError: `name` is neither one of `MODELS` nor ``synthetic:N:SIZE``.
    """
    kind, _, sizes = name.partition(":")
    count, _, size = sizes.partition(":")
    is_synthetic = kind == "synthetic" and count.isdecimal() and size.isdecimal() and int(count) and int(size)
    if name not in MODELS and not is_synthetic:
        raise ValueError(
            f"unknown parameter set {name!r}; choose one of {', '.join(MODELS)}, or synthetic:N:SIZE with "
            "two positive integers, such as synthetic:161:1"
        )


def build(name: str) -> nn.Module:
    """A module that holds the parameters, in FP32.

    Args:
        name: one of `MODELS`, or ``synthetic:N:SIZE`` for N parameters of SIZE elements each.

    Raises:
        ValueError: any other name.
    """
    check(name)
    if name in MODELS:
        return torchvision.models.get_model(name)
    count, size = map(int, name.split(":")[1:])
    return nn.ParameterList([torch.randn(size) * 0.02 for _ in range(count)])
