"""Registers, spills, wide accesses and bytes in flight of the CUDA kernels, read from the built extension.

`python -m benchmarks.resources.cuda --output benchmarks/results` writes the kept table, without a GPU. A test compares
the table with the build, so a change of the kernels shows in it.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

import fused_tricks
from benchmarks.lib import machine, report
from benchmarks.lib.report import RESULTS, machine_note, table
from benchmarks.resources.in_flight import NOTE as IN_FLIGHT_NOTE
from benchmarks.resources.in_flight import InFlight, in_flight
from benchmarks.resources.sass import Kernel, cuobjdump, kernels

PATH = RESULTS / "cuda_resources.md"
_WIDE = re.compile(r"(LD|ST)G?\.E\S*\.128\b")


class Row(NamedTuple):
    """One kernel for one architecture.

    Attributes:
        architecture: Such as `sm_90`.
        name: `scan` or `update` with the number of gradients in its argument, or `decide` or `write`.
        registers: Registers of each thread.
        stack: Bytes of stack and local memory of each thread, including spills.
        shared: Bytes of shared memory of each block.
        wide_loads: Load instructions of 16 bytes.
        wide_stores: Store instructions of 16 bytes.
        in_flight: Bytes in flight on a multiprocessor in the main loop; None without one.
    """

    architecture: str
    name: str
    registers: int
    stack: int
    shared: int
    wide_loads: int
    wide_stores: int
    in_flight: InFlight | None


def build_info() -> dict[str, object]:
    """Returns the build record of the extension; empty without one."""
    path = Path(fused_tricks.__file__).parent / "_build_info.json"
    info: dict[str, object] = json.loads(path.read_text()) if path.exists() else {}
    return info


def rows(found: Iterable[Kernel]) -> list[Row]:
    """Returns the row of each kernel."""
    return [
        Row(
            kernel.architecture,
            kernel.name,
            kernel.registers,
            kernel.stack,
            kernel.shared,
            wide_accesses(kernel, "LD"),
            wide_accesses(kernel, "ST"),
            in_flight(kernel),
        )
        for kernel in found
    ]


def wide_accesses(kernel: Kernel, kind: str) -> int:
    """Returns the number of 16-byte loads (`LD`) or stores (`ST`) of global memory in a kernel."""
    return sum(access[1] == kind for each in kernel.code if (access := _WIDE.match(each.text)))


def as_markdown(found: list[Row], nvcc: str) -> str:
    """Returns the table that is kept in the repository."""
    header = [
        "architecture",
        "kernel",
        "registers",
        "spill bytes",
        "shared bytes",
        "16-byte loads",
        "16-byte stores",
        "KiB in flight an SM",
    ]
    return "\n\n".join(
        [
            "# What nvcc makes of the CUDA kernels",
            "Written by `python -m benchmarks.resources.cuda`; a test compares it with the build. The number behind a "
            "kernel's name says how many gradient addresses its argument holds.",
            IN_FLIGHT_NOTE,
            table(header, [[*map(str, row[:-1]), str(row.in_flight or "–")] for row in found]),
            f"nvcc {nvcc}\n",
        ]
    )


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
    page = as_markdown(rows(kernels(tool, Path(str(load_extension().__file__)))), cuda["version"])
    record = machine.describe("benchmarks.resources.cuda", arguments, torch.device("cpu"))
    report.write_page(options.output / PATH.name, f"{page}\n{machine_note(record)}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
