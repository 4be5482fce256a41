"""The Triton backend, for GPUs without compiled CUDA kernels and machines without a CUDA toolkit."""

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

# The interpreter runs kernels as Python on the CPU. Triton reads the variable when a kernel is defined.
IS_INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")
DEVICE_TYPE = "cpu" if IS_INTERPRETED else "cuda"


@functools.cache
def unavailable_because() -> str | None:
    """Returns the reason why this backend is unusable here; None if it is usable."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; pip install triton"
    if IS_INTERPRETED:
        return None
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    try:
        import triton

        # The first access compiles Triton's launcher, which fails without a C compiler.
        triton.runtime.driver.active.utils  # noqa: B018
    except Exception as error:
        return f"triton cannot launch kernels here ({error}); it requires a C compiler"
    return None


def unusable_on(device: torch.device) -> str | None:
    """Returns the reason why the kernels cannot run on a device; None if they can."""
    if device.type == "cuda" and torch.version.cuda is not None:
        major, minor = torch.cuda.get_device_capability(device)
        if major < 7:
            return f"the kernels require a GPU of architecture 7.0 (Volta) or later, and {device} has {major}.{minor}"
    return None


def make_stepper(plan: Plan, step_state: StepState) -> TritonStepper:
    """Builds a stepper. Imports Triton only now, because the import takes long."""
    from .stepper import TritonStepper

    return TritonStepper(plan, step_state)
