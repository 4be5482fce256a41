"""The backends that the optimizer tests run on, and the device each of them works on."""

from __future__ import annotations

from importlib.metadata import version

import torch

from fused_tricks.backends import BACKENDS
from fused_tricks.backends.triton import IS_INTERPRETED
from support import emulation  # noqa: F401  # adds a backend

NAMES = tuple(BACKENDS)
"""Every backend, usable here or not."""


def unusable_because(name: str) -> str | None:
    """Why tests cannot run on the backend `name` here, or None when they can."""
    return BACKENDS[name].unavailable_because() or (_cannot_interpret() if is_slow(name) else None)


def _cannot_interpret() -> str | None:
    """Triton's interpreter took one-element arrays for numbers before 3.7, which NumPy has refused since 2.4."""
    triton, numpy = (tuple(map(int, version(name).split(".")[:2])) for name in ("triton", "numpy"))
    if triton < (3, 7) and numpy >= (2, 4):
        return "the interpreter of this Triton needs NumPy before 2.4; pip install 'numpy<2.4'"
    return None


def is_interpreted(name: str) -> bool:
    """Whether each element costs microseconds, so that long runs have to be shortened."""
    return name == "emulated_cuda" or is_slow(name)


def is_slow(name: str) -> bool:
    """Whether each operation of a kernel costs tens of microseconds, so that steps and tensors have to be few."""
    return name == "triton" and IS_INTERPRETED


def device_of(name: str) -> torch.device:
    """The device whose tensors the backend `name` updates here."""
    return torch.device(BACKENDS[name].device_type or "cpu")
