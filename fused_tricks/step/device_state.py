"""The step state: the loss scale, trackers and counters of an optimizer, on the device of its parameters."""

from __future__ import annotations

import ctypes
import struct
from typing import NamedTuple

import torch
from torch import Tensor

from .ordinary_tensors import outside_all_modes

# Same order and types as StepState in csrc/core/step_state.h; the types are format characters of `struct`. A test
# compares the two.
_FIELDS = {
    "scale": "f",
    "growth_tracker": "i",
    "hysteresis_tracker": "i",
    "found_inf": "i",
    "applied_steps": "q",
    "skipped_steps": "q",
    "skip": "i",
    "inverse_scale": "f",
    "clip": "d",
    "arrivals": "i",
    "skipped_in_a_row": "i",
    "grad_norm": "d",
}
_TYPES = {"f": torch.float32, "d": torch.float64, "i": torch.int32, "q": torch.int64}
_LAYOUT = struct.Struct("=" + "".join(_FIELDS.values()))
OFFSETS = {
    name: struct.calcsize("=" + "".join(list(_FIELDS.values())[:index])) for index, name in enumerate(_FIELDS)
}
"""The offset of each field in the block, in bytes."""


def to_float32(value: float) -> float:
    """Returns the FP32 number nearest to `value`, with ties to even; infinity on overflow."""
    return ctypes.c_float(value).value


class StepReading(NamedTuple):
    """The fields of a `StepState` that the host reads, as Python numbers."""

    scale: float
    growth_tracker: int
    hysteresis_tracker: int
    applied_steps: int
    skipped_steps: int
    skip: int
    skipped_in_a_row: int
    grad_norm: float

    @classmethod
    def of(cls, block: Tensor) -> StepReading:
        """Returns the fields of `block`. Synchronises if `block` is on a GPU."""
        fields = dict(zip(_FIELDS, _LAYOUT.unpack(bytes(block.tolist())), strict=True))
        return cls(**{name: fields[name] for name in cls._fields})


class StepState:
    """The loss scale, trackers and counters of one optimizer in one 64-byte tensor.

    The attributes of the fields are 0-dim views of `block`. Kernels write the fields without a host sync. Reading a
    field as a Python number synchronises. `block` has memory even if the parameters have none, and even under a
    `FakeTensorMode`.

    Attributes:
        block: `uint8` tensor of 64 bytes that the kernels read and write.
        scale: FP32, the loss scale; 1 without loss scaling.
        growth_tracker: INT32, good steps since growth or an overflow last reset the tracker.
        hysteresis_tracker: INT32, overflows left until the scale backs off.
        grad_norm: FP64, the unscaled L2 norm of the last measured gradients. The value is rounded to FP32 unless a
            gradient is FP64.
        applied_steps: INT64, number of applied steps.
        skipped_steps: INT64, number of skipped steps.
        skip: INT32, 1 if the last step was skipped.
        skipped_in_a_row: INT32, number of skipped steps since the last applied step.
        arrivals: INT32, scratch of the GPU kernels.
        scale_was_read: True once code outside the step has read the scale, and so may have multiplied a loss by it.
    """

    def __init__(self, device: torch.device | str = "cpu", scale: float = 1.0, hysteresis: int = 1) -> None:
        with outside_all_modes():
            self._start(torch.zeros(_LAYOUT.size, dtype=torch.uint8, device=device))
            self.scale.fill_(scale)
            self.hysteresis_tracker.fill_(hysteresis)

    def _start(self, block: Tensor) -> None:
        self._view(block)
        self.scale_was_read = False
        self._kept: list[object] = []

    def _view(self, block: Tensor) -> None:
        self.block = block
        self.scale = _field(block, "scale")
        self.growth_tracker = _field(block, "growth_tracker")
        self.hysteresis_tracker = _field(block, "hysteresis_tracker")
        self.applied_steps = _field(block, "applied_steps")
        self.skipped_steps = _field(block, "skipped_steps")
        self.skip = _field(block, "skip")
        self.skipped_in_a_row = _field(block, "skipped_in_a_row")
        self.grad_norm = _field(block, "grad_norm")
        self.arrivals = _field(block, "arrivals")

    def move_to(self, device: torch.device) -> None:
        """Moves the state to another device."""
        if self.block.device != device:
            with outside_all_modes():
                self._view(self.block.to(device))

    def keep(self, *memory: object) -> None:
        """Keeps `memory` and the current `block` alive as long as this state, for a captured CUDA graph."""
        self._kept.append((self.block, *memory))

    def read(self) -> StepReading:
        """Returns the fields that the host reads, in one copy to the host."""
        with outside_all_modes():
            return StepReading.of(self.block)

    def __getstate__(self) -> tuple[Tensor, bool]:
        return self.block, self.scale_was_read

    def __setstate__(self, state: tuple[Tensor, bool]) -> None:
        block, scale_was_read = state
        # A copied or unpickled block shares no memory with copied views, so the views are made again.
        with outside_all_modes():
            self._start(block.clone())
        self.scale_was_read = scale_was_read


def _field(block: Tensor, name: str) -> Tensor:
    """Returns a 0-dim view of a field."""
    dtype = _TYPES[_FIELDS[name]]
    return block[OFFSETS[name] :][: dtype.itemsize].view(dtype)[0]
