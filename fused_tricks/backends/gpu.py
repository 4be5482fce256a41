"""The common part of the GPU backends: the skip decision is made on the device, and the host reads it on demand."""

from __future__ import annotations

import contextlib
import weakref
from typing import Any

import torch
from torch import Tensor

from .._torch import current_raw_stream
from ..step.device_state import OFFSETS, StepState
from ..step.plan import Plan


def is_capturing(device: torch.device) -> bool:
    """Whether launches on the device's current stream go into a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def current_stream(device: torch.device) -> int:
    """The handle of the device's current stream; 0 for a device without streams."""
    return current_raw_stream(device.index) if device.type == "cuda" else 0


def record_stream(tensor: Tensor, stream: int) -> None:
    """Keeps the memory of a tensor, once freed, from being reused before the work now on `stream` is done."""
    # Not ExternalStream, which takes the default stream's handle, 0, for none and gives a stream of the pool.
    tensor.record_stream(torch.cuda.get_stream_from_external(stream, tensor.device))


class GpuStepper:
    """Holds the memory that the kernels read, for as long as a launch or a captured graph may read it.

    Raises:
        RuntimeError: A CUDA graph is being captured: what is set up once would be set up in every replay.
    """

    is_async = True

    def __init__(self, plan: Plan, step_state: StepState) -> None:
        self._step_state = step_state
        self._device = step_state.block.device
        if is_capturing(self._device):
            raise RuntimeError(
                "the optimizer must set up its memory, which cannot be captured in a CUDA graph; take a step with "
                "gradients of the same shapes and strides before the capture"
            )
        self._entries = plan.entries
        self._reduction = plan.reduction
        # Launches of another plan that overlapped by mistake may have left it wrong.
        step_state.block[OFFSETS["arrivals"] :][:4].zero_()
        stand_ins = [entry.source for entry in plan.entries if entry.is_copy]
        notes = [entry.first_update for entry in plan.entries if entry.first_update is not None]
        self._memory: list[Tensor] = [*notes, *stand_ins]
        if plan.reduction is not None:
            self._memory.append(plan.reduction.partials)
        self._streams = {current_stream(self._device)}
        finalizer = weakref.finalize(
            self, _release, self._memory, self._streams, current_stream(self._device)
        )
        finalizer.atexit = False

    def _empty(self, size: int, dtype: torch.dtype) -> Tensor:
        """Memory for the kernels, of at least one element."""
        memory = torch.empty(max(1, size), dtype=dtype, device=self._device)
        self._memory.append(memory)
        return memory

    def _keep(self, groups: list[dict[str, Any]], *tables: object) -> None:
        """Keeps alive what a captured step works on, since its graph may be replayed after the plan is replaced."""
        rates = [group["lr"] for group in groups]
        self._step_state.keep(self._entries, self._reduction, rates, *tables)

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
    """Tells the allocator, which knows `home` alone, which streams may still read what is about to be freed."""
    for stream in streams - {home}:
        for tensor in memory:
            record_stream(tensor, stream)
