"""Checks the numbers of a contestant's step before its time counts.

Ours has to give every bit of another backend; the others have to come close to `torch.optim.SGD`'s formula in FP64.
Both are computed on parameters that are laid end to end, as the update is the same for each element.
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

HYPERPARAMETERS: dict[str, Any] = {"lr": 1e-3, "momentum": 0.9, "weight_decay": 1e-4}
LOSS_SCALE = 65536.0
MOST_ELEMENTS = 2**27
"""Of larger sets, parameters are drawn until they have about so many."""
CHUNK = 2**24
TOLERANCE = 0.01


@dataclass(frozen=True)
class Trained:
    """What a contestant computes on.

    Attributes:
        parameters: that it updates, in the order of the module.
        gradients: that they have in each step, times the loss scale.
        steps: how many it has taken before its first timed call.
        optimizer: ours; None for the others.
        weights: of the parameters as precisely as the contestant keeps them; the parameters themselves unless given.
        scale: by which it divides the gradients.
        tolerance: how far it may be from FP64: the largest difference of a tensor over its largest change.
    """

    parameters: Sequence[Tensor]
    gradients: Sequence[Tensor]
    steps: int = 0
    optimizer: fused_tricks.FusedSGD | None = None
    weights: Sequence[Tensor] | None = None
    scale: float = LOSS_SCALE
    tolerance: float = TOLERANCE


@dataclass(frozen=True)
class Check:
    """What a check found.

    Attributes:
        against: what the numbers were compared with.
        difference: how many elements differ in a bit, for ours; the largest relative difference, for the others.
        most: that may be.
        elements: that were compared.
        of: all elements.
    """

    against: str
    difference: float
    most: float
    elements: int
    of: int

    @property
    def passed(self) -> bool:
        # Not the reverse comparison, which a NaN would pass.
        return self.difference <= self.most

    @property
    def text(self) -> str:
        """What was found, for a table."""
        some = "" if self.elements == self.of else f", {self.elements:,} elements looked at"
        if self.most == 0:
            found = "every bit" if self.passed else f"{self.difference:,.0f} elements differ"
            text = f"{found}, {self.against}{some}"
        else:
            text = f"{self.difference:.0e}".replace("0e+00", "0") + f", {self.against}{some}"
        return text if self.passed else f"check failed: {text}"


def check(trained: Trained, module: nn.Module) -> Check:
    """Compares a contestant that has taken one step after its construction with the same steps from the start.

    Args:
        trained: what it has computed.
        module: new, with the weights that it began from.
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
    return Check("FP64", found, trained.tolerance, elements, of)


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
    """Groups places of parameters of one type, which can be laid end to end."""
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
    """Returns the backend to compare with: the CPU's, or the reference for a step on the CPU."""
    devices = {p.device.type for group in optimizer.param_groups for p in group["params"]}
    is_usable = BACKENDS["cpu"].unavailable_because() is None
    return "reference" if devices == {"cpu"} or not is_usable else "cpu"


def _differing(trained: Trained, start: Sequence[Tensor], chunk: Sequence[int], against: str) -> int:
    """Returns how many elements of weights, masters and momentum differ in a bit."""
    assert trained.optimizer is not None
    dtype = trained.parameters[chunk[0]].dtype
    parameter = nn.Parameter(_flat(start, chunk).to("cpu", dtype))
    parameter.grad = _flat(trained.gradients, chunk).cpu()
    optimizer = fused_tricks.FusedSGD(
        [parameter], **HYPERPARAMETERS, bias_decay=True, loss_scale=LOSS_SCALE, backend=against
    )
    optimizer.scale(torch.ones(()))
    for _ in range(trained.steps + 1):
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
    """Returns the largest difference from FP64, rounding left out, over the largest change of a weight."""
    found = _flat(trained.weights or trained.parameters, chunk)
    parameter = trained.parameters[chunk[0]]
    before = _flat(start, chunk).to(parameter).double()
    gradient = _flat(trained.gradients, chunk).double() / trained.scale
    weight, momentum = before, torch.zeros_like(before)
    for _ in range(trained.steps + 1):
        momentum = (
            HYPERPARAMETERS["momentum"] * momentum + gradient + HYPERPARAMETERS["weight_decay"] * weight
        )
        weight = weight - HYPERPARAMETERS["lr"] * momentum
    rounding = torch.finfo(found.dtype).eps * weight.abs()
    # NaN stays NaN, and fails.
    difference = ((found.double() - weight).abs() - rounding).clamp(min=0)
    return float(difference.max() / (weight - before).abs().max())
