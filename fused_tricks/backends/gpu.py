"""What the backends for GPUs have in common: the device decides about a step, and the host hears of it later."""

from __future__ import annotations

import contextlib
import weakref
from typing import Any

import torch
from torch import Tensor

from ..ordinary_tensors import outside_all_modes
from ..parameters import MOMENTUM_BUFFER
from ..plan import Entry, Plan
from ..sharding import local_part
from ..step_state import OFFSETS, StepState


def is_capturing(device: torch.device) -> bool:
    """Whether launches on the device's current stream go into a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def current_stream(device: torch.device) -> int:
    """The handle of the device's current stream; 0 for a device without streams."""
    stream: int = torch._C._cuda_getCurrentRawStream(device.index) if device.type == "cuda" else 0
    return stream


def record_stream(tensor: Tensor, stream: int) -> None:
    """Keeps the memory of a tensor, once freed, from being reused before the work now on ``stream`` is done."""
    # Not ExternalStream, which takes the default stream's handle, 0, for none and gives a stream of the pool.
    tensor.record_stream(torch.cuda.get_stream_from_external(stream, tensor.device))


class GpuStepper:
    """Keeps what tells whether an update has written a new master or buffer, and the memory that the kernels read.

    Raises:
        RuntimeError: A CUDA graph is being captured: what is set up once would be set up in every replay.
    """

    answers_late = True

    def __init__(self, plan: Plan, step_state: StepState) -> None:
        self._step_state = step_state
        self._device = step_state.block.device
        if is_capturing(self._device):
            raise RuntimeError(
                "the optimizer must set up its memory, which cannot be captured in a CUDA graph; take a step with "
                "gradients of the same shapes and strides before the capture"
            )
        self._entries = plan.entries
        self._agreement = plan.agreement
        written = torch.zeros((), dtype=torch.int64, device=self._device)
        # Launches of another plan that overlapped by mistake may have left it wrong.
        step_state.block[OFFSETS["arrivals"] :][:4].zero_()
        applied = step_state.applied_steps.clone()
        for tensor in (tensor for entry in plan.new for tensor in entry.own_state().values()):
            step_state.applied_before.setdefault(tensor, applied)
        self._first_steps = [_first_step(entry, step_state, written) for entry in plan.entries]
        stand_ins = [entry.source for entry in plan.entries if entry.is_copy]
        self._memory: list[Tensor] = [written, *stand_ins]
        if plan.agreement is not None:
            self._memory.append(plan.agreement.verdict)
        self._streams = {current_stream(self._device)}
        finalizer = weakref.finalize(
            self, _release, self._memory, self._streams, current_stream(self._device)
        )
        finalizer.atexit = False

    def written_state(self, entry: Entry, has_momentum: bool) -> tuple[dict[str, Tensor], bool]:
        own = entry.own_state()
        written = {key: tensor for key, tensor in own.items() if self._is_written(key, tensor)}
        return written, len(written) < len(own)

    def _is_written(self, key: str, tensor: Tensor) -> bool:
        """Whether an update may have written a master or, exactly, has written a buffer."""
        # An empty buffer has no block that would note its first update.
        has_elements = local_part(tensor).numel() > 0
        if key == MOMENTUM_BUFFER and tensor in self._step_state.first_steps and has_elements:
            with outside_all_modes():
                return int(self._step_state.first_steps[tensor]) >= 0
        before = self._step_state.applied_before.get(tensor)
        with outside_all_modes():
            return before is None or self._step_state.read().applied_steps != int(before)

    def _empty(self, size: int, dtype: torch.dtype) -> Tensor:
        """Memory for the kernels, of at least one element."""
        memory = torch.empty(max(1, size), dtype=dtype, device=self._device)
        self._memory.append(memory)
        return memory

    def _keep(self, groups: list[dict[str, Any]], *tables: object) -> None:
        """Keeps alive what a captured step works on, since its graph may be replayed after the plan is replaced."""
        rates = [group["lr"] for group in groups]
        self._step_state.keep(self._entries, self._first_steps, self._agreement, rates, *tables)

    def _device_guard(self) -> contextlib.AbstractContextManager[Any]:
        """Makes the device current; afterwards the one before is, without a context on it where it has none yet."""
        if self._device.type != "cuda" or torch.cuda.current_device() == self._device.index:
            return contextlib.nullcontext()
        return torch.cuda.device(self._device)

    def _on_device(self, scalar: Tensor | None) -> Tensor | None:
        return (
            None
            if scalar is None
            else scalar.to(self._device, torch.float32, non_blocking=True).resolve_neg()
        )


def _release(memory: list[Tensor], streams: set[int], home: int) -> None:
    """Tells the allocator, which knows ``home`` alone, which streams may still read what is about to be freed."""
    for stream in streams - {home}:
        for tensor in memory:
            record_stream(tensor, stream)


def _first_step(entry: Entry, step_state: StepState, written: Tensor) -> Tensor | None:
    """Where the kernels note the number of the update that first writes an entry's buffer."""
    if entry.buffer is None:
        return None
    buffer = entry.distributed.get(MOMENTUM_BUFFER, entry.buffer)
    if entry.first and buffer not in step_state.first_steps:
        step_state.first_steps[buffer] = torch.full((), -1, dtype=torch.int64, device=buffer.device)
    first_step: Tensor = step_state.first_steps.get(buffer, written)
    return first_step
