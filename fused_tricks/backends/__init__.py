"""How a plan is run: one module a backend, and the choice between them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

import torch

from ..plan import Plan
from ..step_state import StepState
from . import cpu, reference
from .request import Outcome, StepRequest


class Stepper(Protocol):
    """Runs steps over one plan."""

    def __init__(self, plan: Plan, step_state: StepState) -> None: ...

    def step(self, groups: list[dict[str, Any]], state: dict[Any, Any], request: StepRequest) -> Outcome:
        """Scan, decision and update; or nothing at all and ``STALE`` when the plan no longer holds."""
        ...


_STEPPERS: dict[str, type[Stepper]] = {"cpu": cpu.CpuStepper, "reference": reference.ReferenceStepper}


def availability() -> dict[str, str | None]:
    """Every backend, with ``None`` where it is usable here and otherwise the reason why it is not."""
    return {"cpu": cpu.unavailable_because(), "reference": None}


def check_backend(name: str) -> None:
    """Raises unless ``name`` is ``"auto"`` or a backend that is usable here.

    Raises:
        ValueError: There is no such backend.
        RuntimeError: It cannot be used here; the message says why.
    """
    if name == "auto":
        return
    reasons = availability()
    if name not in reasons:
        raise ValueError(f"backend={name!r} is unknown; choose from 'auto', {', '.join(map(repr, reasons))}")
    if reasons[name] is not None:
        raise RuntimeError(f"backend={name!r} is not usable here: {reasons[name]}")


def stepper_class(name: str, devices: Iterable[torch.device]) -> type[Stepper]:
    """The backend called ``name`` for parameters on ``devices``; ``"auto"`` takes the fastest that serves them.

    Raises:
        RuntimeError: The backend does not serve one of the devices.
    """
    others = [device for device in devices if device.type != "cpu"]
    if name == "auto":
        name = "cpu" if not others and availability()["cpu"] is None else "reference"
    if name == "cpu" and others:
        raise RuntimeError(f"backend='cpu' updates parameters on the CPU, and one is on {others[0]}; use 'auto'")
    return _STEPPERS[name]
