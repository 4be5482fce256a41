"""The compiled extension, where there is one."""

from __future__ import annotations

import ctypes
import functools
import importlib
import json
import platform
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import ModuleType

import torch

from ._torch import library_path, negative_view

_REINSTALL = "reinstall fused_tricks"

# As csrc/core/dtype.h numbers them.
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
    "aoti_torch_get_storage_size",
    "aoti_torch_get_storage_offset",
    # Not a stable one: the extension tries it before it relies on it.
    "_ZN2at6native6is_negERKNS_6TensorE",
)


@functools.cache
def _load() -> tuple[ModuleType | None, str | None]:
    try:
        module = importlib.import_module("fused_tricks._extension")
    except ImportError as error:
        return None, _why_missing() or f"the compiled extension cannot be imported ({error}); {_REINSTALL}"
    # The finder of an editable installation has one for a source tree elsewhere, too.
    if Path(str(module.__file__)).parent != Path(__file__).parent:
        return None, _why_missing()
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
        negative_view(torch.empty(1, device="cpu")),
    )


def load_extension() -> ModuleType:
    """The extension, connected to torch.

    Raises:
        RuntimeError: There is none; `missing_because` says why.
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
    try:
        library = ctypes.CDLL(library_path())
    except OSError:
        return {}
    return {
        name: ctypes.cast(getattr(library, name), ctypes.c_void_p).value or 0
        for name in _STABLE_FUNCTIONS
        if hasattr(library, name)
    }


def _why_missing() -> str | None:
    """Why there is no extension for this Python, and what to do; None where there is one."""
    package = Path(__file__).parent
    if any((package / f"_extension{suffix}").exists() for suffix in EXTENSION_SUFFIXES):
        return None
    # Only a source tree has its C++ beside the package.
    is_source = (package.parent / "csrc").is_dir()
    installed = _other_installation(package) if is_source else None
    if installed is not None:
        return (
            f"Python runs the source tree {package.parent}, in which nothing is built, and not what is installed in "
            f"{installed}: run Python from another folder, or pip install -e {package.parent}"
        )
    reason = _failure(package)
    if reason is not None:
        return f"the extension was not built ({reason}); {_advice(reason)}"
    others = sorted(path.name for path in package.glob("_extension.*") if path.suffix in (".so", ".pyd"))
    if others:
        return (
            f"the extension was built for another Python ({', '.join(others)}), and this is Python "
            f"{platform.python_version()}; {_REINSTALL} with it"
        )
    if is_source:
        return (
            f"Python runs the source tree {package.parent}, in which nothing is built: pip install -e "
            f"{package.parent}, or pip install it and run Python from another folder"
        )
    return f"{package} has no extension; {_REINSTALL}"


def _other_installation(package: Path) -> Path | None:
    """The folder of another copy of the package on Python's path, which this one hides."""
    for entry in sys.path:
        folder = Path(entry).resolve()
        if folder != package.parent and (folder / package.name / "__init__.py").is_file():
            return folder
    return None


def _failure(package: Path) -> str | None:
    """Why the build left the extension out, as its record says."""
    try:
        info = json.loads((package / "_build_info.json").read_text())
    except (OSError, ValueError):
        return None
    reason: str | None = info.get("extension_failure")
    return reason


def _advice(reason: str) -> str:
    if reason.startswith("FUSED_TRICKS_EXTENSION"):
        # setup.py was told so: a compiler may well be there.
        return f"{_REINSTALL} without it"
    if reason.startswith("no C++ compiler"):
        return f"install a C++ compiler and {_REINSTALL}"
    return f"mend that and {_REINSTALL}"
