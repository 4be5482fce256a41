"""Types of command line options, which refuse a value with one line before any work is done."""

from __future__ import annotations

import argparse
import math


def positive(text: str) -> int:
    """An integer that is at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return value


def several(text: str) -> int:
    """A number of seeds from which a spread can be had."""
    value = int(text)
    if value < 2:
        raise argparse.ArgumentTypeError(f"must be at least 2, got {text}")
    return value


def positive_number(text: str) -> float:
    """A finite number above 0."""
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a finite number above 0, got {text}")
    return value
