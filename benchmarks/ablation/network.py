"""A residual network that is small enough for many trainings on a CPU."""

from __future__ import annotations

from torch import nn
from torchvision.models.resnet import BasicBlock


def blocks(depth: int) -> int:
    """Returns the residual blocks in each of the three stages of a network with `depth` layers.

    Raises:
        ValueError: The depth is not 6 · blocks + 2 with at least one block.
    """
    count, rest = divmod(depth - 2, 6)
    if rest or count < 1:
        raise ValueError(f"depth must be 6 · n + 2 layers, such as 8, 14, 56 or 110, got {depth}")
    return count


def small_resnet(classes: int, depth: int) -> nn.Sequential:
    """A residual network for small images: 6 · n + 2 layers in three stages of n blocks with 16, 32 and 64 channels.

    The network for CIFAR-10 of "Deep Residual Learning" (arXiv 1512.03385), section 4.2, with torchvision's blocks;
    shortcuts between stages are 1 × 1 convolutions, as in torchvision. For images of shape (n, 3, height, width).
    """
    count = blocks(depth)
    channels = 16
    layers: list[nn.Module] = [
        nn.Conv2d(3, channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(inplace=True),
    ]
    for width in (16, 32, 64):
        for _ in range(count):
            if width == channels:
                layers.append(BasicBlock(channels, width))
            else:
                shortcut = nn.Sequential(
                    nn.Conv2d(channels, width, 1, stride=2, bias=False), nn.BatchNorm2d(width)
                )
                layers.append(BasicBlock(channels, width, stride=2, downsample=shortcut))
                channels = width
    network = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return network
