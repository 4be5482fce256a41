"""The extension and the emulated CUDA kernels under sanitizers of memory, undefined behaviour and threads."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

# The sanitizer of this process, set by `tests/support/sanitizers/__main__.py`: "address", "thread" or None.
PRESENT = os.environ.get("FUSED_TRICKS_SANITIZE")
THREADS = "FUSED_TRICKS_SANITIZE_THREADS"


def install() -> None:
    """Runs the extension's loops on threads that ThreadSanitizer supports, if ThreadSanitizer is active."""
    if PRESENT != "thread":
        return
    from fused_tricks import extension

    library = ctypes.CDLL(str(Path(os.environ[THREADS])))
    address = ctypes.cast(library.parallel_for, ctypes.c_void_p).value or 0
    stable_functions = extension._stable_functions
    extension._stable_functions = lambda: stable_functions() | {"torch_parallel_for": address}
