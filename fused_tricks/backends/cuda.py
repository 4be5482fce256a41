"""The compiled CUDA backend."""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch

from ..extension import cuda_failure, load_extension, missing_because, reinstall
from ..step.device_state import StepState
from ..step.plan import Plan
from ..step.request import StepRequest
from .compiled import CompiledPlanGuard
from .gpu import GpuStepper, current_stream, is_capturing

if TYPE_CHECKING:
    from .. import _extension


# GPUs that have loaded the kernels. A failure is not cached, because a capture in progress may cause it.
_usable: set[torch.device] = set()


def unavailable_because() -> str | None:
    """Returns the reason why this backend is unusable here; None if it is usable."""
    reason = missing_because()
    if reason is not None:
        return reason
    if not hasattr(load_extension(), "CudaStep"):
        failure = cuda_failure() or ""
        if failure.startswith("FUSED_TRICKS_CUDA"):
            return f"the extension was built without CUDA ({failure}); without this variable, {reinstall()}"
        return f"the extension was built without CUDA; install a CUDA toolkit, and {reinstall()}"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    return None


def unusable_on(device: torch.device) -> str | None:
    """Returns the reason why the kernels cannot run on a GPU; None if they can.

    Reasons are an old driver, or a build without code for the GPU. The first call for a GPU loads every kernel, so that
    no kernel is loaded during the capture of a CUDA graph.
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
    """The stepper of the compiled CUDA backend. A step never waits for the device.

    A step has one launch, two with a scan, and three with a scan and a reduction over processes. Gradient addresses
    and groups that do not fit in a kernel's argument are written by additional launches, only if they have changed.
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
        """Returns the module that contains the kernels."""
        return load_extension()

    def step(self, groups: list[dict[str, Any]], state: dict[Any, Any], request: StepRequest) -> int:
        """Implements `Stepper.step`."""
        with self._device_guard():
            if is_capturing(self._device):
                return self._captured_step(groups, state, request)
            self._streams.add(current_stream(self._device))
            return self._run(groups, state, request)

    def _captured_step(
        self, groups: list[dict[str, Any]], state: dict[Any, Any], request: StepRequest
    ) -> int:
        # A captured step needs its own scratch memory: a replay writes it, and the host does not record that write.
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
