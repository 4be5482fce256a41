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

# As csrc/dtype.h numbers them.
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# The extension does without any of them, more slowly.
_STABLE_FUNCTIONS = (
    "torch_parallel_for",
    "torch_tensor_from_pyobject",
    "aoti_torch_delete_tensor_object",
    "torch_get_mutable_data_ptr",
    "aoti_torch_get_dim",
    "aoti_torch_get_sizes",
    "aoti_torch_get_strides",
    "aoti_torch_get_dtype",
    "aoti_torch_get_layout",
    "aoti_torch_get_device_type",
    "aoti_torch_get_device_index",
    "aoti_torch_device_type_cuda",
    # Not a stable one: the extension tries it before it relies on it.
    "_ZN2at6native6is_negERKNS_6TensorE",
)


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
        torch.Tensor,
        torch.nn.Parameter,
        torch.autograd.graph.increment_version,
        _stable_functions(),
        [torch.empty(1, dtype=dtype, device="cpu") for dtype in _DTYPES],
        torch._neg_view(torch.empty(1, device="cpu")),
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


def _stable_functions() -> dict[str, int]:
    """The addresses of those functions that this torch has: of its stable C interface, and one more."""
    assert torch._C.__file__ is not None
    try:
        library = ctypes.CDLL(torch._C.__file__)
    except OSError:
        return {}
    return {
        name: ctypes.cast(getattr(library, name), ctypes.c_void_p).value or 0
        for name in _STABLE_FUNCTIONS
        if hasattr(library, name)
    }


def _why_not_built() -> str | None:
    try:
        info = json.loads((Path(__file__).parent / "_build_info.json").read_text())
    except (OSError, ValueError):
        return None
    reason = info.get("extension_failure")
    if not reason:
        return None
    # setup.py was told so: a compiler may well be there.
    advice = "reinstall fused_tricks without it" if reason.startswith("FUSED_TRICKS_EXTENSION") else _ADVICE
    return f"the extension was not built ({reason}); {advice}"
