"""A model whose gradients are what it is called with, so that every sum over processes can be made exact."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import Module, ParameterList

Shapes = Sequence[tuple[int, ...]]

# Over four processes: uneven shards, and processes that have nothing of a tensor.
SHAPES: Shapes = ((5, 3), (1,), (4, 2), (3,), (9, 2, 1))


class Products(Module):
    """The sum of the products of each parameter with its input."""

    def __init__(self, dtype: torch.dtype, shapes: Shapes = SHAPES) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weights = ParameterList(torch.randn(*shape, generator=generator).to(dtype) for shape in shapes)

    def forward(self, inputs: Sequence[Tensor]) -> Tensor:
        return sum((w * x.to(w.dtype)).sum() for w, x in zip(self.weights, inputs, strict=True))


def inputs_of(rank: int, step: int, shapes: Shapes = SHAPES) -> list[Tensor]:
    """Small integers, whose means over two or four processes and sums of squares are exact in any order."""
    generator = torch.Generator().manual_seed(100 * step + rank)
    return [torch.randint(-4, 5, shape, generator=generator).float() for shape in shapes]


def with_overflow(inputs: list[Tensor]) -> list[Tensor]:
    """The same with an infinite element."""
    inputs[2].view(-1)[-1] = torch.inf
    return inputs


def mean_of(everywhere: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """The mean over processes of what each is called with."""
    return [torch.stack(parts).sum(0) / len(everywhere) for parts in zip(*everywhere, strict=True)]
