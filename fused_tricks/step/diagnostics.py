"""Warnings about training mistakes that raise no error. Each warning is issued once per optimizer or schedule."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..backends.gpu import is_capturing
from ..loss_scale import DynamicLossScale
from ..user_warning import warn_user
from .device_state import StepReading, StepState, to_float32

if TYPE_CHECKING:
    from .plan import Plan

# Skipped steps in a row after which the "stuck" warning is issued.
STUCK_AFTER = 25
# Launched steps between two readings of a GPU's step state: a copy and an event cost several microseconds.
STEPS_PER_READING = 250
# Launched steps between the start of a reading and the first attempt to read it on the host.
STEPS_UNTIL_ARRIVAL = 10


class LateReading:
    """An asynchronous copy of a step state's block to the host.

    Args:
        block: The block, on a CUDA device or on the CPU. A copy on the CPU is complete at once.
    """

    def __init__(self, block: Tensor) -> None:
        is_cuda = block.device.type == "cuda"
        self._copy = torch.empty(block.shape, dtype=block.dtype, device="cpu", pin_memory=is_cuda)
        self._copy.copy_(block, non_blocking=True)
        self._event: torch.cuda.Event | None = None
        if is_cuda:
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(block.device))

    def read(self) -> StepReading | None:
        """Returns the fields, or None while the copy is in progress. Never waits."""
        if self._event is not None and not self._event.query():
            return None
        return StepReading.of(self._copy)


class StepDiagnostics:
    """The checks of an optimizer's steps for mistakes that raise no error.

    Args:
        loss_scale: The optimizer's loss scaling.
        step_state: The optimizer's state on the device.
    """

    def __init__(self, loss_scale: float | DynamicLossScale | None, step_state: StepState) -> None:
        self._loss_scale = loss_scale
        self._step_state = step_state
        self._reports: set[str] = set()
        self._launches_left = STUCK_AFTER
        self._reading: LateReading | None = None
        # skipped_in_a_row at the first reading with the scale at its floor; 1 without a dynamic scale.
        self._at_floor_since: int | None = None

    def before_update(self, plan: Plan, is_scaled_by_grad_scaler: bool, is_partitioned: bool) -> None:
        """Warns if FP16 gradients have no loss scale, and if the loss was not scaled or no gradient exists with one.

        Args:
            plan: The plan of the step.
            is_scaled_by_grad_scaler: True if a `GradScaler` calls the step.
            is_partitioned: True if another process may scale the loss.
        """
        grads = [entry.param.grad for entry in plan.entries if entry.live and entry.param.grad is not None]
        if self._loss_scale is None:
            if not is_scaled_by_grad_scaler and any(grad.dtype == torch.float16 for grad in grads):
                self._report(
                    "unscaled",
                    "FusedSGD updates from float16 gradients without a loss scale, so that small gradients are "
                    "rounded to zero; use loss_scale='dynamic' and optimizer.scale(loss).backward(), or a GradScaler; "
                    "loss_scale=1.0 states that no scaling is wanted",
                )
        elif not grads:
            trained = [entry.param for entry in plan.entries if entry.param.requires_grad]
            if not is_partitioned and any(param.numel() for param in trained):
                self._report(
                    "no gradient",
                    "no parameter of the optimizer has a gradient, so optimizer.step() updates nothing; call "
                    "zero_grad() after step() or before the forward pass, and give the optimizer the parameters of the "
                    "model that computes the loss",
                )
        elif self._loss_scale != 1.0 and not self._step_state.scale_was_read and not is_partitioned:
            self._report(
                "scale is not called",
                "optimizer.step() divides the gradients by the loss scale, but optimizer.scale() has never been "
                "called; call optimizer.scale(loss).backward() instead of loss.backward(); code that scales the loss "
                "itself reads the factor from optimizer.stats().scale or optimizer.loss_scale",
            )

    def after_skip(self) -> None:
        """Checks the state after a step that the host has seen skipped."""
        self._examine(self._step_state.read())

    def after_launch(self) -> None:
        """Checks the state after a launched step, once in about `STEPS_PER_READING` steps, without waiting."""
        self._launches_left -= 1
        if self._launches_left:
            return
        block = self._step_state.block
        if self._reading is None:
            self._launches_left = STEPS_PER_READING
            if block.device.type in ("cpu", "cuda") and not is_capturing(block.device):
                self._reading = LateReading(block)
                self._launches_left = STEPS_UNTIL_ARRIVAL
            return
        fields = None if is_capturing(block.device) else self._reading.read()
        if fields is None:
            self._launches_left = STEPS_UNTIL_ARRIVAL
            return
        self._reading = None
        self._launches_left = STEPS_PER_READING - STEPS_UNTIL_ARRIVAL
        self._examine(fields)

    def _examine(self, fields: StepReading) -> None:
        rules = self._loss_scale if isinstance(self._loss_scale, DynamicLossScale) else None
        floor = math.inf if rules is None else to_float32(rules.min_scale)
        in_a_row = fields.skipped_in_a_row
        if in_a_row == 0 or fields.scale > floor:
            self._at_floor_since = None
            return
        if self._at_floor_since is None or self._at_floor_since > in_a_row:
            self._at_floor_since = 1 if rules is None else in_a_row
        if in_a_row - self._at_floor_since + 1 < STUCK_AFTER:
            return
        scale = ""
        if rules is not None:
            scale = f" with the loss scale at its floor of {fields.scale:g}"
        elif self._loss_scale is not None:
            scale = f" with the static loss scale of {fields.scale:g}"
        self._report(
            "stuck",
            f"the last {in_a_row} optimizer steps were skipped{scale}, because a gradient was inf or NaN each time: "
            "nothing is being trained; optimizer.find_overflow(), called before zero_grad(), names the parameters; "
            "look for inf and NaN in the weights, the inputs and the loss"
            + (", or lower loss_scale" if scale and rules is None else ""),
        )

    def _report(self, kind: str, message: str) -> None:
        if kind not in self._reports:
            self._reports.add(kind)
            warn_user(message)
