"""What the backends for GPUs have in common: the device decides about a step, and the host hears of it later."""

from __future__ import annotations

import torch
from torch import Tensor

from ..plan import Entry, Plan
from ..step_state import StepState


class GpuStepper:
    """Keeps what tells whether an update has written a new master or buffer."""

    answers_late = True

    def __init__(self, plan: Plan, step_state: StepState) -> None:
        self._step_state = step_state
        self._applied_before = step_state.applied_steps.clone()
        self._device = step_state.block.device
        written = torch.zeros((), dtype=torch.int64, device=self._device)
        self._first_steps = [_first_step(entry, step_state, written) for entry in plan.entries]

    def is_written(self, entry: Entry) -> bool:
        # An empty buffer has no block that would note its first update.
        if entry.buffer in self._step_state.first_steps and entry.source.numel() > 0:
            return bool(self._step_state.first_steps[entry.buffer] >= 0)
        return bool(self._step_state.applied_steps > self._applied_before)

    def _on_device(self, scalar: Tensor | None) -> Tensor | None:
        return None if scalar is None else scalar.to(self._device, torch.float32, non_blocking=True)


def _first_step(entry: Entry, step_state: StepState, written: Tensor) -> Tensor | None:
    """Where the kernels note the number of the update that first writes an entry's buffer."""
    if entry.buffer is None:
        return None
    if entry.first and entry.buffer not in step_state.first_steps:
        step_state.first_steps[entry.buffer] = torch.full(
            (), -1, dtype=torch.int64, device=entry.buffer.device
        )
    first_step: Tensor = step_state.first_steps.get(entry.buffer, written)
    return first_step
