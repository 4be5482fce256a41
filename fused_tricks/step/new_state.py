"""The record of optimizer state that no update has written yet."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ..distributed.sharding import local_part
from .device_state import StepState
from .ordinary_tensors import outside_all_modes


class _Note(NamedTuple):
    """The location of the note of a tensor's first update.

    Attributes:
        notes: INT64 tensor of shape (1 + tensors,). Element 0 is the number of applied steps when the tensors were
            made. Each further element belongs to a tensor: the number of the update that first wrote the tensor, and
            -1 before that update.
        place: The index of the tensor in `notes`; 0 for a tensor without elements, which no update notes.
        version: The version counter of a new master; None for other tensors. User code increments it by a write.
    """

    notes: Tensor
    place: int
    version: int | None

    def is_written(self, notes: Sequence[int], applied_steps: int) -> bool:
        """True if an update has written the tensor, given a copy of `notes` on the host."""
        return notes[self.place] >= 0 if self.place else notes[0] != applied_steps


class NewState:
    """The record of state tensors that a plan has made and that may be unwritten.

    Each plan that makes state tensors has one INT64 tensor of notes. Every backend notes the first update of a tensor
    there. The notes are on the parameters' device, because the skip decision of a first step is made there.
    The notes keep their address, because captured CUDA graphs continue to write them. A master is made with its
    parameter's values, so user code may write to the master before an update does. A tensor without elements counts as
    written after the first applied step.
    """

    def __init__(self) -> None:
        self._notes = WeakTensorKeyDictionary()
        self._first_of_all: dict[torch.device, Tensor] = {}

    def __bool__(self) -> bool:
        return bool(self._notes)

    def add(
        self,
        masters: Sequence[Tensor],
        without_values: Sequence[Tensor],
        step_state: StepState,
        device: torch.device,
    ) -> None:
        """Records new tensors.

        Args:
            masters: Copies of parameters.
            without_values: Momentum buffers and averages without valid values.
            step_state: The optimizer's step state.
            device: The device of the notes.
        """
        if not masters and not without_values:
            return
        with outside_all_modes():
            notes = torch.full(
                (1 + len(masters) + len(without_values),), -1, dtype=torch.int64, device=device
            )
            notes[0].copy_(step_state.applied_steps)
        for index, tensor in enumerate((*masters, *without_values), start=1):
            self._notes[tensor] = _Note(
                notes,
                index if local_part(tensor).numel() else 0,
                tensor._version if index <= len(masters) else None,
            )

    def first_updates_of(self, tensors: Iterable[Tensor], device: torch.device) -> list[Tensor]:
        """Returns, for each state tensor, the 0-dim INT64 note of the update that first wrote the tensor.

        Args:
            tensors: The state tensors. Tensors that are not recorded share one note of 0.
            device: The device of the shared note. For a recorded tensor, the device of `add`.
        """
        found = [self._notes.get(tensor) for tensor in tensors]
        with outside_all_modes():
            if device not in self._first_of_all:
                self._first_of_all[device] = torch.zeros((), dtype=torch.int64, device=device)
            first_of_all = self._first_of_all[device]
            distinct = {id(note.notes): note.notes for note in found if note is not None}
            elements = {key: notes.unbind() for key, notes in distinct.items()}
        return [
            elements[id(note.notes)][note.place] if note is not None and note.place else first_of_all
            for note in found
        ]

    def replace(self, former: Tensor, tensor: Tensor, step_state: StepState, device: torch.device) -> None:
        """Replaces `former` in the record by `tensor`, which has the same values in another dtype, layout or device."""
        note = self._notes.pop(former, None)
        if note is None or _is_changed(former, note):
            return
        if note.notes.device == device:
            self._notes[tensor] = _for_tensor(note, tensor)
        elif not self._is_written(note, step_state):
            is_master = note.version is not None
            self.add([tensor] if is_master else [], [] if is_master else [tensor], step_state, device)

    @contextmanager
    def resynchronised(self, master: Tensor) -> Iterator[None]:
        """Returns a context in which a write to a new master does not count as a write by user code."""
        note = self._notes.get(master)
        is_new = note is not None and not _is_changed(master, note)
        yield
        if note is not None and is_new:
            self._notes[master] = _for_tensor(note, master)

    def forget(self, tensor: Tensor) -> None:
        """Removes a tensor from the record: the tensor counts as written."""
        self._notes.pop(tensor, None)

    def is_unwritten(self, tensor: Tensor, step_state: StepState) -> bool:
        """True if no update has written a tensor. Synchronises with the device if the tensor is recorded."""
        note = self._notes.get(tensor)
        return note is not None and not self._is_written(note, step_state)

    def unwritten(self, step_state: StepState) -> list[Tensor]:
        """Returns the tensors that no update has written, and removes the written tensors from the record.

        Synchronises with the device: one copy of the step state, and one copy for each tensor of notes.
        """
        applied_steps = step_state.read().applied_steps
        copies: dict[int, list[int]] = {}
        unwritten = []
        for tensor, note in list(self._notes.items()):
            if id(note.notes) not in copies:
                copies[id(note.notes)] = _on_host(note.notes)
            if note.is_written(copies[id(note.notes)], applied_steps) or _is_changed(tensor, note):
                self.forget(tensor)
            else:
                unwritten.append(tensor)
        return unwritten

    @staticmethod
    def _is_written(note: _Note, step_state: StepState) -> bool:
        return note.is_written(_on_host(note.notes), step_state.read().applied_steps)

    def __getstate__(self) -> tuple[list[tuple[Tensor, _Note]]]:
        # A tuple, because pickle's protocols 0 and 1 leave out an empty state.
        # The version counter of a copy does not show that user code wrote to the original.
        return ([(tensor, note) for tensor, note in self._notes.items() if not _is_changed(tensor, note)],)

    def __setstate__(self, state: tuple[list[tuple[Tensor, _Note]]]) -> None:
        self.__init__()  # type: ignore[misc]
        # A shallow copy of an optimizer shares the buffers, and therefore the notes.
        for tensor, note in state[0]:
            self._notes[tensor] = _for_tensor(note, tensor)


def _for_tensor(note: _Note, tensor: Tensor) -> _Note:
    # The version counter of a copy or a converted tensor is its own.
    return note._replace(version=None if note.version is None else tensor._version)


def _is_changed(tensor: Tensor, note: _Note) -> bool:
    return note.version is not None and tensor._version != note.version


def _on_host(notes: Tensor) -> list[int]:
    with outside_all_modes():
        values: list[int] = notes.tolist()
    return values
