"""Settings of Triton's interpreter, which runs kernels as Python, for tests of the Triton backend without a GPU."""

from __future__ import annotations

import functools
import os
import warnings
from typing import Any

import torch

if not torch.cuda.is_available():
    # Before the package is imported, because Triton reads the variable when a kernel is defined.
    os.environ.setdefault("TRITON_INTERPRET", "1")


def speed_up() -> None:
    """Makes the interpreter patch Triton's language once, instead of at each launch and each call of a function."""
    try:
        from triton.runtime import interpreter
    except ImportError:
        return
    replace = interpreter._patch_lang
    served: set[str] = set()

    def replace_once(fn: Any) -> Any:
        """Patches once per module, because a module has its own names for the parts of the language."""
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
    """A record of a patch whose `restore` keeps the patch."""

    @staticmethod
    def restore() -> None:
        pass


def silence_numpy() -> None:
    """Hides NumPy's warning that Triton's interpreter before 3.7 uses one-element arrays as numbers."""
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
