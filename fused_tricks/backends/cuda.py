"""The compiled CUDA backend."""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch

from ..extension import load_extension, missing_because
from ..step.device_state import StepState
from ..step.plan import Plan
from ..step.request import StepRequest
from .compiled import CompiledPlanGuard
from .gpu import GpuStepper, current_stream, is_capturing

if TYPE_CHECKING:
    from .. import _extension


# GPUs that have loaded the kernels. A refusal is not kept: a capture may be its reason.
_usable: set[torch.device] = set()


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


def unusable_on(device: torch.device) -> str | None:
    """Returns why the kernels cannot run on a GPU: its driver is too old, or the build has no code for it.

    The first call for a GPU loads every kernel into it, so that none is loaded while a CUDA graph is captured.
    """
    if device in _usable:
        return None
    with torch.cuda.device(device):
        reason: str = load_extension().cuda_unusable_because(torch.cuda.current_device())
    if reason:
        return reason
    _usable.add(device)
    return None


class CudaStepper(GpuStepper):
    """Runs steps over a plan in at most two kernel launches, and never waits for the device.

    What has no room in a kernel's argument is written by launches before, where it has changed.
    """

    def __init__(self, plan: Plan, step_state: StepState) -> None:
        super().__init__(plan, step_state)
        extension = self.extension()
        self._guard = CompiledPlanGuard(extension, plan, step_state, reads_lr=True)
        self._step: _extension.CudaStep = extension.CudaStep(self._guard.handle)
        self._tables = self._empty(self._step.table_size(), torch.uint8)
        self._scratch = self._empty(self._step.scratch_size(), torch.uint8)
        with self._device_guard():
            self._step.set_tables(self._guard.handle, self._tables)
        self._step.set_scratch(self._scratch)

    @staticmethod
    def extension() -> ModuleType:
        """The module with the kernels."""
        return load_extension()

    def step(self, groups: list[dict[str, Any]], state: dict[Any, Any], request: StepRequest) -> int:
        with self._device_guard():
            if is_capturing(self._device):
                return self._captured_step(groups, state, request)
            self._streams.add(current_stream(self._device))
            return self._run(groups, state, request)

    def _captured_step(
        self, groups: list[dict[str, Any]], state: dict[Any, Any], request: StepRequest
    ) -> int:
        # In memory of its own, or what a replay writes would be taken for what the last step wrote.
        scratch = torch.empty_like(self._scratch)
        self._keep(groups, self._tables, scratch)
        self._step.set_scratch(scratch)
        try:
            return self._run(groups, state, request)
        finally:
            self._step.set_scratch(self._scratch)

    def _run(self, groups: list[dict[str, Any]], state: dict[Any, Any], request: StepRequest) -> int:
        if request.found_inf is not None or request.grad_scale is not None:
            request = request._replace(
                grad_scale=self._on_device(request.grad_scale), found_inf=self._on_device(request.found_inf)
            )
        return self._step.run(self._guard.handle, groups, state, request)
