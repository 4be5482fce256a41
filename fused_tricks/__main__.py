"""`python -m fused_tricks`: a report of what is built and usable here, with reasons for what is not."""

from __future__ import annotations

import argparse
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
Facts = dict[str, Any]


def main() -> None:
    """Prints the report."""
    parser = argparse.ArgumentParser(
        prog="python -m fused_tricks", description="Reports what is built and usable here, with reasons."
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON, for a bug report")
    arguments = parser.parse_args()
    report = collect()
    print(json.dumps(report, indent=2) if arguments.json else "\n".join(text_of(report)))


def collect() -> dict[str, Facts]:
    """Returns the report as plain data. None stands for something that is absent."""
    return {
        "versions": _versions(),
        "backends": {
            name: {"usable": reason is None, "reason": reason} for name, reason in availability().items()
        },
        "processors": _processors(),
        "extension": {"unusable_because": missing_because(), "build": _build_info()},
        "cuda_toolkit": _toolkit(),
    }


def text_of(report: dict[str, Facts]) -> Iterator[str]:
    """Yields the lines of the report for a reader, from the data of `collect`."""
    sections = {
        "Versions": _version_rows(report["versions"]),
        "Backends": _backend_rows(report["backends"]),
        "Processors": _processor_rows(report["processors"]),
        "The extension": _extension_rows(report["extension"]),
        "CUDA toolkit here": _toolkit_rows(report["cuda_toolkit"]),
    }
    for title, rows in sections.items():
        yield title
        for name, value in rows:
            first, *others = value.splitlines() or [""]
            yield f"  {name:<16}  {first}"
            for line in others:
                yield f"  {'':<16}  {line}"
        yield ""


def _versions() -> Facts:
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = None
    return {
        "fused_tricks": fused_tricks.__version__,
        "folder": str(Path(fused_tricks.__file__).parent),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "torch_rocm": torch.version.hip,
        "triton": triton,
    }


def _version_rows(versions: Facts) -> Iterator[Row]:
    if versions["torch_cuda"] is not None:
        built = f"built with CUDA {versions['torch_cuda']}"
    elif versions["torch_rocm"] is not None:
        built = f"built with ROCm {versions['torch_rocm']}"
    else:
        built = "built without CUDA"
    yield "fused_tricks", f"{versions['fused_tricks']} in {versions['folder']}"
    yield "Python", f"{versions['python']} on {versions['platform']}"
    yield "torch", f"{versions['torch']}, {built}"
    yield "triton", versions["triton"] or "not installed"


def _backend_rows(backends: Facts) -> Iterator[Row]:
    for name, backend in backends.items():
        yield name, "usable" if backend["usable"] else f"not usable: {backend['reason']}"


def _processors() -> Facts:
    has_extension = missing_because() is None
    return {
        "instruction_sets": list(load_extension().instruction_sets()) if has_extension else None,
        "cpu_threads": torch.get_num_threads(),
        "gpus": list(map(_gpu, range(torch.cuda.device_count() if torch.cuda.is_available() else 0))),
    }


def _gpu(index: int) -> Facts:
    try:
        device = torch.cuda.get_device_properties(index)
    except RuntimeError as error:
        return {"failure": str(error).splitlines()[0]}
    return {
        "name": device.name,
        "architecture": f"{device.major}.{device.minor}",
        "memory_bytes": device.total_memory,
    }


def _processor_rows(processors: Facts) -> Iterator[Row]:
    sets = processors["instruction_sets"]
    yield "instruction sets", "unknown without the extension" if sets is None else ", ".join(sets)
    yield "CPU threads", f"{processors['cpu_threads']} in torch"
    if not processors["gpus"]:
        yield "GPUs", "torch sees none"
    for index, gpu in enumerate(processors["gpus"]):
        if "failure" in gpu:
            yield f"GPU {index}", f"torch cannot use it ({gpu['failure']})"
        else:
            memory = f"{gpu['memory_bytes'] / 2**30:.0f} GiB"
            yield f"GPU {index}", f"{gpu['name']}, architecture {gpu['architecture']}, {memory}"


def _build_info() -> Facts | None:
    """Returns the record of the build; None in a source tree that was never built."""
    try:
        info: Facts = json.loads(Path(__file__).with_name("_build_info.json").read_text())
    except (OSError, ValueError):
        return None
    return info


def _extension_rows(extension: Facts) -> Iterator[Row]:
    info = extension["build"]
    if info is None:
        reason = extension["unusable_because"]
        yield "build", reason or "unknown, without a record of the build; pip install writes one"
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


def _toolkit() -> Facts:
    search = find_toolkit()
    toolkit = search.toolkit
    return {
        "version": toolkit and toolkit.version,
        "home": toolkit and str(toolkit.home),
        "found_by": search.place or None,
        "passed_over": list(map(str, search.rejections)),
    }


def _toolkit_rows(toolkit: Facts) -> Iterator[Row]:
    if toolkit["version"] is None:
        yield "found", "none that is usable"
    else:
        yield "found", f"CUDA {toolkit['version']} in {toolkit['home']}, by {toolkit['found_by']}"
    for rejection in toolkit["passed_over"]:
        yield "passed over", rejection


if __name__ == "__main__":
    main()
