"""`python -m fused_tricks`: a report of what is built and usable here, with reasons for what is not."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import fused_tricks
from fused_tricks.backends import availability
from fused_tricks.cuda_toolkit import find_toolkit
from fused_tricks.extension import load_extension, missing_because

Row = tuple[str, str]


def main() -> None:
    """Prints the report."""
    info = _build_info()
    sections = {
        "Versions": _versions(),
        "Backends": _backends(),
        "Processors": _processors(),
        "The extension": _extension(info),
        "CUDA toolkit here": _toolkit(),
    }
    for title, rows in sections.items():
        print(title)
        for name, value in rows:
            first, *others = value.splitlines() or [""]
            print(f"  {name:<16}  {first}")
            for line in others:
                print(f"  {'':<16}  {line}")
        print()


def _versions() -> Iterator[Row]:
    yield "fused_tricks", f"{fused_tricks.__version__} in {Path(fused_tricks.__file__).parent}"
    yield "Python", f"{platform.python_version()} on {platform.platform()}"
    yield "torch", f"{torch.__version__}, {_cuda_of_torch()}"
    try:
        yield "triton", importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        yield "triton", "not installed"


def _cuda_of_torch() -> str:
    if torch.version.cuda is not None:
        return f"built with CUDA {torch.version.cuda}"
    return f"built with ROCm {torch.version.hip}" if torch.version.hip is not None else "built without CUDA"


def _backends() -> Iterator[Row]:
    for name, reason in availability().items():
        yield name, "usable" if reason is None else f"not usable: {reason}"


def _processors() -> Iterator[Row]:
    try:
        yield "instruction sets", ", ".join(load_extension().instruction_sets())
    except RuntimeError:
        yield "instruction sets", "unknown without the extension"
    yield "CPU threads", f"{torch.get_num_threads()} in torch"
    if not torch.cuda.is_available():
        yield "GPUs", "torch sees none"
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        try:
            device = torch.cuda.get_device_properties(index)
        except RuntimeError as error:
            yield f"GPU {index}", f"torch cannot use it ({str(error).splitlines()[0]})"
            continue
        memory = f"{device.total_memory / 2**30:.0f} GiB"
        yield f"GPU {index}", f"{device.name}, architecture {device.major}.{device.minor}, {memory}"


def _build_info() -> dict[str, Any] | None:
    """Returns the record of the build; None in a source tree that was never built."""
    try:
        info: dict[str, Any] = json.loads(Path(__file__).with_name("_build_info.json").read_text())
    except (OSError, ValueError):
        return None
    return info


def _extension(info: dict[str, Any] | None) -> Iterator[Row]:
    if info is None:
        yield "build", missing_because() or "unknown, without a record of the build; pip install writes one"
        return
    yield "built", f"version {info['version']} by Python {info['python']} for {info['platform']}"
    if info["extension_failure"] is not None:
        yield "not compiled", info["extension_failure"]
    for key in ("compiler", "compiler_version", "compiler_flags", "extension_log"):
        if info.get(key):
            yield key.replace("_", " "), info[key].strip()
    cuda = info["cuda"]
    if cuda is not None:
        yield "CUDA", f"{cuda['version']} from {cuda['home']}"
        yield "architectures", ", ".join(cuda["architectures"])
    elif info["cuda_failure"] is not None:
        yield "CUDA", f"left out: {info['cuda_failure']}"
        if info.get("cuda_log"):
            yield "CUDA log", info["cuda_log"].strip()


def _toolkit() -> Iterator[Row]:
    search = find_toolkit()
    if search.toolkit is None:
        yield "found", "none that is usable"
    else:
        toolkit = search.toolkit
        yield "found", f"CUDA {toolkit.version} in {toolkit.home}, by {search.place}"
    for rejection in search.rejections:
        yield "passed over", str(rejection)


if __name__ == "__main__":
    main()
