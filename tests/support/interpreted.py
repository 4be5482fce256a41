"""Lets the Triton backend's tests run where there is no GPU: on Triton's interpreter, which runs kernels as Python."""

from __future__ import annotations

import functools
import os
import warnings
from typing import Any

import torch

if not torch.cuda.is_available():
    # Before the package is imported: Triton decides when a kernel is defined.
    os.environ.setdefault("TRITON_INTERPRET", "1")


def speed_up() -> None:
    """Has the interpreter replace Triton's language once, and not for each launch and each call of a function."""
    try:
        from triton.runtime import interpreter
    except ImportError:
        return
    replace = interpreter._patch_lang
    served: set[str] = set()

    def replace_once(fn: Any) -> Any:
        """For each module, because a module has its own names for the parts of the language."""
        if fn.__module__ not in served:
            replace(fn)
            served.add(fn.__module__)
        return _Kept

    in_numpy = interpreter._get_np_dtype
    scalar_in_numpy = functools.cache(in_numpy)
    interpreter._patch_lang = replace_once
    interpreter._get_np_dtype = lambda dtype: (in_numpy if dtype.scalar.is_ptr() else scalar_in_numpy)(
        dtype.scalar
    )


class _Kept:
    """Stands for the record of what was replaced, and leaves it so."""

    @staticmethod
    def restore() -> None:
        pass


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
