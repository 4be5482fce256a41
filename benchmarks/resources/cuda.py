"""Registers, spills and wide accesses of the CUDA kernels, read from the built extension.

`python -m benchmarks.resources.cuda --output benchmarks/results` writes the kept table, without a GPU. A test compares
the table with the build, so a change of the kernels shows in it.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

import fused_tricks
from benchmarks.lib import machine, report
from benchmarks.lib.report import RESULTS, machine_note, table
from fused_tricks.cuda_toolkit import find_toolkit

PATH = RESULTS / "cuda_resources.md"
_FUNCTION = re.compile(r"(scan|update|decide|write)_kernel.*?Arguments(?:(?:ILi|<)(\d+))?")
USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
_WIDE = re.compile(r"\b(LD|ST)G?\.E\S*\.128\b")


class Kernel(NamedTuple):
    """One kernel for one architecture.

    Attributes:
        architecture: Such as `sm_90`.
        name: `scan` or `update` with the number of gradients in its argument, or `decide` or `write`.
        registers: Registers of each thread.
        stack: Bytes of stack and local memory of each thread, including spills.
        shared: Bytes of shared memory of each block.
        wide_loads: Load instructions of 16 bytes.
        wide_stores: Store instructions of 16 bytes.
    """

    architecture: str
    name: str
    registers: int
    stack: int
    shared: int
    wide_loads: int
    wide_stores: int


def cuobjdump() -> str | None:
    """Returns the path of NVIDIA's `cuobjdump`, from the toolkit or from Triton."""
    toolkit = find_toolkit().toolkit
    spec = importlib.util.find_spec("triton")
    candidates = [toolkit.home / "bin" / "cuobjdump"] if toolkit else []
    if spec is not None and spec.origin is not None:
        candidates.append(Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump")
    found = next((str(path) for path in candidates if path.exists()), None)
    return found or shutil.which("cuobjdump")


def build_info() -> dict[str, object]:
    """Returns the build record of the extension; empty without one."""
    path = Path(fused_tricks.__file__).parent / "_build_info.json"
    info: dict[str, object] = json.loads(path.read_text()) if path.exists() else {}
    return info


def kernels(tool: str, module: Path) -> list[Kernel]:
    """Returns every kernel in a built module, by architecture and name."""
    accesses = _accesses(tool, module)
    found = []
    for architecture, name, line in _functions(_run(tool, "--dump-resource-usage", str(module))):
        usage = USAGE.search(line)
        if usage:
            registers, stack, shared, local = map(int, usage.groups())
            counts = accesses[architecture, name]
            found.append(
                Kernel(architecture, name, registers, stack + local, shared, counts["LD"], counts["ST"])
            )
    return sorted(found, key=lambda kernel: (int(kernel.architecture[3:]), kernel.name))


def as_markdown(found: list[Kernel], nvcc: str) -> str:
    """Returns the table that is kept in the repository."""
    header = [
        "architecture",
        "kernel",
        "registers",
        "spill bytes",
        "shared bytes",
        "16-byte loads",
        "16-byte stores",
    ]
    return "\n\n".join(
        [
            "# What nvcc makes of the CUDA kernels",
            "Written by `python -m benchmarks.resources.cuda`; a test compares it with the build. The number behind a "
            "kernel's name says how many gradient addresses its argument holds.",
            table(header, [[str(field) for field in kernel] for kernel in found]),
            f"nvcc {nvcc}\n",
        ]
    )


def _accesses(tool: str, module: Path) -> dict[tuple[str, str], Counter[str]]:
    counts: dict[tuple[str, str], Counter[str]] = {}
    for architecture, name, line in _functions(_run(tool, "-sass", str(module))):
        counter = counts.setdefault((architecture, name), Counter())
        access = _WIDE.search(line)
        if access:
            counter[access[1]] += 1
    return counts


def _functions(text: str) -> Iterator[tuple[str, str, str]]:
    """Yields each line with its architecture and kernel."""
    architecture = name = ""
    for line in text.splitlines():
        if line.strip().startswith("arch ="):
            architecture, name = line.split("=")[1].strip(), ""
        function = _FUNCTION.search(line) if "Function" in line else None
        if function:
            name = " ".join(filter(None, function.groups()))
        elif name:
            yield architecture, name, line


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def main(arguments: Sequence[str]) -> None:
    """Writes the table."""
    from fused_tricks.extension import load_extension

    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.resources.cuda", description=(__doc__ or "").partition("\n")[0]
    )
    report.add_output_to(parser)
    options = parser.parse_args(arguments)
    tool = cuobjdump()
    cuda = build_info().get("cuda")
    if tool is None or not isinstance(cuda, dict):
        raise SystemExit("requires an extension built with CUDA, and cuobjdump")
    page = as_markdown(kernels(tool, Path(str(load_extension().__file__))), cuda["version"])
    record = machine.describe("benchmarks.resources.cuda", arguments, torch.device("cpu"))
    report.write_page(options.output / PATH.name, f"{page}\n{machine_note(record)}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
