"""The compiled CUDA backend."""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..extension import load_extension, missing_because
from ..plan import Entry, Plan
from ..step_state import StepState
from .compiled import OUTCOMES, CompiledPlan
from .request import Outcome, StepRequest

if TYPE_CHECKING:
    from .. import _extension


def unavailable_because() -> str | None:
    """Why this backend cannot be used here; None when it can."""
    reason = missing_because()
    if reason is not None:
        return reason
    if not hasattr(load_extension(), "CudaStep"):
        return "the extension was built without CUDA; install a CUDA toolkit and reinstall fused_tricks"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    return None


class CudaStepper:
    """Runs steps over a plan in at most two kernel launches, and never waits for the device."""

    answers_late = True

    def __init__(self, plan: Plan, step_state: StepState) -> None:
        extension = self.extension()
        self._step_state = step_state
        self._applied_before = step_state.applied_steps.clone()
        written = torch.zeros((), dtype=torch.int64, device=step_state.block.device)
        first_steps = [_first_step(entry, step_state, written) for entry in plan.entries]
        self._plan = CompiledPlan(extension, plan, step_state, first_steps)
        self._step: _extension.CudaStep = extension.CudaStep(self._plan.handle)
        device = step_state.block.device
        self._memory = [
            _to_device(self._step.tensor_records(), device),
            _to_device(self._step.chunk_records(), device),
            torch.empty(max(1, self._step.scratch_size()), dtype=torch.uint8, device=device),
        ]
        self._step.set_memory(*self._memory)

    @staticmethod
    def extension() -> ModuleType:
        """The module with the kernels."""
        return load_extension()

    def is_written(self, entry: Entry) -> bool:
        # An empty buffer has no block that would note its first update.
        if entry.buffer in self._step_state.first_steps and entry.source.numel() > 0:
            return bool(self._step_state.first_steps[entry.buffer] >= 0)
        return bool(self._step_state.applied_steps > self._applied_before)

    def step(self, groups: list[dict[str, Any]], state: dict[Any, Any], request: StepRequest) -> Outcome:
        self._plan.watch(state)
        outcome = self._step.run(
            self._plan.handle,
            groups,
            state,
            request.unscales,
            self._on_device(request.grad_scale),
            self._on_device(request.found_inf),
            request.max_norm,
            request.scale_rule,
        )
        return OUTCOMES[outcome]

    def _on_device(self, scalar: Tensor | None) -> Tensor | None:
        return None if scalar is None else scalar.to(self._memory[0].device, torch.float32, non_blocking=True)


def _first_step(entry: Entry, step_state: StepState, written: Tensor) -> Tensor | None:
    if entry.buffer is None:
        return None
    if entry.first and entry.buffer not in step_state.first_steps:
        step_state.first_steps[entry.buffer] = torch.full(
            (), -1, dtype=torch.int64, device=entry.buffer.device
        )
    first_step: Tensor = step_state.first_steps.get(entry.buffer, written)
    return first_step


def _to_device(records: bytes, device: torch.device) -> Tensor:
    if not records:
        return torch.empty(1, dtype=torch.uint8, device=device)
    return torch.frombuffer(bytearray(records), dtype=torch.uint8).to(device)
