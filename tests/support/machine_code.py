"""Machine code for tests: instructions from a listing, in which labels stand for addresses."""

from __future__ import annotations

import re

from benchmarks.resources.sass import Instruction, Kernel

SIZE = 0x10


def assembled(listing: str) -> tuple[Instruction, ...]:
    """Returns the instructions of a listing, one a line, such as `@P0 BRA end`; `end:` is a label."""
    texts: list[str] = []
    labels: dict[str, int] = {}
    for line in filter(None, map(str.strip, listing.splitlines())):
        if line.endswith(":"):
            labels[line[:-1]] = SIZE * len(texts)
        else:
            texts.append(line)
    code = []
    for at, text in enumerate(texts):
        guard, _, rest = text.partition(" ") if text.startswith("@") else ("", "", text)
        for label, address in labels.items():
            rest = re.sub(rf"\b{label}$", f"{address:#x}", rest)
        code.append(Instruction(SIZE * at, guard, rest))
    return tuple(code)


def kernel(
    listing: str = "", *, architecture="sm_90", name="scan 256", registers=40, shared=0, threads=256
) -> Kernel:
    """Returns a kernel without spills."""
    return Kernel(architecture, name, assembled(listing), registers, 0, shared, threads)
