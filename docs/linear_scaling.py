"""The picture of the linear scaling rule: `python -m docs.linear_scaling` writes `docs/linear_scaling.svg`."""

from __future__ import annotations

import numpy
from matplotlib import pyplot
from matplotlib.axes import Axes
from numpy.typing import NDArray

from docs.drawing import INK, MARK, OURS, QUIET, WIDTH, save, tidy
from fused_tricks import scale_lr

CURVATURE = numpy.array([1.0, 4.0])
START = numpy.array([-3.0, 1.6])
SMALL_LR, RATIO, UPDATES = 0.05, 4, 20


def main() -> None:
    """Draws the rule and three descents."""
    figure, (rule, descent) = pyplot.subplots(
        1, 2, figsize=(WIDTH, 3.1), layout="constrained", width_ratios=(2, 3)
    )
    draw_rule(rule)
    draw_descent(descent)
    save(figure, __file__)


def draw_rule(axes: Axes) -> None:
    """Draws the learning rate against the batch size."""
    sizes = [256, 512, 1024, 2048]
    rates = [scale_lr(0.1, size) for size in sizes]
    axes.plot([0, *sizes], [0, *rates], color=OURS, linewidth=1.8)
    axes.plot(sizes, rates, "o", color=OURS)
    for size, rate in zip(sizes, rates, strict=True):
        axes.annotate(f"{rate:g}", (size, rate), (-4, 6), textcoords="offset points", ha="right", color=OURS)
    axes.set_xticks(sizes, [str(size) for size in sizes], fontsize=8)
    axes.set_xlim(0, 2200)
    axes.set_ylim(0, 0.92)
    tidy(axes, "0.1 · b / 256", "batch size b", "learning rate")


def draw_descent(axes: Axes) -> None:
    """Draws updates of a small batch, and those of a batch that is four times as large, with two rates."""
    noise = numpy.random.default_rng(3).normal(scale=1.6, size=(UPDATES, 2))
    large = noise.reshape(-1, RATIO, 2).mean(axis=1)
    x, y = numpy.meshgrid(numpy.linspace(-3.4, 1.2, 200), numpy.linspace(-1.2, 2.0, 200))
    axes.contour(x, y, x**2 + 4 * y**2, levels=[0.3, 1.5, 4, 8, 13, 19], colors="#DDDDDD", linewidths=0.8)
    runs = {
        f"batch b, rate η, {UPDATES} updates": (path(noise, SMALL_LR), QUIET),
        f"batch {RATIO}b, rate {RATIO}η, {len(large)} updates": (path(large, RATIO * SMALL_LR), OURS),
        f"batch {RATIO}b, rate η, {len(large)} updates": (path(large, SMALL_LR), MARK),
    }
    for name, (points, colour) in runs.items():
        axes.plot(*points.T, "o-", color=colour, markersize=3.5, linewidth=1.4, label=name)
    axes.plot(0, 0, "+", color=INK, markersize=9)
    axes.annotate("minimum", (0, 0), (6, -12), textcoords="offset points", color=INK, fontsize=9)
    axes.legend(loc="upper right", frameon=False, fontsize=9, handlelength=1.2)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_xlim(-3.4, 1.2)
    axes.set_ylim(-1.2, 2.6)
    tidy(axes, "equally many samples in each run")


def path(noise: NDArray[numpy.float64], rate: float) -> NDArray[numpy.float64]:
    """Returns the points of a gradient descent on a quadratic with noisy gradients."""
    points = [START]
    for sample in noise:
        points.append(points[-1] - rate * (CURVATURE * points[-1] + sample))
    return numpy.array(points)


if __name__ == "__main__":
    main()
