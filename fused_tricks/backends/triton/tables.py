"""A plan as the kernels read it: INT64 tables on the device."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...applied_rate import applied_rate_of
from ...hyper_parameters import as_float
from ...plan import Entry, Plan
from ..gpu import is_capturing
from . import groups, records
from .launch import WORDS, launch, write_source

_KINDS = {
    torch.float16: records.FLOAT16.value,
    torch.bfloat16: records.BFLOAT16.value,
    torch.float32: records.FLOAT32.value,
    torch.float64: records.FLOAT64.value,
}
_CHUNK: int = records.CHUNK.value


class PlanTables:
    """What stays as it is for as long as a plan lives.

    Attributes:
        tensors: INT64 of (entries, 7): the addresses of param, master, buffer (0: none) and of the number of the first
            update; the count of elements; the kind, whether weights decay whatever ``bias_decay`` says, and the group;
            the part.
        chunks: INT64 of (chunks,): entry << 32 | which chunk of it.
        chunk_count: How many.
        kinds: A bit for each kind that occurs.
        partial_squares: FP64 of (chunks,), written by the scan.
    """

    def __init__(self, plan: Plan, first_steps: Sequence[Tensor | None], device: torch.device) -> None:
        records = [_record(entry, first) for entry, first in zip(plan.entries, first_steps, strict=True)]
        chunks = [
            index << 32 | chunk
            for index, record in enumerate(records)
            for chunk in range(-(-record[4] // _CHUNK))
        ]
        if len(chunks) >= 2**31:
            raise RuntimeError("more than 2**31 - 1 chunks in one optimizer")
        self.tensors = torch.tensor(records or [[0] * 7], dtype=torch.int64, device=device)
        self.chunks = torch.tensor(chunks or [0], dtype=torch.int64, device=device)
        self.chunk_count = len(chunks)
        self.kinds = 0
        for record in records:
            if record[4]:
                self.kinds |= 1 << (record[5] & 3)
        self.partial_squares = torch.empty(max(1, len(chunks)), dtype=torch.float64, device=device)


def _record(entry: Entry, first_step: Tensor | None) -> list[int]:
    if not entry.live:
        return [0] * 7
    source = entry.source
    traits = _KINDS[source.dtype] | (4 if source.dim() > 1 else 0) | entry.group << 8
    addresses = map(_address, (source, entry.master, entry.buffer, first_step))
    return [*addresses, source.numel(), traits, entry.part]


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


class StepTable:
    """INT64 words on the device that may change with every step, and are written only when they have.

    They are written by kernels that carry them in their arguments: nothing is copied from the host, so nothing on the
    host has to outlive a launch, and a captured graph writes what it needs again. A graph gets a table of its own, or
    what it writes would be taken for what a later step wrote.

    Attributes:
        table: INT64, of the size asked for.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        self._device = device
        self.table = torch.empty(max(1, size), dtype=torch.int64, device=device)
        self._written: list[int] = []
        self._captured: list[Tensor] = []

    def address_of(self, words: list[int]) -> int:
        """The address of a table with these words."""
        if is_capturing(self._device):
            table = torch.empty_like(self.table)
            self._captured.append(table)
            self._write(table, words)
            return table.data_ptr()
        if words != self._written:
            # A write that fails may have written a part.
            self._written = []
            self._write(self.table, words)
            self._written = words
        return self.table.data_ptr()

    def _write(self, table: Tensor, words: list[int]) -> None:
        for begin in range(0, len(words), WORDS):
            part = words[begin : begin + WORDS]
            padded = (*part, *[0] * (WORDS - len(part)))
            launch(self._device, write_source, (), 1, table.data_ptr(), begin, len(part), padded)


_FLAGS = (
    ("nesterov", groups.NESTEROV.value),
    ("maximize", groups.MAXIMIZE.value),
    ("bias_decay", groups.BIAS_DECAY.value),
)
_LR_IS_DOUBLE: int = groups.LR_IS_DOUBLE.value

GroupNumbers = tuple[float, float, float, float, int, int, int, int]
GROUP_WORDS: int = groups.GROUP_WORDS.value


def group_numbers(group: dict[str, Any], device: torch.device) -> GroupNumbers:
    """The options of a group as the update kernel takes them.

    Returns:
        lr, momentum, 1 - dampening, weight_decay; the address of numbers that the kernel multiplies lr with (0: none),
        the position of the last, how many updates come before the first; and flags.
    """
    lr = group["lr"]
    address = last = origin = lr_flag = 0
    rate = applied_rate_of(lr)
    if rate is not None:
        factors = rate.factors.on(device)
        address, last, origin, lr_flag = factors.data_ptr(), len(factors) - 1, rate.origin, _LR_IS_DOUBLE
        lr = rate.base
    elif (
        isinstance(lr, Tensor)
        and lr.numel() == 1
        and lr.device == device
        and lr.dtype in (torch.float32, torch.float64)
        and not lr.is_neg()
    ):
        address, lr_flag = lr.data_ptr(), (_LR_IS_DOUBLE if lr.dtype == torch.float64 else 0)
        lr = 1.0
    flags = lr_flag | sum(flag for name, flag in _FLAGS if group[name])
    return (
        as_float(lr),
        as_float(group["momentum"]),
        1.0 - as_float(group["dampening"]),
        as_float(group["weight_decay"]),
        address,
        last,
        origin,
        flags,
    )


def words_of(numbers: Sequence[GroupNumbers]) -> list[int]:
    """The same for a table, where FP64 is its bit pattern."""
    return [word for group in numbers for word in struct.unpack("=8q", struct.pack("=4d4q", *group))]
