"""The few numbers of an optimizer that live on its parameters' device."""

from __future__ import annotations

import ctypes
import struct

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.weak import WeakTensorKeyDictionary

# The layout of StepState in csrc/step_state.h, some of which is private to the kernels.
_SIZE = 64
LAST_STEP = 2**63 - 1
"""Where ``applied_steps`` and ``skipped_steps`` stay."""


def to_float32(value: float) -> float:
    """The FP32 number nearest to ``value``, ties to even; infinite where that overflows."""
    return ctypes.c_float(value).value


class StepState:
    """Loss scale, trackers and counters of one optimizer in one 64-byte tensor.

    Every attribute is a 0-dim view of ``block``, so a kernel changes them without a host sync, and reading one as a
    Python number is a sync. ``block`` has memory even where the parameters have none, and a ``FakeTensorMode`` does not
    change that.

    Attributes:
        block: ``uint8`` tensor of 64 bytes that the kernels are given.
        scale: FP32, the loss scale; 1 where none is in use.
        growth_tracker: INT32, good steps since the scale last changed or an overflow was found.
        hysteresis_tracker: INT32, overflows left until the scale backs off.
        grad_norm: FP64, the unscaled L2 norm of the last measured gradients; an FP32 number unless one was FP64.
        applied_steps: INT64, updates applied; at 2**63 - 1 it stays.
        skipped_steps: INT64, updates skipped; likewise.
        past_end: INT32, updates applied since ``applied_steps`` came to stay, modulo 2**32.
        skip: INT32, 1 when the last step was skipped.
        first_steps: For each momentum buffer that a GPU may not have written yet, because the host does not wait to
            hear whether its first step was skipped: a 0-dim INT64 tensor with the number of the update that first
            wrote it, -1 before.
        unwritten: Momentum buffers that are in the optimizer's state although no update has written them, as keys.
        applied_before: For each master and buffer, ``last_update()`` as it was when a GPU's plan made it: another one
            now means that an update may have written it.
    """

    def __init__(self, device: torch.device | str = "cpu", scale: float = 1.0, hysteresis: int = 1) -> None:
        with _disable_current_modes():
            self._start(torch.zeros(_SIZE, dtype=torch.uint8, device=device))
            self.scale.fill_(scale)
            self.hysteresis_tracker.fill_(hysteresis)

    def _start(self, block: Tensor) -> None:
        self._view(block)
        self.first_steps = WeakTensorKeyDictionary()
        self.unwritten = WeakTensorKeyDictionary()
        self.applied_before = WeakTensorKeyDictionary()
        self._kept: list[object] = []

    def _view(self, block: Tensor) -> None:
        self.block = block
        self.scale = block[0:4].view(torch.float32)[0]
        self.growth_tracker = block[4:8].view(torch.int32)[0]
        self.hysteresis_tracker = block[8:12].view(torch.int32)[0]
        self.applied_steps = block[16:24].view(torch.int64)[0]
        self.skipped_steps = block[24:32].view(torch.int64)[0]
        self.skip = block[32:36].view(torch.int32)[0]
        self.past_end = block[52:56].view(torch.int32)[0]
        self.grad_norm = block[56:64].view(torch.float64)[0]

    def move_to(self, device: torch.device) -> None:
        """Continues on another device."""
        if self.block.device != device:
            with _disable_current_modes():
                self._view(self.block.to(device))

    def keep(self, *memory: object) -> None:
        """Keeps objects and the present ``block`` alive for as long as this state: a captured CUDA graph uses them."""
        self._kept.append((self.block, *memory))

    def read(self) -> tuple[float, int, int, float, int, int, bool]:
        """Every field in order, in one copy to the host."""
        with _disable_current_modes():
            content = bytes(self.block.tolist())
        scale, growth, hysteresis, applied, skipped, skip, norm = struct.unpack("=fii4xqqi20xd", content)
        return scale, growth, hysteresis, norm, applied, skipped, bool(skip)

    def last_update(self) -> Tensor:
        """A copy of the number of the last update, which is that of no other even where ``applied_steps`` stays."""
        past_end = self.past_end.to(torch.int64) & 0xFFFFFFFF
        return torch.where(self.applied_steps < LAST_STEP, self.applied_steps, LAST_STEP // 2 + 1 + past_end)

    def __getstate__(self) -> tuple[Tensor, list[Tensor]]:
        return self.block, list(self.unwritten)

    def __setstate__(self, state: tuple[Tensor, list[Tensor]]) -> None:
        block, unwritten = state
        # A copied or unpickled block no longer shares memory with views that were copied beside it.
        with _disable_current_modes():
            self._start(block.clone())
        self.unwritten.update((buffer, True) for buffer in unwritten)
