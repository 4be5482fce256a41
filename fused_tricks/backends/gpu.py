"""The common part of the GPU backends, where the host reads the skip decision on demand only."""

from __future__ import annotations

import contextlib
import weakref
from typing import Any

import torch
from torch import Tensor

from .._torch import current_raw_stream
from ..step.device_state import StepState
from ..step.plan import Plan


def is_capturing(device: torch.device) -> bool:
    """True if `device` is a GPU and the current stream is capturing a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def current_stream(device: torch.device) -> int:
    """Returns the handle of the current stream of `device`; 0 for a device without streams."""
    return current_raw_stream(device.index) if device.type == "cuda" else 0


def record_stream(tensor: Tensor, stream: int) -> None:
    """Delays the reuse of a tensor's memory, once freed, until the current work on `stream` is done."""
    # ExternalStream treats 0, the handle of the default stream, as missing and returns another stream.
    tensor.record_stream(torch.cuda.get_stream_from_external(stream, tensor.device))


class GpuStepper:
    """The base class of the GPU steppers, which keeps the kernels' memory alive for launches and captured graphs.

    Raises:
        RuntimeError: A CUDA graph is being captured. Each replay would repeat the set-up of the tables.
    """

    is_async = True
    reads_shards = True

    def __init__(self, plan: Plan, step_state: StepState) -> None:
        self._step_state = step_state
        self._device = step_state.block.device
        if is_capturing(self._device):
            raise RuntimeError(
                "the optimizer must set up its memory, which a CUDA graph cannot capture; take a step with gradients "
                "of the same shapes and strides before the capture"
            )
        self._entries = plan.entries
        self._reduction = plan.reduction
        # Overlapping launches of another plan, a mistake of user code, may have left a wrong count.
        step_state.arrivals.zero_()
        stand_ins = [entry.source for entry in plan.entries if entry.is_copy]
        notes = [note for entry in plan.entries for note in entry.first_updates.values()]
        self._memory: list[Tensor] = [*notes, *stand_ins]
        if plan.reduction is not None:
            self._memory.append(plan.reduction.partials)
        self._streams = {current_stream(self._device)}
        finalizer = weakref.finalize(
            self, _release, self._memory, self._streams, current_stream(self._device)
        )
        finalizer.atexit = False

    def _empty(self, size: int, dtype: torch.dtype) -> Tensor:
        """Returns new memory for the kernels, of at least one element."""
        memory = torch.empty(max(1, size), dtype=dtype, device=self._device)
        self._memory.append(memory)
        return memory

    def _keep(self, groups: list[dict[str, Any]], *tables: object) -> None:
        """Keeps the memory of a captured step alive, because its graph may be replayed after the plan is replaced."""
        rates = [group["lr"] for group in groups]
        self._step_state.keep(self._entries, self._reduction, rates, *tables)

    def _device_guard(self) -> contextlib.AbstractContextManager[Any]:
        """Returns a context in which the device is current.

        The context restores the former device, and creates no CUDA context there.
        """
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
    """Records the streams that may still read `memory`, because the allocator records only `home`."""
    for stream in streams - {home}:
        for tensor in memory:
            record_stream(tensor, stream)
