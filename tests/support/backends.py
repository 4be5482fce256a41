"""The backends that the optimizer tests run on, and the device each of them works on."""

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
"""The Triton backend as where nothing was compiled: it watches its plans in Python instead of C++."""


def base(name: str) -> str:
    """The backend that is asked for in a test of the backend `name`."""
    return "triton" if name == WITHOUT_EXTENSION else name


@contextlib.contextmanager
def prepared(name: str) -> Iterator[str]:
    """Yields the backend that is asked for in a test of the backend `name`."""
    if name != WITHOUT_EXTENSION:
        yield name
        return
    with mock.patch("fused_tricks.backends.triton.stepper.missing_because", lambda: "the test asks for none"):
        yield base(name)


def unusable_because(name: str) -> str | None:
    """Why tests cannot run on the backend `name` here, or None when they can."""
    return BACKENDS[name].unavailable_because() or (_cannot_interpret() if is_slow(name) else None)


takes_no_step = pytest.mark.parametrize("backend", ["reference"], indirect=True)
"""For tests in which the backend has nothing to do."""


@functools.cache
def left_out_because(name: str) -> str | None:
    """Why no test of the backend `name` is collected here, or None.

    Tests on the emulation skip themselves instead: its reason is known only once it is compiled.
    """
    return None if name == "emulated_cuda" else unusable_because(name)


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
