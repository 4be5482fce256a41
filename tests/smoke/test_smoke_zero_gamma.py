"""`zero_gamma_` with several releases of torch, because the details of its graphs depend on torch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fused_tricks as ft

Forward = Callable[["Network", Tensor], Tensor]


class Network(nn.Module):
    def __init__(self, forward: Forward, norm: Callable[[int], nn.Module] = nn.BatchNorm2d) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 1)
        self.branch = nn.Sequential(nn.Conv2d(4, 4, 1), norm(4))
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(4, 4, 1), nn.Sigmoid())
        self._forward = forward

    def forward(self, x: Tensor) -> Tensor:
        return self._forward(self, self.stem(x))


def add_to_view(network: Network, x: Tensor) -> Tensor:
    y = network.branch(x).flatten(2)
    y += x.flatten(2)
    return y


FORMS: dict[str, Forward] = {
    "addition": lambda network, x: x + network.branch(x),
    "addition to a view": add_to_view,
    "gate and dropout": lambda network, x: (
        x + nn.functional.dropout((y := network.branch(x)) * network.gate(y), 0.5)
    ),
    "reentrant checkpoint": lambda network, x: x + checkpoint(network.branch, x, use_reentrant=True),
    "path that depends on data": lambda network, x: x + network.branch(x) if x.sum() == x.sum() else x,
}
NORMS = {
    "BatchNorm": nn.BatchNorm2d,
    "SyncBatchNorm": nn.SyncBatchNorm,
    "InstanceNorm": lambda channels: nn.InstanceNorm2d(channels, affine=True),
    "GroupNorm": lambda channels: nn.GroupNorm(2, channels),
    "LayerNorm": lambda channels: nn.LayerNorm([channels, 8, 8]),
}


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("form", FORMS)
def test_the_norm_that_ends_the_branch_is_found(form: str, norm: str) -> None:
    network = Network(FORMS[form], NORMS[norm])
    assert ft.zero_gamma_names(network, torch.randn(2, 3, 8, 8)) == ["branch.1"]


def test_a_norm_before_a_relu_is_not_found() -> None:
    assert ft.zero_gamma_names(Network(lambda network, x: x + network.branch(x).relu())) == []
