"""Registers, spills, accesses and bytes in flight of Triton's kernels, read from the compiled kernels, without a GPU.

`python -m benchmarks.resources.triton --output benchmarks/results` writes the kept table. A test compares the table
with newly compiled kernels, so a change of the kernels shows in it.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks.lib import machine, progress, report
from benchmarks.lib.report import RESULTS, machine_note, table
from benchmarks.resources import sass
from benchmarks.resources.in_flight import NOTE as IN_FLIGHT_NOTE
from benchmarks.resources.in_flight import InFlight, in_flight
from fused_tricks.backends.triton import IS_INTERPRETED
from fused_tricks.backends.triton.launch import (
    compile_for,
    decide_source,
    kind_bits,
    pair_bits,
    scan_source,
    update_source,
    write_source,
)
from fused_tricks.backends.triton.records import BFLOAT16, FLOAT16, FLOAT32, FLOAT64

PATH = RESULTS / "triton_resources.md"
ARCHITECTURES = (80, 90, 100, 120)
# The kinds of a network as cast_model leaves it, and all kinds at once.
_FLOAT16, _BFLOAT16, _FLOAT32, _FLOAT64 = (kind.value for kind in (FLOAT16, BFLOAT16, FLOAT32, FLOAT64))
_KINDS = {
    "float16, float32": ((_FLOAT16, _FLOAT16), (_FLOAT32, _FLOAT32)),
    "all": (
        (_FLOAT16, _FLOAT16),
        (_FLOAT16, _FLOAT32),
        (_BFLOAT16, _BFLOAT16),
        (_BFLOAT16, _FLOAT32),
        (_FLOAT32, _FLOAT32),
        (_FLOAT32, _FLOAT16),
        (_FLOAT32, _BFLOAT16),
        (_FLOAT64, _FLOAT64),
    ),
}
_ACCESS = re.compile(r"\b(ld|st)\.global\S*?(\.v\d)?\.b(\d+)\b")
_LAYOUT = re.compile(r"^(#\w+) = #ttg.blocked<\{sizePerThread = \[([\d, ]+)\]")
_TILE_ACCESS = re.compile(r"tt\.(?:load|store) .*tensor<(\d+)x!tt\.ptr<[a-z]+(\d+)>, (#\w+)>")


class Kernel(NamedTuple):
    """One kernel for one architecture.

    Attributes:
        architecture: Such as `sm_90`.
        name: The kernel and its specialisation.
        registers: Registers of each thread.
        stack: Bytes of stack and local memory of each thread, including spills.
        wide_loads: Load instructions of 16 bytes.
        wide_stores: Store instructions of 16 bytes.
        narrow: Accesses of less than 16 bytes in the loops that have accesses of 16.
        strided: Accesses to tiles in which a thread has more than 16 neighbouring bytes. Such an access takes several
            instructions, and each instruction requests every sector again.
        in_flight: Bytes in flight on a multiprocessor in the main loop; None without one.
    """

    architecture: str
    name: str
    registers: int
    stack: int
    wide_loads: int
    wide_stores: int
    narrow: int
    strided: int
    in_flight: InFlight | None


def sources() -> Iterator[tuple[str, ASTSource]]:
    """Yields the kernels to compile, with their names."""
    for kinds, pairs in _KINDS.items():
        bits = pair_bits(pairs)
        grad_bits = kind_bits(grad_kind for _, grad_kind in pairs)
        yield f"scan ({kinds})", scan_source(grad_bits, False, 0)
        yield f"scan with norm ({kinds})", scan_source(grad_bits, True, 0)
        if kinds == "all":
            yield f"scan with norms of two parts ({kinds})", scan_source(grad_bits, True, 2)
        for groups, averages in ((0, False), (1, False), (1, True), (8, False)):
            if groups != 1 and kinds != "all":
                continue
            name = f"update ({kinds}), {groups or 'a table of'} groups{', averages' if averages else ''}"
            yield name, update_source(bits, groups, averages)
    yield "decide", decide_source(True, 2)
    yield "write", write_source()


def kernels() -> list[Kernel]:
    """Compiles every kernel for every architecture."""
    tool = sass.cuobjdump()
    if tool is None:
        raise SystemExit("requires cuobjdump, which reads cubins")
    targets = [(architecture, *found) for architecture in ARCHITECTURES for found in sources()]
    return [
        inspect(tool, architecture, name, source)
        for architecture, name, source in progress.bar(targets, desc="kernels")
    ]


def inspect(tool: str, architecture: int, name: str, source: ASTSource) -> Kernel:
    """Compiles one kernel and returns its resources."""
    asm = compile_for(source, GPUTarget("cuda", architecture, 32)).asm
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(asm["cubin"])
        cubin.flush()
        (compiled,) = sass.kernels(tool, Path(cubin.name))
    wide = [access[1] for access in _ACCESS.finditer(asm["ptx"]) if _bits(access) == 128]
    return Kernel(
        f"sm_{architecture}",
        name,
        compiled.registers,
        compiled.stack,
        wide.count("ld"),
        wide.count("st"),
        _narrow_in_wide_loops(asm["ptx"]),
        _strided(asm["ttgir"]),
        in_flight(compiled),
    )


def _bits(access: re.Match[str]) -> int:
    return int((access[2] or ".v1")[2:]) * int(access[3])


def _narrow_in_wide_loops(ptx: str) -> int:
    """Returns the number of accesses of less than 16 bytes in the innermost loops that have accesses of 16."""
    count = 0
    for body in _innermost_loops(ptx):
        widths = [_bits(access) for access in _ACCESS.finditer(body)]
        if 128 in widths:
            count += sum(width < 128 for width in widths)
    return count


def _innermost_loops(ptx: str) -> Iterator[str]:
    """Returns the text between a label and the last jump back to it, if no other loop is in between."""
    lines = ptx.splitlines()
    labels = {line.split(":")[0]: at for at, line in enumerate(lines) if line.startswith("$L__BB")}
    ends: dict[int, int] = {}
    for at, line in enumerate(lines):
        jump = re.search(r"\bbra(?:\.uni)?\s+(\$L__BB\w+);", line)
        if jump and labels[jump[1]] < at:
            ends[labels[jump[1]]] = at
    for begin, end in ends.items():
        if not any(begin < other and last <= end for other, last in ends.items()):
            yield "\n".join(lines[begin : end + 1])


def _strided(ttgir: str) -> int:
    per_thread = {
        layout[1]: int(layout[2].split(",")[-1])
        for layout in map(_LAYOUT.match, ttgir.splitlines())
        if layout
    }
    return sum(per_thread[access[3]] * int(access[2]) > 128 for access in _TILE_ACCESS.finditer(ttgir))


def as_markdown(found: list[Kernel]) -> str:
    """Returns the table that is kept in the repository."""
    header = [
        "architecture",
        "kernel",
        "registers",
        "spill bytes",
        "16-byte loads",
        "16-byte stores",
        "narrower ones in their loops",
        "strided accesses",
        "KiB in flight an SM",
    ]
    return "\n\n".join(
        [
            "# What Triton makes of its kernels",
            "Written by `python -m benchmarks.resources.triton`; a test compares it with what is compiled.",
            IN_FLIGHT_NOTE,
            table(header, [[*map(str, kernel[:-1]), str(kernel.in_flight or "–")] for kernel in found]),
            f"triton {triton.__version__}\n",
        ]
    )


def main(arguments: Sequence[str]) -> None:
    """Writes the table, or prints the kernels as JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.resources.triton", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--json", action="store_true", help="print the kernels as JSON and write nothing")
    report.add_output_to(parser)
    options = parser.parse_args(arguments)
    if IS_INTERPRETED:
        raise SystemExit("unset TRITON_INTERPRET: interpreted kernels are not compiled")
    found = kernels()
    if options.json:
        result: dict[str, Any] = {
            "triton": triton.__version__,
            "kernels": [kernel._asdict() for kernel in found],
        }
        print(json.dumps(result))
        return
    record = machine.describe("benchmarks.resources.triton", arguments, torch.device("cpu"))
    report.write_page(options.output / PATH.name, f"{as_markdown(found)}\n{machine_note(record)}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
