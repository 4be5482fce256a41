"""A network that several tests train."""

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
