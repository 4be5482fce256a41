"""The ways to train in half precision that benchmarks.train compares, behind one interface."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

import fused_tricks
from benchmarks.lib import gpu
from benchmarks.lib.names import FOR_LOOP, FOREACH, FUSED, GRAPH, OURS

TORCH_FORMS = {FOR_LOOP: "for-loop", FOREACH: "foreach", FUSED: "fused"}
NAMES = (*TORCH_FORMS, OURS)
UNSCALED = f"{FUSED}, no GradScaler"


@dataclass(frozen=True)
class Recipe:
    """What all contestants have in common.

    Attributes:
        device: where to train.
        dtype: of the forward and backward pass; `torch.float32` trains without casting anything.
        loss_scaling: whether the loss is scaled dynamically, from 65536, by `GradScaler`'s rules.
        lr: the learning rate of the first step.
        momentum: of SGD.
        weight_decay: of SGD; applies to every parameter.
        compile_mode: of `torch.compile` for the model; None: it is not compiled. `"reduce-overhead"` replays CUDA
            graphs on a GPU.
        backend: of fused_tricks.
        graph: whether ours and *torch.amp, fused* take part a second time, with their whole step as one CUDA graph.
    """

    device: torch.device
    dtype: torch.dtype
    loss_scaling: bool
    lr: float
    momentum: float = 0.9
    weight_decay: float = 1e-4
    compile_mode: str | None = None
    backend: str = "auto"
    graph: bool = False


def names(recipe: Recipe) -> tuple[str, ...]:
    """Who takes part. BF16 has FP32's range, and PyTorch's examples scale no loss in it: that is a row of its own."""
    unscaled = [UNSCALED] if recipe.dtype == torch.bfloat16 and recipe.loss_scaling else []
    graphs = [FUSED + GRAPH, OURS + GRAPH] if recipe.graph else []
    return (*TORCH_FORMS, *unscaled, OURS, *graphs)


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

    def apply(self) -> None:
        """Applies the gradients and keeps them."""

    def update(self) -> None:
        """Applies the gradients and drops them: all that the optimizer costs in a training step."""

    def loss_scale(self) -> float:
        """Returns by how much the gradients are larger than the loss's before the next update applies them."""

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

    def apply(self) -> None:
        self._scaler.step(self.optimizer)
        self._scaler.update()

    def update(self) -> None:
        self.apply()
        self.optimizer.zero_grad(set_to_none=True)

    def loss_scale(self) -> float:
        return self._scaler.get_scale()

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

    def apply(self) -> None:
        self.optimizer.step()

    def update(self) -> None:
        self.apply()
        self.optimizer.zero_grad()

    def loss_scale(self) -> float:
        return self.optimizer.stats().scale or 1.0

    def predict(self, images: Tensor) -> Tensor:
        return self.model(images)


class Captured:
    """The whole training step of another trainer as one CUDA graph, which `forward` replays.

    It is captured with the first batch, on which it trains three steps more than the others.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._replay: Callable[[], object] | None = None
        self.model, self.optimizer = trainer.model, trainer.optimizer
        for group in self.optimizer.param_groups:
            # On the device, where a replayed step reads it.
            group["lr"] = torch.tensor(group["lr"], device=group["params"][0].device)

    def _step(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        loss = self._trainer.forward(self._images, self._labels)
        self._trainer.backward(loss)
        self._trainer.apply()
        self._loss = loss.detach()

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        if self._replay is None:
            self._images, self._labels = images.clone(), labels.clone()
            self._replay = gpu.capture(self._step)
        self._images.copy_(images)
        self._labels.copy_(labels)
        self._replay()
        return self._loss

    def backward(self, loss: Tensor) -> None:
        pass

    def apply(self) -> None:
        pass

    def update(self) -> None:
        pass

    def loss_scale(self) -> float:
        # Those that torch's fused step leaves behind are unscaled.
        return 1.0

    def predict(self, images: Tensor) -> Tensor:
        return self._trainer.predict(images)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Sets the learning rate of all groups, where it is a tensor in place."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


def build(name: str, model: nn.Module, recipe: Recipe) -> Trainer:
    """The contestant of that name (one of `names`), training `model`, which it may change in place."""
    trainer: Trainer
    if name.endswith(GRAPH):
        return Captured(build(name.removesuffix(GRAPH), model, recipe))
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
