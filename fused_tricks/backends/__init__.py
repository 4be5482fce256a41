"""The backends, one module each, and the choice between them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..step.device_state import StepState
from ..step.parameters import is_wrapper
from ..step.plan import Plan
from ..step.request import Outcome as Outcome
from ..step.request import StepRequest
from ..step.shared_memory import has_memory
from ..user_warning import warn_user
from . import cpu, cuda, reference, triton


class Stepper(Protocol):
    """The protocol of an object that runs steps over one plan.

    Attributes:
        is_async: True if `APPLIED` means "launched", not "done". The skip decision is then made on the device.
        reads_shards: True if the stepper reads the gradients of `DTensor`s itself, where `Entry.spec` is set.
    """

    is_async: bool
    reads_shards: bool

    def step(self, groups: list[dict[str, Any]], state: dict[Any, Any], request: StepRequest) -> int:
        """Checks the plan guard, scans, decides and updates.

        Args:
            groups: The optimizer's groups.
            state: The optimizer's state.
            request: The options of this step.

        Returns:
            An `Outcome`. `STALE` means that nothing was changed.
        """
        ...


class Backend(NamedTuple):
    """A backend: an implementation of the step.

    Attributes:
        stepper: Builds a stepper for a plan.
        unavailable_because: Returns the reason why the backend is unusable in this process; None if it is usable.
        device_type: The type of device that the backend supports; None for any type.
        unusable_on: Returns the reason why the backend is unusable on a device of that type; None if it is usable.
        is_automatic: True if `"auto"` may choose the backend.
    """

    stepper: Callable[[Plan, StepState], Stepper]
    unavailable_because: Callable[[], str | None]
    device_type: str | None
    unusable_on: Callable[[torch.device], str | None] = lambda device: None
    is_automatic: bool = True

    def missing_on(self, device: torch.device) -> str | None:
        """Returns the reason why the backend is unusable on a device; None if it is usable."""
        return self.unavailable_because() or self.unusable_on(device)


REFERENCE = "reference"

# Fastest first: "auto" chooses the first usable backend that supports the devices of the parameters.
BACKENDS = {
    "cuda": Backend(cuda.CudaStepper, cuda.unavailable_because, "cuda", cuda.unusable_on),
    "triton": Backend(
        triton.make_stepper,
        triton.unavailable_because,
        triton.DEVICE_TYPE,
        triton.unusable_on,
        is_automatic=not triton.IS_INTERPRETED,
    ),
    "cpu": Backend(cpu.CpuStepper, cpu.unavailable_because, "cpu"),
    REFERENCE: Backend(reference.ReferenceStepper, lambda: None, None),
}


def availability() -> dict[str, str | None]:
    """Returns, for each backend, the reason why it is unusable here; None if it is usable.

    A GPU backend is checked on the current GPU.
    """
    return {name: _missing_here(backend) for name, backend in BACKENDS.items()}


def _missing_here(backend: Backend) -> str | None:
    reason = backend.unavailable_because()
    if reason is not None or backend.device_type != "cuda":
        return reason
    try:
        return backend.unusable_on(torch.device("cuda", torch.cuda.current_device()))
    except RuntimeError as error:
        return f"torch cannot use the GPU ({str(error).splitlines()[0]})"


def check_backend(name: str) -> None:
    """Checks that `name` is `"auto"` or a backend that is usable here.

    Raises:
        TypeError: `name` is not a string.
        ValueError: `name` is not the name of a backend.
        RuntimeError: The backend is unusable here. The message contains the reason.
    """
    if not isinstance(name, str):
        raise TypeError(f"backend must be a string, got {type(name).__name__}")
    if name == "auto":
        return
    if name not in BACKENDS:
        raise ValueError(f"backend={name!r} is unknown; choose from 'auto', {', '.join(map(repr, BACKENDS))}")
    reason = BACKENDS[name].unavailable_because()
    if reason is not None:
        raise RuntimeError(f"backend={name!r} is not usable here: {reason}")


def choose_backend(name: str, named: list[tuple[str, Tensor]]) -> str:
    """Returns the name of the backend for the steps of an optimizer.

    The reference is also chosen for an optimizer without parameters, and if a parameter or gradient has no memory: on
    `meta`, or as a `FakeTensor`.

    Args:
        name: A backend, or `"auto"` for the fastest backend that can update the parameters.
        named: The parameters, with their names in errors.

    Raises:
        RuntimeError: The backend cannot update one of the parameters.
    """
    devices = {param.device for _, param in named}
    tensors = [(who, tensor) for who, param in named for tensor in (param, param.grad) if tensor is not None]
    # Tensors without memory have shapes only, which only torch operations can compute with.
    has_shapes_only = not all(has_memory(tensor) for _, tensor in tensors)
    wrappers = [(who, type(tensor)) for who, tensor in tensors if is_wrapper(tensor)]
    if has_shapes_only and name == "auto":
        return REFERENCE
    if name == "auto" or not named:
        return _fastest(devices, has_wrappers=bool(wrappers))
    backend = BACKENDS[name]
    if not _serves(backend, devices):
        home = next((device for device in devices if device.type == backend.device_type), None)
        who, device = next((who, param.device) for who, param in named if param.device != home)
        raise RuntimeError(
            f"backend={name!r} updates parameters on one device of type '{backend.device_type}', but the parameters "
            f"are on {', '.join(sorted(map(str, devices)))}: {who} is on {device}; use backend='auto', or move it"
        )
    if has_shapes_only:
        return REFERENCE
    if wrappers and backend.device_type is not None:
        who, kind = wrappers[0]
        raise RuntimeError(
            f"{who} or its gradient is of type {kind.__name__}, which keeps its elements in other tensors, and "
            f"backend={name!r} cannot read them; use backend='auto' or 'reference'"
        )
    for device in devices:
        reason = backend.missing_on(device)
        if reason is not None:
            raise RuntimeError(f"backend={name!r} is not usable on {device}: {reason}")
    return name


def _fastest(devices: set[torch.device], *, has_wrappers: bool) -> str:
    missing: list[str] = []
    for name, backend in BACKENDS.items():
        if not backend.is_automatic or not _serves(backend, devices):
            continue
        if has_wrappers and backend.device_type is not None:
            continue
        reason = None if backend.device_type is None else backend.missing_on(next(iter(devices)))
        if reason is None:
            if name == REFERENCE and missing:
                _warn_of_reference(*missing)
            return name
        missing.append(f"backend={name!r}: {reason}")
    return REFERENCE


@functools.cache
def _warn_of_reference(*reasons: str) -> None:
    warn_user(
        "FusedSGD uses the slow backend='reference' for these parameters, because the fast ones are not usable here: "
        + "; ".join(reasons)
    )


def _serves(backend: Backend, devices: set[torch.device]) -> bool:
    if backend.device_type is None:
        return True
    return len(devices) == 1 and all(device.type == backend.device_type for device in devices)
