"""The device tables: a plan as INT64 tables that the kernels read."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...step.device_lr import device_lr_of
from ...step.entry import Entry
from ...step.options import FLAGS, NONE, NUMBERS
from ...step.parameters import STATE_TENSORS
from ...step.plan import Plan
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
    """The device tables that are constant for the life of a plan, and scratch memory of the scan.

    Attributes:
        tensors: INT64 tensor of shape (entries, RECORD_WORDS). Each row is a record with the words of records.py.
        chunks: INT64 tensor of shape (chunks,): entry index << 32 | index of the chunk in the entry.
        chunk_count: The number of chunks.
        kinds: The pairs of kinds of parameters and gradients that occur, as bits (`pair_bits`).
        grad_kinds: The kinds of gradients that occur, as bits (`kind_bits`).
        partial_squares: FP64 tensor of shape (chunks,). The scan writes the sum of squares of each chunk.
    """

    def __init__(self, plan: Plan, device: torch.device) -> None:
        made = [_record(entry) for entry in plan.entries]
        chunks = [
            index << 32 | chunk
            for index, record in enumerate(made)
            for chunk in range(-(-record[records.COUNT.value] // _CHUNK))
        ]
        if len(chunks) >= 2**31:
            raise RuntimeError("more than 2**31 - 1 chunks in one optimizer; use several optimizers")
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
        by_index[index + records.FIRST_UPDATE.value] = _address(entry.first_updates.get(key))
    return [by_index[index] for index in range(records.RECORD_WORDS.value)]


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


class StepTable:
    """A device table of INT64 words that may change in every step. The table is written only after a change.

    Kernels write the words from their own arguments. No host memory must therefore outlive a launch, and a captured
    graph writes its words at every replay. Each captured step gets its own table, because the host does not record the
    writes of a replay.

    Attributes:
        table: INT64 tensor of shape (size,), with at least one element.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        self._device = device
        self.table = torch.empty(max(1, size), dtype=torch.int64, device=device)
        self._written: list[int] = []
        self._captured: list[Tensor] = []

    def address_of(self, words: list[int]) -> int:
        """Returns the address of a table that contains `words`."""
        if is_capturing(self._device):
            table = torch.empty_like(self.table)
            self._captured.append(table)
            self._write(table, words)
            return table.data_ptr()
        if words != self._written:
            # A failed write may leave a part of the words in the table.
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
    """Returns the options of a group as words for the update kernel, in the order of `groups.WORD_TYPES`."""
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
    words |= {
        name: NONE if number is None and NUMBERS[name].takes_none else as_float(number)
        for name, number in numbers.items()
    }
    return tuple(words[name] for name in groups.WORD_TYPES)


def table_words(made: Sequence[GroupWords]) -> list[int]:
    """Returns the words of all groups for a table, with FP64 numbers as their bit patterns."""
    return [word for words in made for word in struct.unpack(f"={len(words)}q", struct.pack(_FORMAT, *words))]
