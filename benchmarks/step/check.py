"""The check of the numbers of a contestant's step, before its time counts.

Our contestants must give every bit of another backend. All other contestants must be close to the formula of
`torch.optim.SGD` in FP64. Both are computed on concatenated parameters, as the update is the same for each element.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import fused_tricks
from fused_tricks.backends import BACKENDS

HYPERPARAMETERS: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.5}
"""Larger than in a training, so that a contestant without one of the terms fails the check. Times do not depend on
them."""
STEPS = 2
"""The steps that are checked. The first step of SGD is the same with any momentum, coupled and decoupled decay."""
LOSS_SCALE = 65536.0
EMA_DECAY = 0.999
MOST_ELEMENTS = 2**27
"""The elements to check: of a larger set, parameters are drawn until they have about this number."""
CHUNK = 2**24
TOLERANCE = 0.01


@dataclass(frozen=True)
class Average:
    """The averages of a contestant's weights, with `EMA_DECAY`.

    Attributes:
        tensors: The averages, in the order of the module's parameters.
        copies_first: True if the first update copies the weights; False if it moves the average away from the initial
            weights.
    """

    tensors: Sequence[Tensor]
    copies_first: bool


@dataclass(frozen=True)
class Trained:
    """The tensors of a contestant.

    Attributes:
        parameters: The updated parameters, in the order of the module.
        gradients: Their gradients in each step, times the loss scale.
        steps: The number of steps that the construction took.
        optimizer: Our optimizer; None for other contestants.
        weights: The weights in the contestant's full precision; by default the parameters.
        average: The averages of the weights; None without them, and for our optimizer, whose state has them.
        scale: The divisor of the gradients.
        tolerance: The limit of the largest difference of a tensor from FP64 over its largest change.
        decoupled_weight_decay: True if the decay multiplies the weight, as in `timm.optim.SGDW`; False if it belongs to
            the gradient, as in `torch.optim.SGD`.
    """

    parameters: Sequence[Tensor]
    gradients: Sequence[Tensor]
    steps: int = 0
    optimizer: fused_tricks.FusedSGD | None = None
    weights: Sequence[Tensor] | None = None
    average: Average | None = None
    scale: float = LOSS_SCALE
    tolerance: float = TOLERANCE
    decoupled_weight_decay: bool = False


@dataclass(frozen=True)
class Check:
    """The outcome of a check.

    Attributes:
        against: The name of the reference.
        difference: For our contestants the number of elements that differ in a bit, otherwise the largest relative
            difference.
        most: The limit of `difference`.
        elements: The number of compared elements.
        of: The number of all elements.
    """

    against: str
    difference: float
    most: float
    elements: int
    of: int

    @property
    def passed(self) -> bool:
        # A NaN would pass the reverse comparison.
        return self.difference <= self.most

    @property
    def text(self) -> str:
        """Returns the outcome, for a table."""
        some = "" if self.elements == self.of else f", {self.elements:,} elements looked at"
        if self.most == 0:
            found = "every bit" if self.passed else f"{self.difference:,.0f} elements differ"
            text = f"{found}, {self.against}{some}"
        else:
            text = f"{self.difference:.0e}".replace("0e+00", "0") + f", {self.against}{some}"
        return text if self.passed else f"check failed: {text}"


def check(trained: Trained, module: nn.Module) -> Check:
    """Compares a contestant, after its construction and `STEPS` steps, with a reference that takes the same steps.

    Args:
        trained: The tensors of the contestant.
        module: A new module with the contestant's initial weights.
    """
    start = [parameter.detach() for parameter in module.parameters()]
    of = sum(parameter.numel() for parameter in start)
    places = _places(start)
    elements = sum(start[place].numel() for place in places)
    if trained.optimizer is not None:
        against = other_backend(trained.optimizer)
        found = float(sum(_differing(trained, start, chunk, against) for chunk in _chunks(places, trained)))
        return Check(f"backend {against}", found, 0, elements, of)
    worst = [_distance(trained, start, chunk) for chunk in _chunks(places, trained)]
    # max() drops a NaN that does not come first.
    found = max(worst) if all(value == value for value in worst) else float("nan")
    against = "FP64, decoupled decay" if trained.decoupled_weight_decay else "FP64"
    return Check(against, found, trained.tolerance, elements, of)


def _places(start: Sequence[Tensor]) -> list[int]:
    places = list(range(len(start)))
    if sum(parameter.numel() for parameter in start) <= MOST_ELEMENTS:
        return places
    random.Random(0).shuffle(places)
    taken: list[int] = []
    elements = 0
    for place in places:
        elements += start[place].numel()
        if taken and elements > MOST_ELEMENTS:
            break
        taken.append(place)
    return sorted(taken)


def _chunks(places: Sequence[int], trained: Trained) -> Iterator[list[int]]:
    """Groups the places of parameters of one type, which can be concatenated."""
    for dtype in sorted({trained.parameters[place].dtype for place in places}, key=str):
        chunk: list[int] = []
        elements = 0
        for place in places:
            if trained.parameters[place].dtype == dtype:
                chunk.append(place)
                elements += trained.parameters[place].numel()
                if elements >= CHUNK:
                    yield chunk
                    chunk, elements = [], 0
        if chunk:
            yield chunk


def _flat(tensors: Sequence[Tensor], places: Sequence[int]) -> Tensor:
    return torch.cat([tensors[place].detach().reshape(-1) for place in places])


def other_backend(optimizer: fused_tricks.FusedSGD) -> str:
    """Returns the backend to compare with: `cpu`, or `reference` for a step on the CPU."""
    devices = {p.device.type for group in optimizer.param_groups for p in group["params"]}
    is_usable = BACKENDS["cpu"].unavailable_because() is None
    return "reference" if devices == {"cpu"} or not is_usable else "cpu"


def _differing(trained: Trained, start: Sequence[Tensor], chunk: Sequence[int], against: str) -> int:
    """Returns the number of elements of weights, masters, momentum and averages that differ in a bit."""
    assert trained.optimizer is not None
    dtype = trained.parameters[chunk[0]].dtype
    parameter = nn.Parameter(_flat(start, chunk).to("cpu", dtype))
    parameter.grad = _flat(trained.gradients, chunk).cpu()
    optimizer = fused_tricks.FusedSGD(
        [parameter],
        **HYPERPARAMETERS,
        bias_decay=True,
        ema_decay=trained.optimizer.param_groups[0]["ema_decay"],
        loss_scale=LOSS_SCALE,
        backend=against,
    )
    optimizer.scale(torch.ones(()))
    for _ in range(trained.steps + STEPS):
        optimizer.step()
    differs = bits(parameter) != bits(_flat(trained.parameters, chunk))
    states = [trained.optimizer.state[trained.parameters[place]] for place in chunk]
    for key, value in optimizer.state[parameter].items():
        differs |= bits(value) != bits(torch.cat([state[key].detach().reshape(-1) for state in states]))
    return int(differs.sum())


def bits(tensor: Tensor) -> Tensor:
    """Returns the bit patterns of the elements as integers on the CPU."""
    return tensor.detach().cpu().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


def _distance(trained: Trained, start: Sequence[Tensor], chunk: Sequence[int]) -> float:
    """Returns the largest difference from FP64, beyond rounding, over the largest change: of weights, of averages."""
    found = _flat(trained.weights or trained.parameters, chunk)
    parameter = trained.parameters[chunk[0]]
    before = _flat(start, chunk).to(parameter).double()
    gradient = _flat(trained.gradients, chunk).double() / trained.scale
    weight, momentum = before, torch.zeros_like(before)
    averages: list[Tensor] = []
    decay, rate = HYPERPARAMETERS["weight_decay"], HYPERPARAMETERS["lr"]
    for step in range(trained.steps + STEPS):
        if trained.decoupled_weight_decay:
            weight, decayed = weight * (1 - rate * decay), gradient
        else:
            decayed = gradient + decay * weight
        momentum = HYPERPARAMETERS["momentum"] * momentum + decayed
        weight = weight - rate * momentum
        if trained.average is not None:
            copies = step == 0 and trained.average.copies_first
            last = averages[-1] if averages else before
            averages.append(weight if copies else last + (1 - EMA_DECAY) * (weight - last))
    distance = beyond_rounding(found, weight, before)
    if trained.average is not None:
        first = averages[0] if trained.average.copies_first else before
        # Its weights have been rounded as well.
        average = _flat(trained.average.tensors, chunk)
        distance = torch.maximum(distance, beyond_rounding(average, averages[-1], first, roundings=2))
    return float(distance)


def beyond_rounding(found: Tensor, expected: Tensor, before: Tensor, roundings: int = 1) -> Tensor:
    """Returns the largest difference, beyond some roundings, over the largest change. A NaN stays a NaN."""
    rounding = roundings * torch.finfo(found.dtype).eps * expected.abs()
    difference = ((found.double() - expected).abs() - rounding).clamp(min=0)
    return difference.max() / (expected - before).abs().max()
