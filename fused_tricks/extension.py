"""The compiled extension, where there is one."""

from __future__ import annotations

import ctypes
import functools
import importlib
import json
from pathlib import Path
from types import ModuleType

import torch

_ADVICE = "install a C++ compiler and reinstall fused_tricks"


@functools.cache
def _load() -> tuple[ModuleType | None, str | None]:
    try:
        module = importlib.import_module("fused_tricks._extension")
    except ImportError as error:
        return None, _why_not_built() or f"the compiled extension cannot be imported ({error}); {_ADVICE}"
    if not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"):
        return (
            None,
            f"torch {torch.__version__} has no DLPack exchange interface; install torch 2.10 or later",
        )
    try:
        connect(module)
    except RuntimeError as error:
        return None, str(error)
    return module, None


def connect(module: ModuleType) -> None:
    """Gives an extension module what it needs of torch.

    Raises:
        RuntimeError: torch's interfaces are not those that the module was written for.
    """
    module.connect(
        torch.Tensor, torch.nn.Parameter, torch.autograd.graph.increment_version, _parallel_for_address()
    )


def load_extension() -> ModuleType:
    """The extension, connected to torch.

    Raises:
        RuntimeError: There is none; :func:`missing_because` says why.
    """
    module, reason = _load()
    if module is None:
        raise RuntimeError(reason)
    return module


def missing_because() -> str | None:
    """Why the extension cannot be used; None when it can."""
    return _load()[1]


def _parallel_for_address() -> int:
    """The address of torch's ``torch_parallel_for``; 0, for one thread, where it cannot be found."""
    assert torch._C.__file__ is not None
    try:
        function = ctypes.CDLL(torch._C.__file__).torch_parallel_for
    except (OSError, AttributeError):
        return 0
    return ctypes.cast(function, ctypes.c_void_p).value or 0


def _why_not_built() -> str | None:
    try:
        info = json.loads((Path(__file__).parent / "_build_info.json").read_text())
    except (OSError, ValueError):
        return None
    reason = info.get("extension_failure")
    return f"the extension was not built ({reason}); {_ADVICE}" if reason else None
