"""The rows of the paper's ablation, and one training of a row."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.nn import functional
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torch.utils.data import DataLoader

import fused_tricks
from benchmarks.ablation.network import small_resnet
from benchmarks.lib import data
from benchmarks.train.images import batches

MOMENTUM = 0.9
WEIGHT_DECAY = 1e-4
WARMUP_SHARE = 5 / 120
"""The paper's share of warm-up epochs."""


@dataclass(frozen=True)
class Recipe:
    """One row: the tricks of its training."""

    name: str
    large_batch: bool = False
    linear_scaling: bool = False
    warmup: bool = False
    zero_gamma: bool = False
    no_bias_decay: bool = False
    low_precision: bool = False
    cosine: bool = False


def _ablation() -> tuple[Recipe, ...]:
    rows = [Recipe("small batch")]
    for name, trick in (
        ("large batch", "large_batch"),
        ("+ linear scaling", "linear_scaling"),
        ("+ warm-up", "warmup"),
        ("+ zero γ", "zero_gamma"),
        ("+ no bias decay", "no_bias_decay"),
        ("+ low precision", "low_precision"),
        ("+ cosine", "cosine"),
    ):
        rows.append(replace(rows[-1], name=name, **{trick: True}))
    return tuple(rows)


ROWS = _ablation()
"""Each row has the tricks of the row before it and one more, in the order of the paper's Table 4; cosine is added."""


@dataclass(frozen=True)
class Setting:
    """The setting of all rows.

    Attributes:
        device: The device of the training.
        dtype: The dtype of the rows with low precision. All other rows are FP32.
        small_batch: The images per update of the first row.
        large_batch: The images per update of all other rows.
        lr: The learning rate for a batch of 256 images. The rate of the small batch is proportional.
        epochs: The number of passes over the images. The number of updates is the number of images of all epochs over
            the batch size, rounded down.
        depth: The layers of the network, 6 · n + 2.
        backend: The backend of `FusedSGD`.
    """

    device: torch.device
    dtype: torch.dtype
    small_batch: int
    large_batch: int
    lr: float
    epochs: int
    depth: int
    backend: str = "auto"

    def batch_size(self, row: Recipe) -> int:
        """Returns the images per update of a row."""
        return self.large_batch if row.large_batch else self.small_batch

    def peak_lr(self, row: Recipe) -> float:
        """Returns a row's learning rate before warm-up and decay."""
        return fused_tricks.scale_lr(self.lr, self.large_batch if row.linear_scaling else self.small_batch)

    def steps(self, row: Recipe, images: int) -> int:
        """Returns the updates of a whole training on a set of `images` images."""
        return self.epochs * images // self.batch_size(row)

    def warmup_steps(self, row: Recipe, images: int) -> int:
        """Returns the updates of the warm-up; 0 for a row without warm-up."""
        return round(WARMUP_SHARE * self.steps(row, images)) if row.warmup else 0


@dataclass(frozen=True)
class Outcome:
    """The outcome of one training: the share of correct test images, and the mean cross-entropy of all."""

    accuracy: float
    loss: float


def step_decay(total_steps: int, warmup_steps: int) -> Callable[[int], float]:
    """The paper's step decay: a tenth after each quarter of the training, and the same warm-up."""

    def factor(t: int) -> float:
        return (t + 1) / warmup_steps if t < warmup_steps else 0.1 ** (4 * t // total_steps)

    return factor


def _schedule(optimizer: torch.optim.Optimizer, row: Recipe, steps: int, warmup_steps: int) -> LRScheduler:
    if row.cosine:
        return fused_tricks.WarmupCosineLR(optimizer, steps, warmup_steps)
    return LambdaLR(optimizer, step_decay(steps, warmup_steps))


def train_once(row: Recipe, setting: Setting, images: data.Images, seed: int) -> Outcome:
    """Trains a new network by the row's recipe and tests it.

    The seed determines the initial weights and the order of the images. Rows of one seed have both in common, and cut
    the order into batches of their size.
    """
    torch.manual_seed(seed)
    model = small_resnet(images.classes, setting.depth)
    model = model.to(setting.device).to(memory_format=torch.channels_last)
    if row.zero_gamma:
        fused_tricks.zero_gamma_(model, strict=True)
    if row.low_precision:
        fused_tricks.cast_model(model, setting.dtype)
    optimizer = fused_tricks.FusedSGD(
        model.parameters(),
        lr=setting.peak_lr(row),
        momentum=MOMENTUM,
        weight_decay=WEIGHT_DECAY,
        nesterov=True,
        bias_decay=not row.no_bias_decay,
        loss_scale="dynamic" if row.low_precision else None,
        backend=setting.backend,
    )
    count = len(images.train)  # type: ignore[arg-type]
    steps = setting.steps(row, count)
    schedule = _schedule(optimizer, row, steps, setting.warmup_steps(row, count))
    for pixels, labels in batches(images, setting.batch_size(row), steps, seed):
        pixels = pixels.to(setting.device, memory_format=torch.channels_last)
        loss = functional.cross_entropy(model(pixels), labels.to(setting.device))
        optimizer.scale(loss).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return _test(model, images, setting.device)


def _test(model: nn.Module, images: data.Images, device: torch.device) -> Outcome:
    model.eval()
    right = total = 0
    loss = 0.0
    with torch.no_grad():
        for pixels, labels in DataLoader(images.test, batch_size=250):
            scores = model(pixels.to(device, memory_format=torch.channels_last)).float().cpu()
            right += int((scores.argmax(1) == labels).sum())
            loss += float(functional.cross_entropy(scores, labels, reduction="sum"))
            total += len(labels)
    return Outcome(right / total, loss / total if math.isfinite(loss) else math.inf)
