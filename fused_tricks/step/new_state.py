"""The record of optimizer state that no update has written yet."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ..distributed.sharding import local_part
from .device_state import StepState
from .ordinary_tensors import outside_all_modes


class _Note(NamedTuple):
    """The place where a tensor's first update is noted.

    Attributes:
        notes: INT64 of (1 + buffers,): the updates applied when these tensors were made, then for each buffer the
            number of the update that first wrote it, -1 before.
        place: The buffer's index in `notes`; 0 for a tensor whose first update is not noted itself.
    """

    notes: Tensor
    place: int

    def is_written(self, notes: Sequence[int], applied_steps: int) -> bool:
        """True if the tensor is written, by its `notes` on the host and the number of updates applied."""
        return notes[self.place] >= 0 if self.place else notes[0] != applied_steps


class NewState:
    """Masters and momentum buffers in `optimizer.state` that a plan has made, and no update may have written.

    Every backend notes a buffer's first update in one INT64 tensor for each plan that made some. The notes are on the
    parameters' device, because a GPU decides alone whether a first step is skipped. They keep their address, because
    captured CUDA graphs continue to note. A master has its parameter's values from the beginning and needs no note of
    its own: it counts as written once any update was applied. So does a buffer without elements.
    """

    def __init__(self) -> None:
        self._notes = WeakTensorKeyDictionary()
        self._first_of_all: dict[torch.device, Tensor] = {}

    def __bool__(self) -> bool:
        return bool(self._notes)

    def add(
        self,
        masters: Sequence[Tensor],
        buffers: Sequence[Tensor],
        step_state: StepState,
        device: torch.device,
    ) -> None:
        """Records tensors that were just made.

        Args:
            masters: Copies of parameters.
            buffers: Momentum buffers whose values mean nothing.
            step_state: The optimizer's state on the device.
            device: The device of the notes.
        """
        if not masters and not buffers:
            return
        with outside_all_modes():
            notes = torch.full((1 + len(buffers),), -1, dtype=torch.int64, device=device)
            notes[0].copy_(step_state.applied_steps)
        for master in masters:
            self._notes[master] = _Note(notes, 0)
        for index, buffer in enumerate(buffers, start=1):
            self._notes[buffer] = _Note(notes, index if local_part(buffer).numel() else 0)

    def first_update_of(self, buffer: Tensor, device: torch.device) -> Tensor:
        """Returns the 0-dim INT64 note of the update that first wrote a buffer.

        Args:
            buffer: The buffer.
            device: The device of the note: that of `add` where the buffer is recorded. All others share a note of
                0 there.
        """
        note = self._notes.get(buffer)
        with outside_all_modes():
            if note is not None and note.place:
                first_update: Tensor = note.notes[note.place]
                return first_update
            if device not in self._first_of_all:
                self._first_of_all[device] = torch.zeros((), dtype=torch.int64, device=device)
        return self._first_of_all[device]

    def replace(self, former: Tensor, tensor: Tensor, step_state: StepState, device: torch.device) -> None:
        """Has `tensor` take the place of `former`, whose values it has in another dtype, layout or device."""
        note = self._notes.pop(former, None)
        if note is None:
            return
        if note.notes.device == device:
            self._notes[tensor] = note
        elif not self._is_written(note, step_state):
            buffers = [tensor] if note.place else []
            self.add([] if buffers else [tensor], buffers, step_state, device)

    def forget(self, tensor: Tensor) -> None:
        """Records that a tensor was written by something else than an update."""
        self._notes.pop(tensor, None)

    def is_unwritten(self, tensor: Tensor, step_state: StepState) -> bool:
        """True if no update has written a tensor. Synchronises with the device if the tensor is recorded."""
        note = self._notes.get(tensor)
        return note is not None and not self._is_written(note, step_state)

    def unwritten(self, step_state: StepState) -> list[Tensor]:
        """Returns the tensors that no update has written, and drops the others from the record.

        Synchronises with the device, by one copy for each plan that made some.
        """
        applied_steps = step_state.read().applied_steps
        copies: dict[int, list[int]] = {}
        unwritten = []
        for tensor, note in list(self._notes.items()):
            if id(note.notes) not in copies:
                copies[id(note.notes)] = _on_host(note.notes)
            if note.is_written(copies[id(note.notes)], applied_steps):
                self.forget(tensor)
            else:
                unwritten.append(tensor)
        return unwritten

    @staticmethod
    def _is_written(note: _Note, step_state: StepState) -> bool:
        return note.is_written(_on_host(note.notes), step_state.read().applied_steps)

    def __getstate__(self) -> list[tuple[Tensor, _Note]]:
        return list(self._notes.items())

    def __setstate__(self, state: list[tuple[Tensor, _Note]]) -> None:
        self.__init__()  # type: ignore[misc]
        copies: dict[int, Any] = {}
        for tensor, note in state:
            # A shallow copy of an optimizer takes steps of its own.
            if id(note.notes) not in copies:
                with outside_all_modes():
                    copies[id(note.notes)] = note.notes.clone()
            self._notes[tensor] = note._replace(notes=copies[id(note.notes)])


def _on_host(notes: Tensor) -> list[int]:
    with outside_all_modes():
        values: list[int] = notes.tolist()
    return values
