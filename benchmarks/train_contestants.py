"""The ways to train in half precision that benchmarks/train.py compares, behind one interface."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

import fused_tricks
from benchmarks.names import FOR_LOOP, FOREACH, FUSED, OURS

TORCH_FORMS = {FOR_LOOP: "for-loop", FOREACH: "foreach", FUSED: "fused"}
NAMES = (*TORCH_FORMS, OURS)
UNSCALED = f"{FUSED}, no GradScaler"


@dataclass(frozen=True)
class Recipe:
    """What all contestants have in common.

    Attributes:
        device: where to train.
        dtype: of the forward and backward pass; ``torch.float32`` trains without casting anything.
        loss_scaling: whether the loss is scaled dynamically, from 65536, by `GradScaler`'s rules.
        lr: the learning rate of the first step.
        momentum: of SGD.
        weight_decay: of SGD; applies to every parameter.
        compile_mode: of ``torch.compile`` for the model; None: it is not compiled. ``"reduce-overhead"`` replays CUDA
            graphs on a GPU.
        backend: of fused_tricks.
    """

    device: torch.device
    dtype: torch.dtype
    loss_scaling: bool
    lr: float
    momentum: float = 0.9
    weight_decay: float = 1e-4
    compile_mode: str | None = None
    backend: str = "auto"


def names(recipe: Recipe) -> tuple[str, ...]:
    """Who takes part. BF16 has FP32's range, and PyTorch's examples scale no loss in it: that is a row of its own."""
    if recipe.dtype == torch.bfloat16 and recipe.loss_scaling:
        return (*TORCH_FORMS, UNSCALED, OURS)
    return NAMES


class Trainer(Protocol):
    """One contestant with its own model and optimizer."""

    model: nn.Module

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """What holds the learning rate."""

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        """The mean loss of a batch, an FP32 scalar."""

    def backward(self, loss: Tensor) -> None:
        """Adds the gradients of the loss."""

    def update(self) -> None:
        """Applies the gradients and drops them: all that the optimizer costs in a training step."""

    def predict(self, images: Tensor) -> Tensor:
        """The scores of a batch of shape (n, 3, height, width), as (n, classes)."""


class TorchAmp:
    """Autocast, `GradScaler` and `torch.optim.SGD`, as PyTorch's "Automatic Mixed Precision examples" has them."""

    def __init__(self, model: nn.Module, recipe: Recipe, form: str) -> None:
        self.model = model
        self.optimizer = torch.optim.SGD(
            model.parameters(),
            lr=recipe.lr,
            momentum=recipe.momentum,
            weight_decay=recipe.weight_decay,
            foreach=form == "foreach",
            fused=form == "fused",
        )
        self._scaler = torch.amp.GradScaler(recipe.device.type, enabled=recipe.loss_scaling)
        self._recipe = recipe

    def _autocast(self) -> torch.autocast:
        dtype = self._recipe.dtype
        return torch.autocast(self._recipe.device.type, dtype=dtype, enabled=dtype != torch.float32)

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        with self._autocast():
            return functional.cross_entropy(self.model(images), labels)

    def backward(self, loss: Tensor) -> None:
        self._scaler.scale(loss).backward()

    def update(self) -> None:
        self._scaler.step(self.optimizer)
        self._scaler.update()
        self.optimizer.zero_grad(set_to_none=True)

    def predict(self, images: Tensor) -> Tensor:
        with self._autocast():
            return self.model(images)


class FusedTricks:
    """`cast_model` and `FusedSGD`; every parameter is decayed, as `torch.optim.SGD` does."""

    def __init__(self, model: nn.Module, recipe: Recipe) -> None:
        self.model = fused_tricks.cast_model(model, recipe.dtype)
        self.optimizer = fused_tricks.FusedSGD(
            self.model.parameters(),
            lr=recipe.lr,
            momentum=recipe.momentum,
            weight_decay=recipe.weight_decay,
            bias_decay=True,
            loss_scale="dynamic" if recipe.loss_scaling else None,
            backend=recipe.backend,
        )

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        return functional.cross_entropy(self.model(images), labels)

    def backward(self, loss: Tensor) -> None:
        self.optimizer.scale(loss).backward()

    def update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()

    def predict(self, images: Tensor) -> Tensor:
        return self.model(images)


def build(name: str, model: nn.Module, recipe: Recipe) -> Trainer:
    """The contestant of that name (one of `names`), training `model`, which it may change in place."""
    trainer: Trainer
    if name == OURS:
        trainer = FusedTricks(model, recipe)
    elif name == UNSCALED:
        trainer = TorchAmp(model, replace(recipe, loss_scaling=False), TORCH_FORMS[FUSED])
    else:
        trainer = TorchAmp(model, recipe, TORCH_FORMS[name])
    if recipe.compile_mode is not None:
        trainer.model.compile(mode=recipe.compile_mode)
    return trainer


def train_from_scratch(
    name: str,
    build_model: Callable[[], nn.Module],
    recipe: Recipe,
    images: tuple[int, ...],
    steps: int,
) -> None:
    """Makes a contestant and trains it for some steps on random images.

    Args:
        name: one of `names`.
        build_model: makes the model.
        recipe: how to train.
        images: the shape of a batch, (n, 3, height, width).
        steps: how many.
    """
    model = build_model().to(recipe.device).to(memory_format=torch.channels_last)
    trainer = build(name, model, recipe)
    batch = torch.randn(images).to(recipe.device, memory_format=torch.channels_last)
    labels = torch.zeros(images[0], dtype=torch.int64, device=recipe.device)
    for _ in range(steps):
        trainer.backward(trainer.forward(batch, labels))
        trainer.update()
