"""Networks that several tests train."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Network(nn.Module):
    """Two layers that can be frozen one by one, and a BatchNorm between them; the same seed gives the same values."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.body, self.norm, self.fc = nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.norm(self.body(images)))


class Tiny(nn.Module):
    """A residual block, running statistics, random numbers, and gradients that overflow at first in FP16."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        # Not in the order of use, so that DDP packs the gradients otherwise once it has seen in what order they come.
        self.head = nn.Sequential(nn.ReLU(), nn.Dropout(0.2), nn.Flatten(), nn.Linear(512, num_classes))
        self.block = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8))
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, stride=4, bias=False), nn.BatchNorm2d(8), nn.ReLU())

    def forward(self, images: Tensor) -> Tensor:
        images = self.stem(images)
        return 64 * self.head(images + self.block(images))
