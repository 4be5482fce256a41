"""The contestants of benchmarks.train, behind one interface."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import fused_tricks
from benchmarks.lib import gpu
from benchmarks.lib.names import AVERAGE, AVERAGED_MODEL, FOR_LOOP, FOREACH, FUSED, GRAPH, OURS
from benchmarks.step.check import EMA_DECAY

TORCH_FORMS = {FOR_LOOP: "for-loop", FOREACH: "foreach", FUSED: "fused"}
NAMES = (*TORCH_FORMS, OURS)
UNSCALED = f"{FUSED}, no GradScaler"


@dataclass(frozen=True)
class Recipe:
    """The settings of all contestants.

    Attributes:
        device: The device of the training.
        dtype: The dtype of the forward and backward pass; `torch.float32` trains without casts.
        loss_scaling: True scales the loss dynamically, from 65536, by the rules of `GradScaler`.
        lr: The learning rate of the first step.
        momentum: The momentum of SGD.
        weight_decay: The weight decay of SGD, for every parameter.
        compile_mode: The mode of `torch.compile` for the model; None does not compile it. `"reduce-overhead"` replays
            CUDA graphs on a GPU.
        backend: The backend of fused_tricks.
        graph: True adds ours and *torch.amp, fused* a second time, with the whole step as one CUDA graph.
        average: True adds ours and *torch.amp, fused* a second time, with an average of the weights.
        max_grad_norm: Gradients are clipped to this norm; None does not clip.
        steps: The number of steps, for the schedule in our CUDA graph.
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
    average: bool = False
    max_grad_norm: float | None = None
    steps: int = 1000


def names(recipe: Recipe) -> tuple[str, ...]:
    """Returns the names of the contestants. BF16 has a row without loss scaling, as in PyTorch's documentation."""
    unscaled = [UNSCALED] if recipe.dtype == torch.bfloat16 and recipe.loss_scaling else []
    twice = [FUSED + AVERAGED_MODEL, OURS + AVERAGE] if recipe.average else []
    graphs = [name + GRAPH for name in (FUSED, OURS, *twice)] if recipe.graph else []
    return (*TORCH_FORMS, *unscaled, OURS, *twice, *graphs)


class Trainer(Protocol):
    """A contestant with its own model and optimizer."""

    model: nn.Module
    averages: Sequence[Tensor]
    """The averages of the weights that are no state of the optimizer, in the order of the parameters."""
    schedule: fused_tricks.WarmupCosineLR | None
    """The schedule of the learning rate, if the trainer has one of its own."""

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The optimizer that holds the learning rate."""

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        """Returns the mean loss of a batch, an FP32 scalar."""

    def backward(self, loss: Tensor) -> None:
        """Accumulates the gradients of the loss."""

    def apply(self) -> None:
        """Applies the gradients and keeps them."""

    def update(self) -> None:
        """Applies the gradients and drops them: the whole cost of the optimizer in a training step."""

    def loss_scale(self) -> float:
        """Returns the factor by which the gradients are scaled before the next update."""

    def predict(self, images: Tensor) -> Tensor:
        """Returns the scores of a batch of shape (n, 3, height, width), as (n, classes)."""


class TorchAmp:
    """Autocast, `GradScaler` and `torch.optim.SGD`, as in PyTorch's "Automatic Mixed Precision examples".

    Args:
        model: The model.
        recipe: The settings.
        form: The form of `torch.optim.SGD`.
        average: Returns, for the model, the function that updates the averages of its weights, and the averages.
    """

    schedule: fused_tricks.WarmupCosineLR | None = None

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        form: str,
        average: Callable[[nn.Module], tuple[Callable[[], object], Sequence[Tensor]]] | None = None,
    ) -> None:
        self.model = model
        self._update_average: Callable[[], object] | None = None
        self.averages: Sequence[Tensor] = ()
        if average:
            self._update_average, self.averages = average(model)
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
        if self._recipe.max_grad_norm is not None:
            self._scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self._recipe.max_grad_norm)
        self._scaler.step(self.optimizer)
        self._scaler.update()
        if self._update_average:
            self._update_average()

    def update(self) -> None:
        self.apply()
        self.optimizer.zero_grad(set_to_none=True)

    def loss_scale(self) -> float:
        return self._scaler.get_scale()

    def predict(self, images: Tensor) -> Tensor:
        with self._autocast():
            return self.model(images)


class FusedTricks:
    """`cast_model` and `FusedSGD`. Every parameter decays, as with `torch.optim.SGD`."""

    schedule: fused_tricks.WarmupCosineLR | None = None
    averages: Sequence[Tensor] = ()  # they are in the optimizer's state

    def __init__(self, model: nn.Module, recipe: Recipe, *, average: bool = False) -> None:
        self.model = fused_tricks.cast_model(model, recipe.dtype)
        self.optimizer = fused_tricks.FusedSGD(
            self.model.parameters(),
            lr=recipe.lr,
            momentum=recipe.momentum,
            weight_decay=recipe.weight_decay,
            bias_decay=True,
            ema_decay=EMA_DECAY if average else None,
            loss_scale="dynamic" if recipe.loss_scaling else None,
            max_grad_norm=recipe.max_grad_norm,
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

    The capture uses the first batch, and trains three steps more on it than other trainers. A replay reads the learning
    rate on the device: ours follows its own schedule, and torch's is a tensor that `set_lr` writes.
    """

    def __init__(self, trainer: Trainer, recipe: Recipe) -> None:
        self._trainer = trainer
        self._replay: Callable[[], object] | None = None
        self.model, self.optimizer, self.averages = trainer.model, trainer.optimizer, trainer.averages
        self.schedule: fused_tricks.WarmupCosineLR | None = None
        if isinstance(self.optimizer, fused_tricks.FusedSGD):
            # The warm-up, and the step of the check.
            total = recipe.steps + gpu.CAPTURE_WARMUP + 1
            self.schedule = fused_tricks.WarmupCosineLR(self.optimizer, total, count="applied")
            return
        for group in self.optimizer.param_groups:
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
        # torch's fused step leaves unscaled gradients behind.
        return 1.0

    def predict(self, images: Tensor) -> Tensor:
        return self._trainer.predict(images)


def averaged_model(model: nn.Module) -> tuple[Callable[[], object], Sequence[Tensor]]:
    """Returns the update of torch's average of the weights, by foreach operations, and the averages."""
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(EMA_DECAY))
    return functools.partial(average.update_parameters, model), list(average.module.parameters())


def captured_average(model: nn.Module) -> tuple[Callable[[], object], Sequence[Tensor]]:
    """Returns the same by the operation alone: `AveragedModel` reads its counter on the host, and no graph can."""
    weights: list[Tensor] = list(model.parameters())
    averages = [weight.detach().clone() for weight in weights]

    @torch.no_grad()
    def update() -> None:
        torch._foreach_lerp_(averages, weights, 1 - EMA_DECAY)

    return update, averages


def set_lr(trainer: Trainer, lr: float) -> None:
    """Sets the learning rate of all groups, unless the trainer follows a schedule; a tensor is written in place."""
    if trainer.schedule is not None:
        return
    for group in trainer.optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


def build(name: str, model: nn.Module, recipe: Recipe) -> Trainer:
    """Returns the contestant of a name (one of `names`). It trains `model`, and may change it in place."""
    trainer: Trainer
    if name.endswith(GRAPH):
        name = name.removesuffix(GRAPH)
        if name == FUSED + AVERAGED_MODEL:
            trainer = TorchAmp(model, recipe, TORCH_FORMS[FUSED], captured_average)
        else:
            trainer = build(name, model, recipe)
        return Captured(trainer, recipe)
    if name in (OURS, OURS + AVERAGE):
        trainer = FusedTricks(model, recipe, average=name != OURS)
    elif name == FUSED + AVERAGED_MODEL:
        trainer = TorchAmp(model, recipe, TORCH_FORMS[FUSED], averaged_model)
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
    """Builds a contestant and trains it for some steps on random images.

    Args:
        name: One of `names`.
        build_model: Returns the model.
        recipe: The settings of the training.
        images: The shape of a batch, (n, 3, height, width).
        steps: The number of steps.
    """
    model = build_model().to(recipe.device).to(memory_format=torch.channels_last)
    trainer = build(name, model, recipe)
    batch = torch.randn(images).to(recipe.device, memory_format=torch.channels_last)
    labels = torch.zeros(images[0], dtype=torch.int64, device=recipe.device)
    for _ in range(steps):
        trainer.backward(trainer.forward(batch, labels))
        trainer.update()
