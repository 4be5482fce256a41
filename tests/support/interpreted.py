"""Lets the Triton backend's tests run where there is no GPU: on Triton's interpreter, which runs kernels as Python."""

from __future__ import annotations

import os
import warnings
from typing import Any

import torch

if not torch.cuda.is_available():
    # Before the package is imported: Triton decides when a kernel is defined.
    os.environ.setdefault("TRITON_INTERPRET", "1")


def speed_up() -> None:
    """Keeps the interpreter from replacing Triton's language anew at each call from one of our functions to another.

    It has done so for the kernel already, and this takes most of the time.
    """
    try:
        from triton.runtime.interpreter import InterpretedFunction
    except ImportError:
        return
    patch_and_call = InterpretedFunction.__call__

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.fn.__module__.startswith("fused_tricks."):
            return self.rewrite()(*args, **kwargs)
        return patch_and_call(self, *args, **kwargs)

    InterpretedFunction.__call__ = call


def silence_numpy() -> None:
    """Hides that Triton's interpreter before 3.7 takes one-element arrays for numbers, of which NumPy warns."""
    try:
        import triton
        from triton.runtime.interpreter import GridExecutor
    except ImportError:
        return
    if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 7):
        return
    launch = GridExecutor.__call__

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Conversion of an array with ndim > 0", DeprecationWarning)
            return launch(self, *args, **kwargs)

    GridExecutor.__call__ = call


speed_up()
silence_numpy()
