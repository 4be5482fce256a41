"""The check of a training's last update: ours bit for bit with another backend, all others with FP64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

import fused_tricks
from benchmarks.step.check import EMA_DECAY, TOLERANCE, Check, beyond_rounding, bits, other_backend
from benchmarks.train.contestants import Recipe, Trainer


def check(trainer: Trainer, recipe: Recipe, images: Tensor, labels: Tensor) -> Check:
    """Trains one more step and compares the optimizer's update.

    Args:
        trainer: The trainer of a contestant.
        recipe: The recipe of the training.
        images: The images of a batch, as in training.
        labels: Their labels.
    """
    optimizer = trainer.optimizer
    parameters = list(trainer.model.parameters())
    before = [_on_cpu(parameter) for parameter in parameters]
    averages = [_on_cpu(average) for average in trainer.averages]
    scale = trainer.loss_scale()
    if trainer.schedule is not None:
        trainer.schedule.step()  # writes the rate, which replays do not
    if isinstance(optimizer, fused_tricks.FusedSGD):
        saved = tree_map(
            lambda value: _on_cpu(value) if isinstance(value, Tensor) else value, optimizer.state_dict()
        )
    else:
        # Before the first update there is no buffer yet.
        states = [optimizer.state.get(parameter, {}) for parameter in parameters]
        momenta = [
            _on_cpu(state.get("momentum_buffer", torch.zeros_like(parameter)))
            for state, parameter in zip(states, parameters, strict=True)
        ]
    trainer.backward(trainer.forward(images, labels))
    gradients = [_on_cpu(parameter.grad) for parameter in parameters if parameter.grad is not None]
    trainer.apply()
    elements = sum(parameter.numel() for parameter in parameters)
    if isinstance(optimizer, fused_tricks.FusedSGD):
        against = other_backend(optimizer)
        differing = _differing(optimizer, parameters, saved, before, gradients, against)
        return Check(f"backend {against}", differing, 0, elements, elements)
    lr = float(optimizer.param_groups[0]["lr"])
    weights = [_on_cpu(parameter) for parameter in parameters]
    found = _distance(weights, before, momenta, gradients, scale, lr, recipe)
    if averages:
        average, old, weight = (_flat(tensors) for tensors in (trainer.averages, averages, weights))
        expected = old.double() + (1 - EMA_DECAY) * (weight.double() - old.double())
        # A NaN stays a NaN.
        found = float(torch.tensor(found).maximum(beyond_rounding(average, expected, old.double())))
    return Check("FP64", found, TOLERANCE, elements, elements)


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([_on_cpu(tensor).reshape(-1) for tensor in tensors])


def _on_cpu(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)


def _differing(
    optimizer: fused_tricks.FusedSGD,
    parameters: Sequence[Tensor],
    saved: dict[str, Any],
    before: Sequence[Tensor],
    gradients: Sequence[Tensor],
    against: str,
) -> int:
    """Returns the number of elements of weights and states that differ from another backend in a bit."""
    twins = [nn.Parameter(weight) for weight in before]
    scaled = "dynamic" if optimizer.loss_scale is not None else None
    twin = fused_tricks.FusedSGD(
        twins, lr=1.0, loss_scale=scaled, max_grad_norm=optimizer.max_grad_norm, backend=against
    )
    for group in saved["param_groups"]:
        group["lr"] = float(group["lr"])
    twin.load_state_dict(saved)
    for parameter, gradient in zip(twins, gradients, strict=True):
        parameter.grad = gradient
    twin.scale(torch.ones(()))
    twin.step()
    differing = 0
    for one, other in zip(parameters, twins, strict=True):
        differs = bits(one) != bits(other)
        for key, value in twin.state[other].items():
            differs |= bits(optimizer.state[one][key]) != bits(value)
        differing += int(differs.sum())
    return differing


def _distance(
    found: Sequence[Tensor],
    before: Sequence[Tensor],
    momenta: Sequence[Tensor],
    gradients: Sequence[Tensor],
    scale: float,
    lr: float,
    recipe: Recipe,
) -> float:
    """Returns the largest difference from FP64, beyond rounding, over the largest change of a weight."""
    overflowed = not all(bool(gradient.isfinite().all()) for gradient in gradients)
    if recipe.max_grad_norm is not None and not overflowed:
        norm = math.sqrt(sum(float((gradient.double() / scale).square().sum()) for gradient in gradients))
        scale /= min(1.0, recipe.max_grad_norm / (norm + 1e-6))
    difference = change = 0.0
    for weight, old, momentum, gradient in zip(found, before, momenta, gradients, strict=True):
        expected = old.double()
        if not overflowed:
            velocity = recipe.momentum * momentum.double() + gradient.double() / scale
            expected = expected - lr * (velocity + recipe.weight_decay * expected)
        rounding = torch.finfo(weight.dtype).eps * expected.abs()
        apart = float(((weight.double() - expected).abs() - rounding).clamp(min=0).max())
        # max() drops a NaN that does not come first.
        difference = math.nan if apart != apart else max(difference, apart)
        if difference != difference:
            return difference
        change = max(change, float((expected - old.double()).abs().max()))
    return difference / change if change else difference
