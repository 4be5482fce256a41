"""The CUDA kernels as an extension module for the CPU, and a backend that runs on it."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.util
import os
import platform
from collections.abc import Iterator
from types import ModuleType
from typing import NamedTuple
from unittest import mock

from fused_tricks.backends import BACKENDS, Backend, cuda, gpu
from fused_tricks.backends.cuda import CudaStepper
from fused_tricks.extension import connect

from .build import build


class Traffic(NamedTuple):
    """The counts of the emulated kernels: bytes by kind, sectors under `counted_sectors`, and launches."""

    element_bytes_read: int
    element_bytes_written: int
    element_sectors_read: int
    element_sectors_written: int
    table_bytes_read: int
    table_bytes_written: int
    launches: int


def unusable_because() -> str | None:
    """Returns the reason why the emulation cannot run here, or None.

    Raises:
        RuntimeError: If the emulation does not compile. This failure is not a reason to skip tests.
    """
    if platform.machine() not in ("x86_64", "AMD64"):
        return "its fibers are written for x86-64"
    try:
        load()
    except OSError as error:
        return str(error)
    return None


@functools.cache
def load() -> ModuleType:
    """Builds the emulation if a source has changed, and imports the module."""
    path = build(sanitize=os.environ.get("FUSED_TRICKS_SANITIZE") == "address")
    spec = importlib.util.spec_from_file_location("fused_tricks_emulation", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    connect(module)
    return module


def take_traffic() -> Traffic:
    """Returns the counts since the last call."""
    counted = (ctypes.c_int64 * len(Traffic._fields))()
    ctypes.CDLL(load().__file__).fused_tricks_take_traffic(counted)
    return Traffic(*counted)


@contextlib.contextmanager
def counted_sectors() -> Iterator[None]:
    """Counts the 32-byte sectors that the instructions of warps request, as a GPU's memory does."""
    count = ctypes.CDLL(load().__file__).fused_tricks_count_sectors
    count(True)
    try:
        yield
    finally:
        count(False)


@contextlib.contextmanager
def only_first_blocks(count: int) -> Iterator[None]:
    """Runs only the first blocks of every launch, for tensors that are too large for all blocks."""
    limit = ctypes.CDLL(load().__file__).fused_tricks_limit_blocks
    limit.argtypes = [ctypes.c_int64]
    limit(count)
    try:
        yield
    finally:
        limit(-1)


class Graph:
    """A graph of captured launches. A new capture replaces the graph of the capture before."""

    @contextlib.contextmanager
    def capture(self) -> Iterator[None]:
        """Records launches with their arguments instead of running them, as a CUDA graph's capture."""
        capture = ctypes.CDLL(load().__file__).fused_tricks_capture
        with (
            mock.patch.object(gpu, "is_capturing", lambda device: True),
            mock.patch.object(cuda, "is_capturing", lambda device: True),
        ):
            capture(True)
            try:
                yield
            finally:
                capture(False)

    def replay(self) -> None:
        """Runs the captured launches."""
        ctypes.CDLL(load().__file__).fused_tricks_replay()


class EmulatedCudaStepper(CudaStepper):
    """The CUDA backend on CPU tensors."""

    @staticmethod
    def extension() -> ModuleType:
        return load()


BACKENDS["emulated_cuda"] = Backend(EmulatedCudaStepper, unusable_because, "cpu", is_automatic=False)
