"""Sets of parameters for timing an optimizer: parameters of well-known networks, and synthetic ones."""

from __future__ import annotations

import copy
import functools

import torch
import torchvision
from torch import nn

MODELS = ("resnet18", "resnet50", "resnet152", "mobilenet_v3_small", "mobilenet_v3_large", "vit_b_16")


def check(name: str) -> None:
    """Raises unless `build` knows a name.

    Raises:
        ValueError: `name` is neither one of `MODELS` nor `synthetic:N:SIZE`.
    """
    kind, _, sizes = name.partition(":")
    count, _, size = sizes.partition(":")
    is_synthetic = kind == "synthetic" and count.isdecimal() and size.isdecimal() and int(count) and int(size)
    if name not in MODELS and not is_synthetic:
        raise ValueError(
            f"unknown parameter set {name!r}; choose one of {', '.join(MODELS)}, or synthetic:N:SIZE with "
            "two positive integers, such as synthetic:161:1"
        )


def count(name: str) -> int:
    """Returns the number of elements of a set."""
    return sum(parameter.numel() for parameter in build(name, torch.device("meta")).parameters())


def build(name: str, device: torch.device = torch.device("cpu")) -> nn.Module:  # noqa: B008
    """Returns a module with the parameters, in FP32, with the same values each time.

    Args:
        name: One of `MODELS`, or `synthetic:N:SIZE` for N parameters of SIZE elements each.
        device: The device of the parameters.

    Raises:
        ValueError: The name is unknown.
    """
    check(name)
    if name in MODELS:
        return copy.deepcopy(_network(name)).to(device)
    count, size = map(int, name.split(":")[1:])
    values = torch.randn(min(size, 2**16), generator=torch.Generator().manual_seed(0)).to(device) * 0.02
    repeats = -(-size // len(values))
    return nn.ParameterList([values.roll(place).repeat(repeats)[:size].clone() for place in range(count)])


@functools.cache
def _network(name: str) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return torchvision.models.get_model(name)
