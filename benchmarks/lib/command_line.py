"""Types of command line options, which refuse a value with a one-line message before any work is done."""

from __future__ import annotations

import argparse
import math

import torch
from torchvision import models

from benchmarks.lib import parameter_sets


def positive(text: str) -> int:
    """Returns an integer of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return value


def several(text: str) -> int:
    """Returns a number of seeds, at least 2, so that a spread exists."""
    value = int(text)
    if value < 2:
        raise argparse.ArgumentTypeError(f"must be at least 2, got {text}")
    return value


def positive_number(text: str) -> float:
    """Returns a finite number above 0."""
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a finite number above 0, got {text}")
    return value


def device(text: str) -> torch.device:
    """Returns a device that is usable here and can be timed."""
    try:
        found = torch.device(text)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} cannot be used: {first_line(error)}") from error
    if found.type not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"{text!r} cannot be timed; choose cpu or cuda")
    return found


def add_device_to(parser: argparse.ArgumentParser) -> None:
    """Adds `--device`."""
    parser.add_argument("--device", type=device, default="cuda" if torch.cuda.is_available() else "cpu")


def parameter_set(text: str) -> str:
    """Returns the name of a set of parameters."""
    try:
        parameter_sets.check(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


def network(text: str) -> str:
    """Returns the name of a classification network of torchvision."""
    if text not in models.list_models(models):
        raise argparse.ArgumentTypeError(
            f"torchvision.models has no classification network {text!r}; resnet18 is one"
        )
    return text


def first_line(error: Exception) -> str:
    """Returns the first line of an error message."""
    return str(error).partition("\n")[0]
