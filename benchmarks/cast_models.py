"""The distance of `cast_model` and autocast from FP32 on every classification network of torchvision.

`python -m benchmarks.cast_models` writes `benchmarks/results/cast_models.md`, and requires no GPU. The tests cover a
few of the networks.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torchvision
from torch import Tensor, nn

from benchmarks.lib import machine, progress, report
from fused_tricks import cast_model

CLASSES = 10
# The smallest image of a network, if larger than 32.
IMAGE_SIZE = {"alexnet": 63, "inception_v3": 299, "maxvit_t": 224, "vit_h_14": 28}


class Errors(NamedTuple):
    """Norms of the differences to FP32, relative to the norms in FP32.

    Attributes:
        output: The relative norm for the output.
        gradient: The relative norm for the gradient of all parameters.
    """

    output: float
    gradient: float


class Comparison(NamedTuple):
    """One network with random weights, on a batch of two random images, in BF16.

    Attributes:
        name: The name in `torchvision.models.get_model`.
        parameters: The number of elements of the parameters.
        image_size: Height and width in pixels.
        autocast: Errors under `torch.autocast`, in evaluation: with the running statistics of an untrained network.
        cast: Errors after `cast_model`, likewise.
        finite: True if all outputs and gradients are finite after `cast_model`, in evaluation and in training.
    """

    name: str
    parameters: int
    image_size: int
    autocast: Errors
    cast: Errors
    finite: bool


def names() -> list[str]:
    """Returns every classification network of torchvision."""
    return sorted(torchvision.models.list_models(torchvision.models))


def build(name: str) -> tuple[nn.Module, Tensor]:
    """Returns the network with `CLASSES` classes and without dropout, in FP32, and two images."""
    size = IMAGE_SIZE.get(name, 32)
    options: dict[str, Any] = {"num_classes": CLASSES}
    if name.startswith("vit_"):
        options["image_size"] = size
    if name in ("googlenet", "inception_v3"):
        options["init_weights"] = True
    model = torchvision.models.get_model(name, weights=None, **options)
    if name.startswith("vit_"):
        nn.init.normal_(model.heads.head.weight, std=0.02)  # zeros here would make every output zero
    for module in model.modules():
        if isinstance(module, nn.Dropout | torchvision.ops.StochasticDepth):
            module.p = 0.0
    return model, torch.randn(2, 3, size, size)


def compare(name: str) -> Comparison:
    """Builds the network of a name and compares it."""
    torch.manual_seed(0)
    return compare_model(name, *build(name))


def compare_model(name: str, model: nn.Module, images: Tensor) -> Comparison:
    """Runs a network in FP32, under autocast and, last, cast."""
    model.eval()
    expected = _run(model, images)
    autocast = _errors(_run(model, images, autocast=True), expected)
    cast_model(model, torch.bfloat16)
    evaluation = _run(model, images)
    cast = _errors(evaluation, expected)
    model.train()
    training = _run(model, images)
    finite = all(bool(tensor.isfinite().all()) for tensor in itertools.chain(*evaluation, *training))
    parameters = sum(param.numel() for param in model.parameters())
    return Comparison(name, parameters, images.shape[-1], autocast, cast, finite)


class _Pass(NamedTuple):
    outputs: list[Tensor]
    gradients: list[Tensor]


def _run(model: nn.Module, images: Tensor, *, autocast: bool = False) -> _Pass:
    """Runs forward and backward. Networks with auxiliary classifiers have several outputs in training."""
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        outputs = model(images)
    outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
    torch.stack([output.float().square().mean() for output in outputs]).sum().backward()
    gradients = [param.grad for param in model.parameters() if param.grad is not None]
    model.zero_grad()
    return _Pass([output.detach() for output in outputs], gradients)


def _errors(actual: _Pass, expected: _Pass) -> Errors:
    return Errors(_error(actual.outputs, expected.outputs), _error(actual.gradients, expected.gradients))


def _error(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    pairs = list(zip(actual, expected, strict=True))
    squares = sum((a.double() - e.double()).square().sum().item() for a, e in pairs)
    return math.sqrt(squares / sum(e.double().square().sum().item() for _, e in pairs))


def markdown(comparisons: Sequence[Comparison], described: dict[str, Any]) -> str:
    """Returns the table that is kept in the repository."""
    header = [
        "network",
        "million parameters",
        "pixels",
        "output: autocast",
        "output: cast_model",
        "gradient: autocast",
        "gradient: cast_model",
        "finite",
    ]
    rows = [
        [
            c.name,
            f"{c.parameters / 1e6:.1f}",
            f"{c.image_size} × {c.image_size}",
            *(f"{100 * error:.2f} %" for pair in zip(c.autocast, c.cast, strict=True) for error in pair),
            "yes" if c.finite else "no",
        ]
        for c in comparisons
    ]
    output_ratio, output_name = max((c.cast.output / c.autocast.output, c.name) for c in comparisons)
    gradient_ratio, gradient_name = max((c.cast.gradient / c.autocast.gradient, c.name) for c in comparisons)
    finite = sum(c.finite for c in comparisons)
    return "\n\n".join(
        [
            "# Casting every classification network of torchvision",
            f"How far {len(comparisons)} networks with random weights are from FP32 in BF16: the norm of the "
            "difference over the norm in FP32, of the output and of the gradient of all parameters, on two random "
            "images. *Finite*: so are all outputs and gradients of the cast network, in evaluation and in training.",
            f"`cast_model` is at most {output_ratio:.1f} × as far as autocast in the output ({output_name}) and "
            f"{gradient_ratio:.1f} × in the gradient ({gradient_name}); {finite} of {len(comparisons)} are finite.",
            report.table(header, rows),
            report.machine_note(described) + "\n",
        ]
    )


def main(arguments: Sequence[str]) -> None:
    """Compares the networks and writes cast_models.md."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cast_models", description=__doc__)
    parser.add_argument("--models", nargs="+", default=names(), metavar="NAME", help="all of them")
    report.add_output_to(parser)
    options = parser.parse_args(arguments)
    comparisons = [compare(name) for name in progress.bar(options.models, desc="networks")]
    text = markdown(comparisons, machine.describe("benchmarks.cast_models", arguments, torch.device("cpu")))
    report.write_page(options.output / "cast_models.md", text)


if __name__ == "__main__":
    main(sys.argv[1:])
