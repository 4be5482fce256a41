"""Sets of parameters to time an optimizer on: those of well-known networks, and synthetic ones."""

from __future__ import annotations

import torch
import torchvision
from torch import nn

MODELS = ("resnet18", "resnet50", "resnet152", "mobilenet_v3_small", "mobilenet_v3_large", "vit_b_16")


def build(name: str) -> nn.Module:
    """A module that holds the parameters, in FP32.

    Args:
        name: one of `MODELS`, or ``synthetic:N:SIZE`` for N parameters of SIZE elements each.

    Raises:
        ValueError: any other name.
    """
    if name in MODELS:
        return torchvision.models.get_model(name)
    kind, _, sizes = name.partition(":")
    count, _, size = sizes.partition(":")
    if kind != "synthetic" or not (count.isdecimal() and size.isdecimal() and int(count) and int(size)):
        raise ValueError(
            f"unknown parameter set {name!r}; choose one of {', '.join(MODELS)}, or synthetic:N:SIZE with "
            "two positive integers, such as synthetic:161:1"
        )
    return nn.ParameterList([torch.randn(int(size)) * 0.02 for _ in range(int(count))])
