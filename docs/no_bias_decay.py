"""The picture of "no bias decay": `python -m docs.no_bias_decay` writes `docs/no_bias_decay.svg`."""

from __future__ import annotations

import torch
from matplotlib import pyplot
from matplotlib.axes import Axes
from torch.nn import Parameter
from torchvision.models import resnet50

from docs.drawing import MARK, OURS, WIDTH, save, tidy
from fused_tricks import FusedSGD

UPDATES, EVERY = 5000, 50


def main() -> None:
    """Draws the shares of ResNet-50's parameters, and parameters without a gradient."""
    figure, (shares, decay) = pyplot.subplots(
        1, 2, figsize=(WIDTH, 2.7), layout="constrained", width_ratios=(3, 2)
    )
    draw_shares(shares)
    draw_decay(decay)
    save(figure, __file__)


def draw_shares(axes: Axes) -> None:
    """Draws the share of biases and norms, of tensors and of elements."""
    with torch.device("meta"):
        params = list(resnet50().parameters())
    weights = [param for param in params if param.dim() > 1]
    others = [param for param in params if param.dim() <= 1]
    for row, (weight, other) in enumerate(
        [(sum(p.numel() for p in weights), sum(p.numel() for p in others)), (len(weights), len(others))]
    ):
        share = weight / (weight + other)
        axes.barh(row, share, color=OURS, height=0.5)
        axes.barh(row, 1 - share, left=share, color=MARK, height=0.5)
        axes.text(0.02, row, f"{weight:,} decay", va="center", color="white")
        inside = share < 0.6
        axes.text(
            (share + 0.02) if inside else 1,
            row + (0 if inside else 0.36),
            f"{other:,} do not",
            va="center",
            ha="left" if inside else "right",
            color="white" if inside else MARK,
        )
    axes.set_yticks([0, 1], ["elements", "tensors"])
    axes.set_xticks([])
    axes.set_ylim(-0.4, 1.5)
    tidy(axes, "ResNet-50")
    axes.spines[["bottom", "left"]].set_visible(False)
    axes.tick_params(left=False)


def draw_decay(axes: Axes) -> None:
    """Draws a weight and a bias that have gradients of zero."""
    weight, bias = Parameter(torch.ones(1, 1)), Parameter(torch.ones(1))
    optimizer = FusedSGD([weight, bias], lr=0.1, momentum=0.9, weight_decay=1e-4)
    weights, biases = [], []
    for update in range(UPDATES + 1):
        if update % EVERY == 0:
            weights.append(weight.item())
            biases.append(bias.item())
        weight.grad, bias.grad = torch.zeros_like(weight), torch.zeros_like(bias)
        optimizer.step()
    times = range(0, UPDATES + 1, EVERY)
    axes.plot(times, weights, color=OURS, linewidth=1.8)
    axes.plot(times, biases, color=MARK, linewidth=1.8)
    axes.text(UPDATES, 0.9, "bias, γ, β", color=MARK, ha="right")
    axes.text(UPDATES * 0.55, 0.6, "weight", color=OURS, ha="right")
    axes.set_ylim(0, 1.1)
    axes.set_xticks([0, UPDATES])
    tidy(axes, "without a gradient", "update", "value")


if __name__ == "__main__":
    main()
