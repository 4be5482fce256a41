"""The backends that the optimizer tests run on, and the device each of them works on."""

from __future__ import annotations

import os

import torch

from fused_tricks.backends import availability

NAMES = ("reference", "cpu", "triton", "cuda")
"""Every backend, usable here or not."""


def unusable_because(name: str) -> str | None:
    """Why tests cannot run on the backend `name` here, or None when they can."""
    return availability().get(name, f"this version has no {name} backend")


def is_interpreted(name: str) -> bool:
    """Whether each element costs microseconds, so that long runs have to be shortened."""
    return name == "triton" and os.environ.get("TRITON_INTERPRET") == "1"


def device_of(name: str) -> torch.device:
    """The device whose tensors the backend `name` updates here."""
    on_gpu = name in ("triton", "cuda") and torch.cuda.is_available() and not is_interpreted(name)
    return torch.device("cuda" if on_gpu else "cpu")
