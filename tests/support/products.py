"""A model whose gradients are its inputs, so that every sum over processes can be exact."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, ParameterList

Shapes = Sequence[tuple[int, ...]]

OPTIONS: dict[str, Any] = {
    "lr": 0.1,
    "momentum": 0.9,
    "weight_decay": 1e-2,
    "dampening": 0.25,
    "ema_decay": 0.5,
}
# Over four processes: uneven shards and empty shards.
SHAPES: Shapes = ((5, 3), (1,), (4, 2), (3,), (9, 2, 1))


class Products(Module):
    """A model that returns the sum of the products of each parameter with its input."""

    def __init__(self, dtype: torch.dtype, shapes: Shapes = SHAPES) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weights = ParameterList(torch.randn(*shape, generator=generator).to(dtype) for shape in shapes)

    def forward(self, inputs: Sequence[Tensor]) -> Tensor:
        return sum((w * x.to(w.dtype)).sum() for w, x in zip(self.weights, inputs, strict=True))


def inputs_of(rank: int, step: int, shapes: Shapes = SHAPES) -> list[Tensor]:
    """Returns small integers, whose means over two or four processes and sums of squares are exact in any order."""
    generator = torch.Generator().manual_seed(100 * step + rank)
    return [torch.randint(-4, 5, shape, generator=generator).float() for shape in shapes]


def with_overflow(inputs: list[Tensor]) -> list[Tensor]:
    """Writes an infinity to one element, and returns the inputs."""
    inputs[2].view(-1)[-1] = torch.inf
    return inputs


def mean_of(everywhere: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """Returns the mean of the inputs over all processes."""
    return [torch.stack(parts).sum(0) / len(everywhere) for parts in zip(*everywhere, strict=True)]
