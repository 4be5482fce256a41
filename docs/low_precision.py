"""The picture of low precision: `python -m docs.low_precision` writes `docs/low_precision.svg`."""

from __future__ import annotations

import torch
from matplotlib import pyplot
from matplotlib.axes import Axes
from torch import Tensor, nn
from torch.nn import Parameter
from torchvision.models import resnet18

from docs.drawing import INK, MARK, OURS, QUIET, WIDTH, save, tidy
from fused_tricks import FusedSGD

LOSS_SCALE = 2.0**16
# Powers of two: the smallest FP16 number, the smallest normal one, and the end of the range.
SMALLEST, SMALLEST_NORMAL, LARGEST = -24, -14, 16
UPDATES = 30


def main() -> None:
    """Draws the gradients of a network in the range of FP16, and a weight with and without a master."""
    figure, (gradients, weight) = pyplot.subplots(
        1, 2, figsize=(WIDTH, 3.0), layout="constrained", width_ratios=(3, 2)
    )
    draw_gradients(gradients)
    draw_weight(weight)
    save(figure, __file__)


def draw_gradients(axes: Axes) -> None:
    """Draws histograms of the magnitude with and without the loss scale."""
    magnitudes = activation_gradients().abs().log2()
    bins = range(-34, 20)
    top = 1.0
    for shift, colour, name in ((0.0, MARK, "scale 1"), (16.0, OURS, "scale 2¹⁶")):
        counts = torch.histogram(magnitudes + shift, torch.tensor(bins, dtype=torch.float32)).hist
        shares = counts / len(magnitudes)
        axes.stairs(shares, bins, color=colour, fill=True, alpha=0.55)
        peak = int(shares.argmax())
        top = max(float(shares.max()), top if top < 1 else 0)
        axes.text(bins[peak], float(shares[peak]) * 1.05, name, color=colour, ha="center")
    axes.axvspan(bins[0], SMALLEST - 1, color="#DDDDDD", linewidth=0, zorder=0)
    axes.axvspan(SMALLEST - 1, SMALLEST_NORMAL, color="#F2F2F2", linewidth=0, zorder=0)
    axes.axvspan(LARGEST, bins[-1], color="#DDDDDD", linewidth=0, zorder=0)
    for place, words in ((-29.5, "0 in\nFP16"), (-19.5, "fewer\nbits"), (1, "FP16"), (17.5, "inf")):
        axes.text(place, top * 1.52, words, ha="center", va="top", color=INK, fontsize=9)
    axes.set_xlim(bins[0], bins[-1])
    axes.set_ylim(0, top * 1.55)
    axes.set_xticks([SMALLEST, SMALLEST_NORMAL, 0, LARGEST], ["2⁻²⁴", "2⁻¹⁴", "1", "2¹⁶"])
    axes.set_yticks([])
    tidy(axes, "gradients of the activations, ResNet-18", "magnitude")


def activation_gradients() -> Tensor:
    """Returns the gradients of the outputs of all convolutions, in one step of a new network on random images."""
    torch.manual_seed(0)
    model = resnet18(num_classes=10)
    found: list[Tensor] = []

    def keep(module: nn.Module, args: object, output: Tensor) -> None:
        output.register_hook(lambda grad: found.append(grad.flatten()))

    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(keep)
    images, labels = torch.randn(128, 3, 32, 32), torch.randint(10, (128,))
    nn.functional.cross_entropy(model(images), labels).backward()
    return torch.cat(found)


def draw_weight(axes: Axes) -> None:
    """Draws an FP16 weight of 1 under updates of 0.0001."""
    for kind, colour, name, height in (
        (torch.optim.SGD, MARK, "SGD, FP16 weight", 1.0002),
        (FusedSGD, OURS, "FusedSGD,\nFP16 weight", 0.9975),
    ):
        weight = Parameter(torch.ones(1, dtype=torch.float16))
        optimizer = kind([weight], lr=1e-4)
        values = [weight.item()]
        for _ in range(UPDATES):
            weight.grad = torch.ones_like(weight)
            optimizer.step()
            values.append(weight.item())
        axes.step(range(UPDATES + 1), values, color=colour, linewidth=1.8, where="post")
        axes.text(0, height, name, color=colour, fontsize=9)
    axes.plot([0, UPDATES], [1, 1 - 1e-4 * UPDATES], color=QUIET, linewidth=1, linestyle=(0, (4, 3)))
    axes.text(14, 0.99895, "its master", color=QUIET, fontsize=9)
    axes.set_yticks([1, 0.999, 0.998, 0.997])
    axes.set_ylim(0.9966, 1.0006)
    axes.set_xticks([0, UPDATES])
    tidy(axes, "30 updates of −0.0001", "update")


if __name__ == "__main__":
    main()
