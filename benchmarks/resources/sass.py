"""The machine code (SASS) of compiled kernels, read from the output of NVIDIA's `cuobjdump`."""

from __future__ import annotations

import importlib.util
import itertools
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

from fused_tricks.cuda_toolkit import find_toolkit

_SECTION = re.compile(
    r"^(?:arch = |64-?bit (?:elf|ELF): .*\bsm=)(?:sm_)?(\d+).*$"
    r"|^[ \t]*Function ?: ?(\S+)$|^[ \t]*Function (\S+):$|^\.nv\.info\.(\S+)$",
    re.MULTILINE,
)
_NAME = re.compile(r"([a-z]+)_kernel.*Arguments(?:(?:ILi|<)(\d+))?")
_USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
_BLOCK = re.compile(r"EIATTR_(?:MAX_THREADS|REQNTID)\n.*\n\s*Value:\s*0x([0-9a-f]+) 0x1 0x1")
_INSTRUCTION = re.compile(r"^[ \t]+/\*([0-9a-f]{4,})\*/ +(?:(@\S+) +)?(\S[^;\n]*?) *;", re.MULTILINE)
_TARGET = re.compile(r"(?:BRA|CALL|BSSY|WARPSYNC)\b.*\b(0x[0-9a-f]+)$")


class Instruction(NamedTuple):
    """One instruction.

    Attributes:
        address: The offset from the begin of the kernel in bytes.
        guard: The predicate that the instruction depends on, such as `@!P0`; empty without one.
        text: The opcode and the operands.
    """

    address: int
    guard: str
    text: str

    @property
    def opcode(self) -> str:
        """The opcode with its modifiers, such as `LDG.E.128`."""
        return self.text.partition(" ")[0]

    @property
    def target(self) -> int | None:
        """The address in the operands of a branch, a call or a barrier of a branch."""
        found = _TARGET.match(self.text)
        return int(found[1], 16) if found else None


class Kernel(NamedTuple):
    """One kernel for one architecture.

    Attributes:
        architecture: Such as `sm_90`.
        name: `scan` or `update` with the number of gradients in its argument, or `decide` or `write`. The symbol of
            another function.
        code: The instructions, without the padding at the end.
        registers: Registers of each thread.
        stack: Bytes of stack and local memory of each thread, including spills.
        shared: Bytes of shared memory of each block.
        threads: Threads of a block at most.
    """

    architecture: str
    name: str
    code: tuple[Instruction, ...]
    registers: int
    stack: int
    shared: int
    threads: int


def cuobjdump() -> str | None:
    """Returns the path of NVIDIA's `cuobjdump`, from the toolkit or from Triton."""
    toolkit = find_toolkit().toolkit
    spec = importlib.util.find_spec("triton")
    candidates = [toolkit.home / "bin" / "cuobjdump"] if toolkit else []
    if spec is not None and spec.origin is not None:
        candidates.append(Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump")
    found = next((str(path) for path in candidates if path.exists()), None)
    return found or shutil.which("cuobjdump")


def kernels(tool: str, binary: Path) -> list[Kernel]:
    """Returns every kernel in a module or a cubin, by architecture and name."""
    command = [tool, "-sass", "-elf", "--dump-resource-usage", str(binary)]
    return parse(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def parse(dump: str) -> list[Kernel]:
    """Returns the kernels in the output of `cuobjdump -sass -elf --dump-resource-usage`, by architecture and name."""
    bodies: dict[tuple[str, str], str] = {}
    architecture = ""
    sections = [*_SECTION.finditer(dump), None]
    for section, following in itertools.pairwise(sections):
        assert section is not None
        if section[1]:
            architecture = f"sm_{section[1]}"
            continue
        symbol = section[2] or section[3] or section[4]
        body = dump[section.end() : following.start() if following else None]
        bodies[architecture, symbol] = bodies.get((architecture, symbol), "") + body
    found = []
    for (architecture, symbol), body in bodies.items():
        name, usage, threads = _NAME.search(symbol), _USAGE.search(body), _BLOCK.search(body)
        if usage is None:
            continue
        registers, stack, shared, local = map(int, usage.groups())
        found.append(
            Kernel(
                architecture,
                " ".join(filter(None, name.groups())) if name else symbol,
                _instructions(body),
                registers,
                stack + local,
                shared,
                int(threads[1], 16) if threads else 0,
            )
        )
    return sorted(found, key=lambda kernel: (int(kernel.architecture[3:]), kernel.name))


def _instructions(body: str) -> tuple[Instruction, ...]:
    code = [Instruction(int(at, 16), guard, text) for at, guard, text in _INSTRUCTION.findall(body)]
    while code and code[-1].opcode == "NOP":
        code.pop()
    return tuple(code)
