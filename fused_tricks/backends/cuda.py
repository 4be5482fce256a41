"""The compiled CUDA backend."""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..extension import load_extension, missing_because
from ..plan import Plan
from ..step_state import StepState
from .compiled import OUTCOMES, CompiledPlan
from .gpu import GpuStepper
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


class CudaStepper(GpuStepper):
    """Runs steps over a plan in at most two kernel launches, and never waits for the device."""

    def __init__(self, plan: Plan, step_state: StepState) -> None:
        super().__init__(plan, step_state)
        extension = self.extension()
        self._plan = CompiledPlan(extension, plan, step_state, self._first_steps)
        self._step: _extension.CudaStep = extension.CudaStep(self._plan.handle)
        self._memory = [
            _to_device(self._step.tensor_records(), self._device),
            _to_device(self._step.chunk_records(), self._device),
            torch.empty(max(1, self._step.scratch_size()), dtype=torch.uint8, device=self._device),
        ]
        self._step.set_memory(*self._memory)

    @staticmethod
    def extension() -> ModuleType:
        """The module with the kernels."""
        return load_extension()

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


def _to_device(records: bytes, device: torch.device) -> Tensor:
    if not records:
        return torch.empty(1, dtype=torch.uint8, device=device)
    return torch.frombuffer(bytearray(records), dtype=torch.uint8).to(device)
