"""The picture of zero γ: `python -m docs.zero_gamma` writes `docs/zero_gamma.svg`."""

from __future__ import annotations

import itertools

import torch
from matplotlib import pyplot
from matplotlib.axes import Axes
from torch import Tensor, nn

import fused_tricks as ft
from docs.drawing import INK, MARK, OURS, QUIET, WIDTH, save, tidy

BLOCKS, CHANNELS = 16, 32


class Block(nn.Module):
    """The basic block of a residual network."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(CHANNELS)
        self.conv2 = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(CHANNELS)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        return (x + out).relu()


def main() -> None:
    """Draws a block and the activations of a new network."""
    figure, (block, growth) = pyplot.subplots(
        1, 2, figsize=(WIDTH, 2.9), layout="constrained", width_ratios=(3, 2)
    )
    draw_block(block)
    draw_growth(growth)
    save(figure, __file__)


def draw_block(axes: Axes) -> None:
    """Draws the branch and the shortcut of a block."""
    axes.set_xlim(-0.3, 10)
    axes.set_ylim(-1.9, 1.5)
    axes.set_axis_off()
    arrow = {"arrowstyle": "->", "color": INK, "linewidth": 1.2, "shrinkA": 0, "shrinkB": 0}
    layers = ["conv", "BN", "ReLU", "conv", "BN"]
    places = [1.6 + 1.4 * index for index in range(len(layers))]
    for place, layer in zip(places, layers, strict=True):
        is_last = place == places[-1]
        box = {
            "boxstyle": "round,pad=0.4",
            "facecolor": "#FBE3D6" if is_last else "#EEF3F7",
            "edgecolor": MARK if is_last else QUIET,
        }
        axes.text(place, 0.8, layer, ha="center", va="center", fontsize=9, bbox=box)
    ends = [0.3, *places, 8.6]
    for left, right in itertools.pairwise(ends):
        axes.annotate(
            "", (right - (0.48 if right != 8.6 else 0.1), 0.8), (left + 0.48, 0.8), arrowprops=arrow
        )
    axes.annotate("", (8.6, -0.68), (8.6, 0.8), arrowprops=arrow)
    axes.annotate("", (8.4, -0.9), (0.3, -0.9), arrowprops=arrow)
    axes.plot([0.3, 0.3, 0.78], [-0.9, 0.8, 0.8], color=INK, linewidth=1.2)
    axes.plot(8.6, -0.9, "o", markersize=13, markerfacecolor="white", markeredgecolor=INK)
    axes.text(8.6, -0.92, "+", ha="center", va="center")
    axes.annotate("", (9.9, -0.9), (8.85, -0.9), arrowprops=arrow)
    axes.text(0.0, -0.9, "x", ha="right", va="center")
    axes.text(places[-1], 0.16, "γ = 0, β = 0", ha="center", va="center", color=MARK)
    axes.text(4.3, -0.62, "shortcut", ha="center", color=INK, fontsize=9)
    axes.text(4.3, -1.5, "a new block: the branch adds 0 to x", ha="center", color=OURS)


def draw_growth(axes: Axes) -> None:
    """Draws the size of the activations behind each block of a new network."""
    depth = range(BLOCKS + 1)
    for name, colour, zeroes in (("γ = 1", QUIET, False), ("γ = 0", OURS, True)):
        sizes = activations(zeroes)
        axes.plot(depth, sizes, "o-", color=colour, markersize=3, linewidth=1.6)
        offset = (0, 7) if zeroes else (2, -22)
        axes.annotate(name, (BLOCKS, sizes[-1]), offset, textcoords="offset points", ha="right", color=colour)
    axes.set_ylim(bottom=0)
    tidy(axes, "a new network", "block", "root mean square of x")


@torch.no_grad()
def activations(zeroes: bool) -> list[float]:
    """Returns the root mean square of the input and of each block's output."""
    torch.manual_seed(0)
    network = nn.Sequential(*(Block() for _ in range(BLOCKS)))
    x = torch.randn(16, CHANNELS, 16, 16).relu()
    if zeroes:
        ft.zero_gamma_(network, example_inputs=x)
    sizes = [x.square().mean().sqrt().item()]
    for block in network:
        x = block(x)
        sizes.append(x.square().mean().sqrt().item())
    return sizes


if __name__ == "__main__":
    main()
