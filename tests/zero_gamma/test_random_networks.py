"""Random residual networks: every γ that `zero_gamma_` sets receives a gradient."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fused_tricks import zero_gamma_, zero_gamma_names

pytestmark = pytest.mark.slow

CHANNELS = 6


class Function(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Scaled(nn.Module):
    """Layer scale, or squeeze and excitation."""

    def __init__(self, gate: nn.Module | None) -> None:
        super().__init__()
        self.gate = gate
        self.scale = nn.Parameter(torch.full((CHANNELS, 1, 1), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale if self.gate is None else x * self.gate(x)


def conv() -> nn.Module:
    return nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)


def norm() -> nn.Module:
    instance_norm = nn.InstanceNorm2d(CHANNELS, affine=True)
    return random.choice([nn.BatchNorm2d(CHANNELS), nn.GroupNorm(2, CHANNELS), instance_norm])


def after_the_norm() -> nn.Module:
    """Returns a random module between a norm and an addition. Some modules pass no gradient back at zero."""
    makers: list[Callable[[], nn.Module]] = [
        nn.Identity,
        nn.ReLU,
        nn.SiLU,
        lambda: nn.Dropout(0.1),
        lambda: nn.AvgPool2d(3, 1, 1),
        lambda: Scaled(None),
        lambda: Scaled(
            nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(CHANNELS, CHANNELS, 1), nn.Sigmoid())
        ),
        lambda: Function(lambda x: x.flatten(2).unflatten(2, x.shape[2:])),
        lambda: Function(lambda x: x / 2),
        lambda: Function(lambda x: x * x),
        lambda: Function(lambda x: x * torch.sigmoid(x)),
        lambda: Function(lambda x: x * F.relu(x)),
        lambda: Function(lambda x: x.clamp(min=0)),
    ]
    return random.choice(makers)()


def branch(depth: int) -> nn.Module:
    layers: list[nn.Module] = []
    for _ in range(random.randint(1, 3)):
        nested = depth > 0 and random.random() < 0.25
        layers += [Block(depth - 1)] if nested else [conv(), *([norm()] if random.random() < 0.7 else [])]
        layers += random.choice([[nn.ReLU()], [nn.SiLU()], []])
    if random.random() < 0.8:
        layers += [conv(), norm(), *(after_the_norm() for _ in range(random.randint(0, 2)))]
    return nn.Sequential(*layers)


def shortcut() -> nn.Module:
    projection = nn.Sequential(conv(), norm())
    long = nn.Sequential(conv(), norm(), nn.ReLU(), conv(), norm())
    return random.choice([nn.Identity(), nn.Identity(), nn.MaxPool2d(3, 1, 1), conv(), projection, long])


class Block(nn.Module):
    def __init__(self, depth: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branch(depth) for _ in range(random.choice([1, 1, 1, 2, 3])))
        self.shortcut = shortcut()
        self.activation = random.choice([nn.ReLU(), nn.Identity()])
        self.shortcut_first = random.random() < 0.5
        self.repeats = random.choice([1, 1, 1, 1, 2])

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.repeats):
            terms = [branch(x) for branch in self.branches]
            terms.insert(0 if self.shortcut_first else len(terms), self.shortcut(x))
            x = self.activation(sum(terms[1:], start=terms[0]))
        return x


@pytest.mark.parametrize("seed", range(25))
def test_one_backward_pass_gives_every_zeroed_gamma_a_gradient(seed: int) -> None:
    random.seed(seed)
    torch.manual_seed(seed)
    blocks = [Block(depth=2) for _ in range(random.randint(2, 5))]
    model = nn.Sequential(nn.Conv2d(3, CHANNELS, 1), *blocks, nn.AdaptiveAvgPool2d(1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        names = zero_gamma_names(model)
        zero_gamma_(model)
    output = model(torch.randn(16, 3, 9, 9))
    (output * torch.randn_like(output)).sum().backward()
    for name in names:
        gamma = model.get_submodule(name).weight
        assert gamma.count_nonzero() == 0
        assert gamma.grad.count_nonzero() > 0, name
