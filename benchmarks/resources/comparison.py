"""The comparison of two builds of a kernel, without the differences that every change of the source brings.

After any change, ptxas numbers the registers anew, orders independent instructions in another way, and chooses between
several opcodes for a move, a shift or an addition. Instructions are therefore compared in a normal form: without the
numbers of registers, without the address of a branch, and with one opcode for one operation.

- A branch is the same if it leads to the same instruction.
- An instruction that moved inside its basic block is the same. Accesses to global memory keep their order.
- An instruction with the same registers in another order has other operands.
- If nothing else differs, the registers are compared too.
"""

from __future__ import annotations

import difflib
import re
import struct
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from benchmarks.resources.sass import Instruction

_REGISTER = re.compile(r"\b(U?[RP])(\d+)")
_CONTROL = re.compile(r"(BRA|BRX|BSSY|BSYNC|CALL|RET|EXIT|BAR|WARPSYNC)\b")
_STAYS = re.compile(rf"{_CONTROL.pattern}|(LDG?|STG?|ATOMG?|REDG?)\.")


def _constant(found: re.Match[str]) -> str:
    halves = struct.pack("<2e", float(found[3]), float(found[2]))
    return f"MOV {found[1]}, {int.from_bytes(halves, 'little'):#x}"


def _shift(found: re.Match[str]) -> str:
    return f"SHL {found[1]}, {found[2]}, {int(found[3], 16).bit_length() - 1:#x}"


# Operations with several opcodes. ptxas chooses the opcode by the load of the pipes.
_SYNONYMS: tuple[tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]], ...] = (
    (re.compile(r"IMAD\.MOV(?:\.U32)? (\S+), RZ, RZ, (\S+)"), r"MOV \1, \2"),
    (re.compile(r"HFMA2(?:\.MMA)? (\S+), -RZ, RZ, (-?[\d.e+-]+), (-?[\d.e+-]+)"), _constant),
    (re.compile(r"IMAD\.(?:SHL\.)?U32 (\S+), (\S+), 0x([1248]0*), RZ"), _shift),
    (re.compile(r"SHF\.L\.U32 (\S+), (\S+), (\S+), RZ"), r"SHL \1, \2, \3"),
    (re.compile(r"IMAD\.IADD (\S+), (\S+), 0x1, (\S+)"), r"IADD \1, \2, \3"),
    (re.compile(r"VIADD (\S+), (\S+), (\S+)"), r"IADD \1, \2, \3"),
    (re.compile(r"IADD3 (\S+), (\S+), (\S+), RZ"), r"IADD \1, \2, \3"),
    (re.compile(r"IMAD\.X (\S+), (\S+), 0x1, (\S+), (!?P\d)"), r"IADD.X \1, \2, \3, \4"),
    (re.compile(r"IADD3\.X (\S+), (\S+), (\S+), RZ, (!?P\d), !PT"), r"IADD.X \1, \2, \3, \4"),
    (re.compile(r"IMAD\.X (\S+), RZ, RZ, (\S+), (!?P\d)"), r"IADD.X \1, RZ, \2, \3"),
    (re.compile(r"IADD3\.X (\S+), RZ, (\S+), RZ, (!?P\d), !PT"), r"IADD.X \1, RZ, \2, \3"),
)


class Line(NamedTuple):
    """One line of a comparison: an instruction of the old kernel, of the new one, or the same instruction of both."""

    old: Instruction | None
    new: Instruction | None

    @property
    def is_changed(self) -> bool:
        """True if one kernel lacks the instruction."""
        return self.old is None or self.new is None

    @property
    def instruction(self) -> Instruction:
        """The instruction of the new kernel, or else of the old one."""
        found = self.new or self.old
        assert found is not None
        return found

    def __str__(self) -> str:
        sign = " " if not self.is_changed else "-" if self.new is None else "+"
        address, guard, text = self.instruction
        return f"{sign}{address:05x} {guard:>5} {text}"


def compare(old: Sequence[Instruction], new: Sequence[Instruction]) -> list[Line]:
    """Returns the lines of both kernels, aligned."""
    targets = _targets(old), _targets(new)
    lines = _with_changed_operands(_without_moves(_aligned(old, new, normal_form), targets))
    if not any(line.is_changed for line in lines):
        return _aligned(old, new, _with_registers)
    return lines


def hunks(lines: Sequence[Line], context: int = 2) -> Iterator[Sequence[Line]]:
    """Yields the changed lines in groups, with some unchanged lines before and behind each group."""
    near = {
        at
        for changed, line in enumerate(lines)
        if line.is_changed
        for at in range(max(0, changed - context), min(len(lines), changed + context + 1))
    }
    begins = sorted(at for at in near if at - 1 not in near)
    ends = sorted(at + 1 for at in near if at + 1 not in near)
    for begin, end in zip(begins, ends):
        yield lines[begin:end]


def changed_operations(old: Sequence[Instruction], new: Sequence[Instruction]) -> dict[str, int]:
    """Returns how many more or fewer instructions of an opcode there are, the largest difference first."""
    count = Counter(_opcode(each) for each in new)
    count.subtract(_opcode(each) for each in old)
    changed = [(opcode, more) for opcode, more in count.items() if more]
    return dict(sorted(changed, key=lambda item: (-abs(item[1]), item[0])))


def normal_form(instruction: Instruction) -> str:
    """Returns the instruction in the form that is compared: equal forms stand for the same operation."""
    return _REGISTER.sub(r"\1", f"{instruction.guard} {_one_opcode(_without_target(instruction))}")


def _with_registers(instruction: Instruction) -> str:
    return f"{instruction.guard} {_without_target(instruction)}"


def _without_target(instruction: Instruction) -> str:
    text = instruction.text.replace(".reuse", "")  # a hint for the cache of operands
    return text if instruction.target is None else text.rpartition(" ")[0]


def _one_opcode(text: str) -> str:
    for pattern, form in _SYNONYMS:
        found = pattern.fullmatch(text)
        if found:
            return found.expand(form) if isinstance(form, str) else form(found)
    return text


def _opcode(instruction: Instruction) -> str:
    return _one_opcode(_without_target(instruction)).partition(" ")[0]


def _targets(code: Sequence[Instruction]) -> set[int]:
    return {each.target for each in code if each.target is not None}


def _aligned(
    old: Sequence[Instruction], new: Sequence[Instruction], form: Callable[[Instruction], str]
) -> list[Line]:
    matcher = difflib.SequenceMatcher(None, [*map(form, old)], [*map(form, new)], autojunk=False)
    lines: list[Line] = []
    for kind, old_begin, old_end, new_begin, new_end in matcher.get_opcodes():
        if kind == "equal":
            lines += map(Line, old[old_begin:old_end], new[new_begin:new_end])
        else:
            lines += [Line(each, None) for each in old[old_begin:old_end]]
            lines += [Line(None, each) for each in new[new_begin:new_end]]
    return lines


def _without_moves(lines: Sequence[Line], targets: tuple[set[int], set[int]]) -> list[Line]:
    """Joins an instruction that is missing in a basic block and the same instruction elsewhere in the block."""
    result: list[Line] = []
    block: list[Line] = []
    for line in lines:
        begins = any(each and each.address in found for each, found in zip(line, targets))
        if begins or _CONTROL.match(line.instruction.text):
            result += _joined(block)
            block = []
        block.append(line)
    return result + _joined(block)


def _joined(block: Sequence[Line]) -> list[Line]:
    missing: dict[str, list[Instruction]] = {}
    for line in block:
        if line.old and not line.new and not _STAYS.match(line.old.text):
            missing.setdefault(normal_form(line.old), []).append(line.old)
    result, moved = [], set()
    for line in block:
        same = missing.get(normal_form(line.new)) if line.new and not line.old else None
        if same:
            moved.add(same[0].address)
            line = Line(same.pop(0), line.new)
        result.append(line)
    return [line for line in result if line.new or line.instruction.address not in moved]


def _with_changed_operands(lines: Sequence[Line]) -> list[Line]:
    """Splits the lines of instructions whose branch leads elsewhere, or whose registers have another order."""
    # A branch to a changed instruction leads to the next unchanged one.
    old_places: dict[int | None, int] = {}
    new_places: dict[int | None, int] = {}
    place = len(lines)
    for at in reversed(range(len(lines))):
        old, new = lines[at]
        place = place if lines[at].is_changed else at
        if old:
            old_places[old.address] = place
        if new:
            new_places[new.address] = place
    result: list[Line] = []
    for line in lines:
        old, new = line
        if old and new:
            leads_elsewhere = old_places.get(old.target) != new_places.get(new.target)
            registers = _REGISTER.findall(old.text), _REGISTER.findall(new.text)
            is_permuted = registers[0] != registers[1] and sorted(registers[0]) == sorted(registers[1])
            if leads_elsewhere or is_permuted:
                result += [Line(old, None), Line(None, new)]
                continue
        result.append(line)
    return result
