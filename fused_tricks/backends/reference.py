"""The executable specification of a step: torch operations on any device, one parameter after the other."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..distributed.found_inf_reduction import FOUND_INF, IN_DOUBLE, SQUARES
from ..loss_scale import ScaleRule
from ..step.device_lr import device_lr_of
from ..step.device_state import StepState, to_float32
from ..step.entry import Entry
from ..step.options import FLAGS, NUMBERS
from ..step.ordinary_tensors import outside_all_modes
from ..step.parameters import EMA_PARAM, MOMENTUM_BUFFER, STATE_TENSORS, is_in_use, state_dtype
from ..step.plan import Plan
from ..step.request import Outcome, StepRequest
from ..step.shared_memory import has_memory
from ..validation import as_float


class ReferenceStepper:
    """The stepper of one step. A second step over the same plan returns `STALE`, so every step has a new plan."""

    is_async = False
    reads_shards = False

    def __init__(self, plan: Plan, step_state: StepState) -> None:
        self._plan = plan
        self._step_state = step_state
        self._is_used = False

    @torch.no_grad()
    def step(self, groups: list[dict[str, Any]], state: dict[Any, Any], request: StepRequest) -> int:
        """Implements `Stepper.step`."""
        if self._is_used:
            return Outcome.STALE
        self._is_used = True
        active = list(self._active(groups))
        found, in_double, squares = (
            self._scan(request, [(entry, grad) for entry, grad, _ in active])
            if request.scans
            else (False, False, 0.0)
        )
        found = found or request.has_found
        # The step state has memory, which operations under a FakeTensorMode would not read or write.
        with outside_all_modes():
            inverse_scale, clip = self._factors(request, in_double, squares)
            self._record(request, found)
        if found:
            return Outcome.SKIPPED
        for entry, grad, group in active:
            is_first = {
                key: key in entry.first_updates and is_in_use(key, group) and self._note_update(entry, key)
                for key in STATE_TENSORS
            }
            _update(entry, grad, group, inverse_scale if request.unscales else None, clip, is_first)
            if entry.local is not entry.param and not entry.is_copy:
                # The operations have incremented the version counter of the local part only.
                torch.autograd.graph.increment_version(entry.param)
        return Outcome.APPLIED

    def _note_update(self, entry: Entry, key: str) -> bool:
        """Returns True if this update is the first that writes a state tensor, and notes a first update."""
        first_update = entry.first_updates[key]
        with outside_all_modes():
            is_first_update = int(first_update) < 0
            if is_first_update:
                first_update.copy_(self._step_state.applied_steps)
        return is_first_update

    def _active(self, groups: list[dict[str, Any]]) -> Iterator[tuple[Entry, Tensor, dict[str, Any]]]:
        applied = self._step_state.read().applied_steps
        listed = [
            numbers for group in groups for numbers in [_numbers(group, applied)] * len(group["params"])
        ]
        for entry, group in zip(self._plan.entries, listed, strict=True):
            grad = entry.source.grad
            if grad is None:
                continue
            if state_dtype(entry.source) == torch.float32 and _overflows_float32(group):
                raise ValueError("an option does not fit FP32, in which a parameter is updated")
            yield entry, grad, group

    def _scan(self, request: StepRequest, entries: list[tuple[Entry, Tensor]]) -> tuple[bool, bool, float]:
        """Scans the gradients.

        Returns:
            True if a gradient is not finite; True if a gradient is FP64; the sum of all squares if requested, else 0.
        """
        reduction = self._plan.reduction
        squares = [0.0] * (1 if reduction is None else reduction.shard_classes)
        found = in_double = False
        for entry, grad in entries:
            in_double = in_double or (grad.dtype == torch.float64 and grad.numel() > 0)
            if not has_memory(grad):
                continue
            found = found or not _is_finite(grad)
            if request.max_norm is not None:
                squares[entry.shard_class] += float(grad.double().square().sum())
        if reduction is None:
            return found, in_double, sum(squares)
        partials = reduction.partials
        partials[FOUND_INF], partials[IN_DOUBLE] = float(found), float(in_double)
        partials[SQUARES:] = torch.tensor(squares, dtype=torch.float64)
        reduction.all_reduce()
        reduced = partials.tolist()
        any_found, any_in_double, squares = reduced[FOUND_INF], reduced[IN_DOUBLE], reduced[SQUARES:]
        return any_found != 0, any_in_double != 0, sum(squares)

    def _factors(self, request: StepRequest, in_double: bool, squares: float) -> tuple[float, float | None]:
        if request.grad_scale is None:
            scale = self._step_state.scale.item()
        else:
            scale = float(request.grad_scale) if has_memory(request.grad_scale) else 1.0
        inverse_scale = to_float32(1.0 / scale if scale else math.inf) if request.unscales else 1.0
        if request.max_norm is None:
            return inverse_scale, None
        norm = math.sqrt(squares) * inverse_scale
        if in_double:
            ratio = float(request.max_norm) / (norm + 1e-6)
        else:
            # An FP64 sum or quotient of two FP32 numbers, rounded to FP32, equals the result of FP32 arithmetic.
            norm = to_float32(norm)
            ratio = to_float32(to_float32(request.max_norm) / to_float32(norm + to_float32(1e-6)))
        self._step_state.grad_norm.fill_(norm)
        return inverse_scale, min(1.0, ratio)

    def _record(self, request: StepRequest, found: bool) -> None:
        state = self._step_state
        state.skip.fill_(found)
        (state.skipped_steps if found else state.applied_steps).add_(1)
        state.skipped_in_a_row.fill_(min(state.read().skipped_in_a_row + 1, 2**31 - 1) if found else 0)
        if request.scale_rule is None:
            return
        now = state.read()
        scale, growth_tracker, hysteresis_tracker = _advance_scale(
            now.scale, now.growth_tracker, now.hysteresis_tracker, found, request.scale_rule
        )
        state.scale.fill_(scale)
        state.growth_tracker.fill_(growth_tracker)
        state.hysteresis_tracker.fill_(hysteresis_tracker)


def _advance_scale(
    scale: float,
    growth_tracker: int,
    hysteresis_tracker: int,
    found: bool,
    rule: ScaleRule,
) -> tuple[float, int, int]:
    if found:
        growth_tracker = 0
        hysteresis_tracker = max(0, hysteresis_tracker - 1)
        if hysteresis_tracker > 0:
            return scale, growth_tracker, hysteresis_tracker
        scale = to_float32(scale * rule.backoff_factor)
    else:
        hysteresis_tracker = rule.hysteresis
        growth_tracker += 1
        if growth_tracker >= rule.growth_interval:
            growth_tracker = 0
            grown = to_float32(scale * rule.growth_factor)
            scale = grown if math.isfinite(grown) else scale
    scale = min(max(scale, to_float32(rule.min_scale)), to_float32(rule.max_scale))
    return scale, growth_tracker, hysteresis_tracker


def _numbers(group: dict[str, Any], applied: int) -> dict[str, Any]:
    """Returns the options as Python numbers. Raises if an option is not a number, before anything is changed."""
    rate = device_lr_of(group["lr"])
    lr = group["lr"] if rate is None else rate.after(applied)
    options = {name: lr if name == "lr" else group[name] for name in NUMBERS}
    numbers: dict[str, Any] = {
        name: None if value is None and NUMBERS[name].takes_none else as_float(value)
        for name, value in options.items()
    }
    numbers |= {name: bool(group[name]) for name in FLAGS}
    if numbers["ema_decay"] is not None and numbers["ema_warmup"]:
        updates = applied + 1
        numbers["ema_decay"] = min(numbers["ema_decay"], (1 + updates) / (10 + updates))
    return numbers


def _overflows_float32(numbers: dict[str, Any]) -> bool:
    values = [numbers[name] for name in NUMBERS if numbers[name] is not None]
    return any(math.isfinite(value) and math.isinf(to_float32(value)) for value in values)


def _update(
    entry: Entry,
    grad: Tensor,
    group: dict[str, Any],
    inverse_scale: float | None,
    clip: float | None,
    is_first: dict[str, bool],
) -> None:
    weight = entry.source if entry.master is None else entry.master
    grad = grad.to(state_dtype(entry.source))
    if inverse_scale is not None:
        grad = grad * inverse_scale
    if clip is not None:
        grad = grad * clip
    if group["maximize"]:
        grad = -grad
    if group["weight_decay"] != 0 and (group["bias_decay"] or entry.param.dim() > 1):
        if group["decoupled_weight_decay"]:
            weight.mul_(1 - group["lr"] * group["weight_decay"])
        else:
            grad = grad.add(weight, alpha=group["weight_decay"])
    direction = grad
    if group["momentum"] != 0:
        assert entry.buffer is not None
        if is_first[MOMENTUM_BUFFER]:
            entry.buffer.copy_(grad)
        else:
            entry.buffer.mul_(group["momentum"]).add_(grad, alpha=1 - group["dampening"])
        direction = grad.add(entry.buffer, alpha=group["momentum"]) if group["nesterov"] else entry.buffer
    weight.add_(direction, alpha=-group["lr"])
    if entry.master is not None:
        entry.source.copy_(entry.master)
    if group["ema_decay"] is not None:
        assert entry.ema is not None
        if is_first[EMA_PARAM]:
            entry.ema.copy_(weight)
        else:
            entry.ema.lerp_(weight, 1 - group["ema_decay"])


def _is_finite(grad: Tensor) -> bool:
    return bool(torch.isfinite(grad).all())
