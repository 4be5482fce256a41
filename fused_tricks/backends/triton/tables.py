"""A plan as the kernels read it: INT64 tables on the device."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...step.device_lr import device_lr_of
from ...step.options import FLAGS, NUMBERS
from ...step.parameters import STATE_TENSORS
from ...step.plan import Entry, Plan
from ...validation import as_float
from ..gpu import is_capturing
from . import groups, records
from .launch import WORDS, kind_bits, launch, pair_bits, write_source

_KINDS = {
    torch.float16: records.FLOAT16.value,
    torch.bfloat16: records.BFLOAT16.value,
    torch.float32: records.FLOAT32.value,
    torch.float64: records.FLOAT64.value,
}
_CHUNK: int = records.CHUNK.value


class DeviceTables:
    """What stays as it is for as long as a plan lives.

    Attributes:
        tensors: INT64 of (entries, RECORD_WORDS): the records whose words records.py names.
        chunks: INT64 of (chunks,): entry << 32 | which chunk of it.
        chunk_count: How many.
        kinds: A bit for each pair of kinds, of parameters and their gradients, that occurs.
        grad_kinds: A bit for each kind of gradients that occurs.
        partial_squares: FP64 of (chunks,), written by the scan.
    """

    def __init__(self, plan: Plan, device: torch.device) -> None:
        made = [_record(entry) for entry in plan.entries]
        chunks = [
            index << 32 | chunk
            for index, record in enumerate(made)
            for chunk in range(-(-record[records.COUNT.value] // _CHUNK))
        ]
        if len(chunks) >= 2**31:
            raise RuntimeError("more than 2**31 - 1 chunks in one optimizer")
        self.tensors = torch.tensor(made or [_EMPTY], dtype=torch.int64, device=device)
        self.chunks = torch.tensor(chunks or [0], dtype=torch.int64, device=device)
        self.chunk_count = len(chunks)
        pairs = {
            (record[records.KIND.value], record[records.GRAD_KIND.value])
            for record in made
            if record[records.COUNT.value]
        }
        self.kinds = pair_bits(pairs)
        self.grad_kinds = kind_bits(grad_kind for _, grad_kind in pairs)
        self.partial_squares = torch.empty(max(1, len(chunks)), dtype=torch.float64, device=device)


_EMPTY = [0] * records.RECORD_WORDS.value


def _record(entry: Entry) -> list[int]:
    if not entry.live:
        return _EMPTY
    assert entry.grad_dtype is not None
    words = {
        records.PARAM: _address(entry.source),
        records.FIRST_UPDATE: _address(entry.first_update),
        records.COUNT: entry.source.numel(),
        records.KIND: _KINDS[entry.source.dtype],
        records.GRAD_KIND: _KINDS[entry.grad_dtype],
        records.IS_MATRIX: int(entry.source.dim() > 1),
        records.GROUP: entry.group,
        records.SHARD_CLASS: entry.shard_class,
    }
    by_index = {index.value: word for index, word in words.items()}
    for index, key in enumerate(STATE_TENSORS, start=records.STATE.value):
        by_index[index] = _address(entry.local_state.get(key))
    return [by_index[index] for index in range(records.RECORD_WORDS.value)]


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


GROUP_WORDS: int = groups.GROUP_WORDS.value
_FORMAT = "=" + "".join({"fp64": "d", "i64": "q"}[kind] for kind in groups.WORD_TYPES.values())

GroupWords = tuple[float | int, ...]


def group_words(group: dict[str, Any], device: torch.device) -> GroupWords:
    """Returns the options of a group as the update kernel takes them, in the order of `groups.WORD_TYPES`."""
    numbers = {name: group[name] for name in NUMBERS}
    flags = sum(groups.FLAG_BITS[name] for name in FLAGS if group[name])
    lr = group["lr"]
    address = last = origin = 0
    rate = device_lr_of(lr)
    if rate is not None:
        factors = rate.factors.on(device)
        address, last, origin = factors.data_ptr(), len(factors) - 1, rate.origin
        numbers["lr"] = rate.base
        flags |= groups.FLAG_BITS["lr_is_double"]
    elif (
        isinstance(lr, Tensor)
        and lr.numel() == 1
        and lr.device == device
        and lr.dtype in (torch.float32, torch.float64)
        and not lr.is_neg()
    ):
        address = lr.data_ptr()
        numbers["lr"] = 1.0
        flags |= groups.FLAG_BITS["lr_is_double"] if lr.dtype == torch.float64 else 0
    words: dict[str, float | int] = {
        "lr_address": address,
        "lr_last": last,
        "lr_origin": origin,
        "flags": flags,
    }
    words |= {name: as_float(number) for name, number in numbers.items()}
    return tuple(words[name] for name in groups.WORD_TYPES)


def table_words(made: Sequence[GroupWords]) -> list[int]:
    """Returns the words of all groups for a table, where FP64 is its bit pattern."""
    return [word for words in made for word in struct.unpack(f"={len(words)}q", struct.pack(_FORMAT, *words))]
