"""The images of a training: shuffled batches, and the accuracy on the test images."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks.lib import data
from benchmarks.train.contestants import Trainer


def batches(images: data.Images, batch_size: int, steps: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields `steps` shuffled batches, repeating the training set if necessary."""
    generator = torch.Generator().manual_seed(seed)
    loader = DataLoader(images.train, batch_size, shuffle=True, drop_last=True, generator=generator)
    while steps > 0:
        for batch in loader:
            yield batch
            steps -= 1
            if steps == 0:
                return


def accuracy(trainer: Trainer, images: data.Images, device: torch.device) -> float:
    """Returns the share of test images that the model classifies correctly."""
    trainer.model.eval()
    right = total = 0
    with torch.no_grad():
        for pixels, labels in DataLoader(images.test, batch_size=250):
            pixels = pixels.to(device, memory_format=torch.channels_last)
            right += int((trainer.predict(pixels).argmax(1).cpu() == labels).sum())
            total += len(labels)
    return right / total
