"""The backends that the optimizer tests run on, and the device of each backend."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from importlib.metadata import version
from unittest import mock

import pytest
import torch

from fused_tricks.backends import BACKENDS
from fused_tricks.backends.triton import IS_INTERPRETED
from support import emulation  # noqa: F401  # adds a backend

NAMES = tuple(BACKENDS)
"""Every backend, usable here or not."""

WITHOUT_EXTENSION = "triton_without_extension"
"""The Triton backend without the compiled extension: the plan guard is in Python instead of C++."""


def base(name: str) -> str:
    """Returns the backend that a test of the backend `name` passes to the optimizer."""
    return "triton" if name == WITHOUT_EXTENSION else name


@contextlib.contextmanager
def prepared(name: str) -> Iterator[str]:
    """Yields the backend that a test passes to the optimizer, and hides the extension where `name` requires it."""
    if name != WITHOUT_EXTENSION:
        yield name
        return
    with mock.patch("fused_tricks.backends.triton.stepper.missing_because", lambda: "the test asks for none"):
        yield base(name)


def unusable_because(name: str) -> str | None:
    """Returns the reason why tests cannot run on the backend `name` here, or None."""
    return BACKENDS[name].unavailable_because() or (_cannot_interpret() if is_slow(name) else None)


takes_no_step = pytest.mark.parametrize("backend", ["reference"], indirect=True)
"""A decorator for tests in which no backend takes a step."""


@functools.cache
def left_out_because(name: str) -> str | None:
    """Returns the reason why no test of the backend `name` is collected here, or None.

    Tests on the emulation skip themselves instead, because the reason requires a compilation.
    """
    return None if name == "emulated_cuda" else unusable_because(name)


def _cannot_interpret() -> str | None:
    """Returns a reason for Triton before 3.7 with NumPy 2.4, or None.

    This interpreter uses one-element arrays as numbers, which NumPy refuses.
    """
    triton, numpy = (tuple(map(int, version(name).split(".")[:2])) for name in ("triton", "numpy"))
    if triton < (3, 7) and numpy >= (2, 4):
        return "the interpreter of this Triton needs NumPy before 2.4; pip install 'numpy<2.4'"
    return None


def is_interpreted(name: str) -> bool:
    """True if each element costs microseconds, so that long runs must be shorter."""
    return name == "emulated_cuda" or is_slow(name)


def is_slow(name: str) -> bool:
    """True if each operation of a kernel costs tens of microseconds, so that steps and tensors must be few."""
    return name == "triton" and IS_INTERPRETED


def device_of(name: str) -> torch.device:
    """Returns the device whose tensors the backend `name` updates here."""
    return torch.device(BACKENDS[name].device_type or "cpu")
