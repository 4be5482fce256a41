"""The compiled extension: import, connection to torch, and the reason for a missing extension."""

from __future__ import annotations

import ctypes
import functools
import importlib
import json
import platform
import shlex
import sys
from importlib import metadata
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import ModuleType
from urllib.parse import urlsplit
from urllib.request import url2pathname

import torch

from ._torch import library_path, negative_view

# pip caches a wheel without the extension, and would install it again.
_PIP = "pip install --force-reinstall --no-deps --no-cache-dir"

# In the order of the enum in csrc/core/dtype.h.
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# The extension works without these functions, only slower.
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
    # This function is not stable, so the extension tests its result before using it.
    "_ZN2at6native6is_negERKNS_6TensorE",
)


@functools.cache
def _load() -> tuple[ModuleType | None, str | None]:
    try:
        module = importlib.import_module("fused_tricks._extension")
    except ImportError as error:
        return None, _why_missing() or f"the compiled extension cannot be imported ({error}); {reinstall()}"
    # The finder of an editable installation may find the extension of another source tree.
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
    """Connects an extension module to torch: types, functions and sample tensors.

    Raises:
        RuntimeError: The interfaces of torch differ from those that the module requires.
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
    """Returns the extension, connected to torch.

    Raises:
        RuntimeError: The extension is missing. The message is the reason of `missing_because`.
    """
    module, reason = _load()
    if module is None:
        raise RuntimeError(reason)
    return module


def missing_because() -> str | None:
    """Returns the reason why the extension is unusable; None if it is usable."""
    return _load()[1]


def _stable_functions() -> dict[str, int]:
    """Returns the addresses of the functions in `_STABLE_FUNCTIONS` that this torch has."""
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
    """Returns the reason why no extension exists for this Python, and a remedy; None if one exists."""
    package = Path(__file__).parent
    if any((package / f"_extension{suffix}").exists() for suffix in EXTENSION_SUFFIXES):
        return None
    # Only a source tree contains C++ sources beside the package.
    is_source = (package.parent / "csrc").is_dir()
    installed = _other_installation(package) if is_source else None
    editable = f"pip install -e {shlex.quote(str(package.parent))}"
    if installed is not None:
        failure = _recorded(installed / package.name, "extension_failure")
        remedy = f"run Python from another folder, or {editable}"
        if failure is not None:
            remedy = f"that package has no extension either ({failure}); {editable}"
        return (
            f"Python runs the source tree {package.parent}, in which nothing is built, instead of the package "
            f"installed in {installed}; {remedy}"
        )
    reason = _recorded(package, "extension_failure")
    if reason is not None:
        return f"the extension was not built ({reason}); {_advice(reason)}"
    others = sorted(path.name for path in package.glob("_extension.*") if path.suffix in (".so", ".pyd"))
    if others:
        return (
            f"the extension was built for another Python ({', '.join(others)}), and this is Python "
            f"{platform.python_version()}; with this Python {reinstall()}"
        )
    if is_source:
        return (
            f"Python runs the source tree {package.parent}, in which nothing is built; {editable}, or pip install it "
            "and run Python from another folder"
        )
    return f"{package} has no extension; {reinstall()}"


def _other_installation(package: Path) -> Path | None:
    """Returns the folder of another copy of the package on `sys.path`, which this copy hides; None without one."""
    for entry in sys.path:
        folder = Path(entry).resolve()
        if folder != package.parent and (folder / package.name / "__init__.py").is_file():
            return folder
    return None


def cuda_failure() -> str | None:
    """Returns the recorded reason why the build left CUDA out; None without a record."""
    return _recorded(Path(__file__).parent, "cuda_failure")


def _recorded(package: Path, key: str) -> str | None:
    """Returns the reason that the record of a build has under a key; None without a record."""
    try:
        info = json.loads((package / "_build_info.json").read_text())
    except (OSError, ValueError):
        return None
    reason: str | None = info.get(key)
    return reason


def _advice(reason: str) -> str:
    if reason.startswith("FUSED_TRICKS_EXTENSION"):
        # The wheel for every platform is built so. A compiler may exist.
        return f"without this variable, {reinstall()}"
    if reason.startswith("no C++ compiler"):
        return f"install a C++ compiler, and {reinstall()}"
    return f"fix this problem, and {reinstall()}"


def reinstall() -> str:
    """Returns the advice to compile and install this package again, with the command."""
    package = Path(__file__).parent
    if (package.parent / "setup.py").is_file():
        return f"run `{_PIP} -e {shlex.quote(str(package.parent))}`"
    try:
        record = json.loads(metadata.distribution("fused_tricks").read_text("direct_url.json") or "{}")
        url = urlsplit(str(record["url"]))
    except (metadata.PackageNotFoundError, ValueError, LookupError, TypeError):
        url = urlsplit("")
    folder = Path(url2pathname(url.path))
    if url.scheme == "file" and (folder / "setup.py").is_file():
        return f"run `{_PIP} {shlex.quote(str(folder))}`"
    return f"run `{_PIP} PATH`, where PATH is a checkout or the archive of the sources"
