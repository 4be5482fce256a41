"""The Triton backend: for GPUs where nothing was compiled, and no toolkit is needed."""

from __future__ import annotations

import functools
import importlib.util
import os
from typing import TYPE_CHECKING

import torch

from ...step.device_state import StepState
from ...step.plan import Plan

if TYPE_CHECKING:
    from .stepper import TritonStepper

# Triton then runs its kernels as Python on the CPU. It reads this when a kernel is defined.
IS_INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")
DEVICE_TYPE = "cpu" if IS_INTERPRETED else "cuda"


@functools.cache
def unavailable_because() -> str | None:
    """Why this backend cannot be used here; None when it can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; pip install triton"
    if IS_INTERPRETED:
        return None
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    try:
        import triton

        # Triton compiles its launcher for this machine when it is first used.
        triton.runtime.driver.active.utils  # noqa: B018
    except Exception as error:
        return f"triton cannot launch kernels here ({error}); it needs a C compiler"
    return None


def unusable_on(device: torch.device) -> str | None:
    """Returns why the kernels cannot run on a device."""
    if device.type == "cuda" and torch.version.cuda is not None:
        major, minor = torch.cuda.get_device_capability(device)
        if major < 7:
            return f"its kernels need a GPU of architecture 7.0 (Volta) or later, and {device} has {major}.{minor}"
    return None


def make_stepper(plan: Plan, step_state: StepState) -> TritonStepper:
    """Runs steps over a plan. Triton is imported here, and not before it is needed."""
    from .stepper import TritonStepper

    return TritonStepper(plan, step_state)
