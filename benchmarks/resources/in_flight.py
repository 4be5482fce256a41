"""Bytes in flight: the memory that a multiprocessor has requested before it waits for the first of the loads."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from benchmarks.resources.sass import Instruction, Kernel

_WARP = 32
_REGISTERS = 65536
# A warp's registers lie in one of four partitions, in units of 256.
_PARTITIONS, _REGISTER_UNIT = 4, 256
# The driver's own share of a block's shared memory, since 8.0.
_RESERVED_SHARED = 1024

_LOAD = re.compile(r"LDG?\.E\b")
_WIDE_LOAD = re.compile(r"LDG?\.E\S*\.128\b")
_WIDTH = re.compile(r"\.[US]?(8|16|64|128)\b")
_REGISTER = re.compile(r"\bR(\d+)(\.64)?")
_WRITTEN_PREDICATES = re.compile(r"(?!BRA)\S+ (?:U?R\w+, )?(U?P\d)(?:, (U?P\d))?")


NOTE = (
    "KiB in flight an SM: the bytes of the global loads that one thread issues before the first instruction that names "
    "a loaded register, times the threads that are resident on a multiprocessor (by registers, shared memory, and the "
    "limits of the architecture). Counted in the main loop: the longest innermost loop with 16-byte loads, of those "
    "that convert FP16 if there are any. Of two numbers, the second includes the loads of options. In the CUDA update, "
    "a thread loads 16 bytes of gradients and 32 of weights, 32 more with momentum, and 32 more with an average. A GPU "
    "reaches its memory bandwidth with about 16 KiB (A100), 32 (H100), 48 (H200) or 64 (B200)."
)
"""The definition, for the page of a table with this column."""


class Multiprocessor(NamedTuple):
    """Limits of a multiprocessor.

    Attributes:
        threads: Resident threads at most.
        blocks: Resident blocks at most.
        shared: KiB of shared memory.
    """

    threads: int
    blocks: int
    shared: int


# CUDA C++ Programming Guide, "Technical Specifications per Compute Capability". The numbers of blocks and the units of
# the registers are also in the toolkit's cuda_occupancy.h.
MULTIPROCESSORS = {
    "sm_75": Multiprocessor(1024, 16, 64),
    "sm_80": Multiprocessor(2048, 32, 164),
    "sm_86": Multiprocessor(1536, 16, 100),
    "sm_89": Multiprocessor(1536, 24, 100),
    "sm_90": Multiprocessor(2048, 32, 228),
    "sm_100": Multiprocessor(2048, 32, 228),
    "sm_120": Multiprocessor(1536, 24, 100),
}


class InFlight(NamedTuple):
    """Bytes in flight on one multiprocessor.

    Attributes:
        least: With the loads that every parameter takes.
        most: With the loads of all options too, such as momentum.
    """

    least: int
    most: int

    def __str__(self) -> str:
        least, most = (f"{each / 1024:.3g}" for each in self)
        return least if least == most else f"{least} to {most}"


def in_flight(kernel: Kernel) -> InFlight | None:
    """Returns the bytes in flight in the kernel's main loop, with as many blocks as fit on the multiprocessor.

    Returns None without such a loop, without a bound of the threads of a block, or for an architecture that
    `MULTIPROCESSORS` lacks.
    """
    loop = main_loop(kernel.code)
    if not loop or not kernel.threads or kernel.architecture not in MULTIPROCESSORS:
        return None
    threads = resident_threads(kernel)
    return InFlight(*(threads * each for each in bytes_before_use(loop)))


def resident_threads(kernel: Kernel) -> int:
    """Returns the number of threads that are resident on a multiprocessor at the same time."""
    limits = MULTIPROCESSORS[kernel.architecture]
    warps = -(-kernel.threads // _WARP)
    registers_of_warp = -(-kernel.registers * _WARP // _REGISTER_UNIT) * _REGISTER_UNIT
    resident_warps = _PARTITIONS * (_REGISTERS // _PARTITIONS // registers_of_warp)
    return kernel.threads * min(
        limits.threads // kernel.threads,
        limits.blocks,
        limits.shared * 1024 // (kernel.shared + _RESERVED_SHARED),
        resident_warps // warps,
    )


def main_loop(code: Sequence[Instruction]) -> list[Instruction]:
    """Returns the longest innermost loop with 16-byte loads, of those with a conversion from FP16 if there are any."""
    wide = [loop for loop in innermost_loops(code) if any(_WIDE_LOAD.match(each.text) for each in loop)]
    converting = [loop for loop in wide if any(each.opcode == "HADD2.F32" for each in loop)]
    return max(converting or wide, key=len, default=[])


def innermost_loops(code: Sequence[Instruction]) -> Iterator[list[Instruction]]:
    """Yields the instructions from a label to the last jump back to it, if no other loop is in between."""
    ends: dict[int, int] = {}
    for each in code:
        if each.opcode.startswith("BRA") and each.target is not None and each.target < each.address:
            ends[each.target] = each.address
    for begin, end in ends.items():
        if not any(begin < other and last <= end for other, last in ends.items()):
            yield [each for each in code if begin <= each.address <= end]


def bytes_before_use(loop: Sequence[Instruction]) -> tuple[int, int]:
    """Returns the bytes that one thread loads before the first instruction that names a loaded register.

    Two numbers: without and with the loads under a predicate that the loop does not write. Such a predicate is an
    option; the loop writes the predicates of bounds.
    """
    in_loop = {predicate for each in loop for predicate in _written_predicates(each)}
    loaded: set[int] = set()
    least = most = 0
    for each in loop:
        named = _registers(each.text)
        if not loaded.isdisjoint(named):
            break
        if _LOAD.match(each.text):
            width = _WIDTH.search(each.opcode)
            size = int(width[1]) // 8 if width else 4
            first = named[0]
            loaded.update(range(first, first + max(1, size // 4)))
            most += size
            least += 0 if each.guard and each.guard.lstrip("@!") not in in_loop else size
    return least, most


def _registers(text: str) -> list[int]:
    """Returns the numbers of the registers in operands; of a wide operand, of its first 64 bits."""
    return [int(number) + i for number, wide in _REGISTER.findall(text) for i in range(2 if wide else 1)]


def _written_predicates(instruction: Instruction) -> Iterable[str]:
    found = _WRITTEN_PREDICATES.match(instruction.text)
    return [each for each in found.groups() if each] if found else []
