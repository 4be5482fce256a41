"""Conversion between an optimizer's state and a state dict."""

from __future__ import annotations

from collections import defaultdict
from copy import deepcopy
from itertools import chain
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from .._torch import is_called_by_distributed_checkpoint
from ..distributed.sharding import distributed_like, local_part, placed_like
from ..loss_scale import DynamicLossScale
from ..validation import check_numbers, check_range, check_readable, integer
from .device_lr import device_lr_of
from .device_state import StepState
from .parameters import (
    EMA_PARAM,
    LOW_PRECISION,
    MASTER_PARAM,
    MOMENTUM_BUFFER,
    STATE_TENSORS,
    named_parameters,
    state_dtype,
)
from .shared_memory import missing_bytes

# The keys of numbers in every group of a state dict; they are not options of a group. STATE_TENSORS in parameters.py
# has the keys of a parameter's tensors.
COUNTERS = ("applied_steps", "skipped_steps")
SCALE_KEYS = (*COUNTERS, "loss_scale", "growth_tracker", "hysteresis_tracker")
MOST_STEPS = 2**62
"""The largest step count after a load. A larger saved count is reduced to this value."""


def progress_of(step_state: StepState, *, with_scale: bool) -> dict[str, float]:
    """Returns the counters and, if `with_scale`, the loss scale and its trackers, by their keys in a saved group."""
    now = step_state.read()
    progress: dict[str, float] = {"applied_steps": now.applied_steps, "skipped_steps": now.skipped_steps}
    if with_scale:
        progress |= {
            "loss_scale": now.scale,
            "growth_tracker": now.growth_tracker,
            "hysteresis_tracker": now.hysteresis_tracker,
        }
    return progress


def restore_progress(
    saved: dict[str, Any], step_state: StepState, loss_scale: float | DynamicLossScale | None
) -> None:
    """Restores the numbers that `progress_of` returned.

    Raises:
        TypeError, ValueError: A number is outside its range. Nothing is changed then.
    """
    counters = {key: saved[key] for key in COUNTERS if key in saved}
    for key, value in counters.items():
        integer(key, value, 0, 2**63 - 1)
    if isinstance(loss_scale, DynamicLossScale) and "loss_scale" in saved:
        loss_scale.restore(
            saved["loss_scale"],
            saved.get("growth_tracker", 0),
            saved.get("hysteresis_tracker", loss_scale.hysteresis),
        )
    if "applied_steps" in counters:
        # The INT64 counters on the device must not wrap.
        step_state.applied_steps.fill_(min(counters["applied_steps"], MOST_STEPS))
        step_state.skipped_steps.fill_(min(counters.get("skipped_steps", 0), MOST_STEPS))
        step_state.skipped_in_a_row.fill_(0)


def finish_state_dict(
    packed: dict[str, Any],
    groups: list[dict[str, Any]],
    unwritten: list[Tensor],
    progress: dict[str, float],
) -> None:
    """Completes the result of `Optimizer.state_dict` in place.

    Each group gets `progress`. A learning rate that follows the applied steps is replaced by the rate of the next
    update. State without meaning is removed: the master of a parameter that is no longer FP16 or BF16, and state
    tensors that no update has written. `torch.distributed.checkpoint` requires the same keys at all times, so
    unwritten state is kept for its calls.
    """
    for group in packed["param_groups"]:
        rate = device_lr_of(group["lr"])
        if rate is not None:
            group["lr"] = rate.after(int(progress["applied_steps"]))
        group.update(progress)
    left_out = set() if is_called_by_distributed_checkpoint() else {id(tensor) for tensor in unwritten}
    params = [param for group in groups for param in group["params"]]
    for index, param in enumerate(params):
        own = packed["state"].get(index)
        if not isinstance(own, dict):
            continue
        kept = {
            key: value
            for key, value in own.items()
            if id(value) not in left_out and (key != MASTER_PARAM or param.dtype in LOW_PRECISION)
        }
        if kept or not own:
            packed["state"][index] = kept
        else:
            del packed["state"][index]
    # A plan adds empty entries beside others. Without others, torch.optim.SGD has no entry either.
    if left_out and all(isinstance(own, dict) and not own for own in packed["state"].values()):
        packed["state"].clear()


def never_updated(state: dict[Tensor, dict[str, Any]], progress: dict[str, Any]) -> list[Tensor]:
    """Returns the momentum buffers and averages of a loaded state that no update has written.

    Such tensors are in the files of `torch.distributed.checkpoint` only: buffers of zeros, and averages of NaN.
    """
    if not is_called_by_distributed_checkpoint():
        return []
    own_states = [own for own in state.values() if isinstance(own, dict)]
    averages = [own[EMA_PARAM] for own in own_states if isinstance(own.get(EMA_PARAM), Tensor)]
    found = [average for average in averages if local_part(average).isnan().all()]
    if progress.get("applied_steps") == 0:
        buffers = [own[MOMENTUM_BUFFER] for own in own_states if isinstance(own.get(MOMENTUM_BUFFER), Tensor)]
        found += [buffer for buffer in buffers if not local_part(buffer).any()]
    return found


def import_groups(
    state_dict: dict[str, Any], groups: list[dict[str, Any]], defaults: dict[str, Any]
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Returns new groups for the optimizer, and the saved numbers of `progress_of`.

    Args:
        state_dict: A saved state.
        groups: The optimizer's groups. The new groups have the parameters of these groups, and the options of these
            groups where the saved groups lack an option.
        defaults: The optimizer's default options.

    Raises:
        KeyError, TypeError, ValueError: The saved groups are malformed or do not fit.
    """
    saved_groups = state_dict["param_groups"]
    if not isinstance(saved_groups, list | tuple):
        raise TypeError(
            f"loaded state dict has param_groups of type {type(saved_groups).__name__}, not a list of dicts"
        )
    if len(groups) != len(saved_groups):
        raise ValueError(
            f"loaded state dict has a different number of parameter groups: {len(saved_groups)}, not {len(groups)}"
        )
    imported: list[dict[str, Any]] = []
    progress: dict[str, Any] = {}
    for index, (saved, current) in enumerate(zip(saved_groups, groups, strict=True)):
        where = f"group {index} of the loaded state dict"
        if not isinstance(saved, dict):
            raise TypeError(f"{where} must be a dict, got {type(saved).__name__}")
        keys = saved["params"]
        if isinstance(keys, list | tuple) and len({*keys}) != len(keys):
            raise ValueError(f"{where} lists a parameter twice: {keys}")
        if not isinstance(saved["params"], list | tuple) or len(saved["params"]) != len(current["params"]):
            raise ValueError(
                "loaded state dict contains a parameter group that doesn't match the size of optimizer's group"
            )
        check_readable(where, saved)
        group = deepcopy({key: value for key, value in saved.items() if key not in SCALE_KEYS})
        for key in defaults:
            group.setdefault(key, current[key])
        if "param_names" in current:
            group.setdefault("param_names", current["param_names"])
        group["params"] = current["params"]
        _check_names(where, group)
        check_numbers(group)
        check_range(group)
        initial_lr = group.get("initial_lr", 0.0)
        if not isinstance(initial_lr, Real | Tensor) or (
            isinstance(initial_lr, Tensor) and initial_lr.numel() != 1
        ):
            raise TypeError(
                f"{where} has an initial_lr of type {type(initial_lr).__name__}, not a number or tensor of one element"
            )
        imported.append(group)
        if index == 0:
            progress = {key: saved[key] for key in SCALE_KEYS if key in saved}
    return imported, progress


def _check_names(where: str, group: dict[str, Any]) -> None:
    if "param_names" not in group:
        return
    names, count = group["param_names"], len(group["params"])
    if (
        not isinstance(names, list | tuple)
        or len(names) != count
        or not all(isinstance(n, str) for n in names)
    ):
        raise ValueError(
            f"{where} has param_names that are not the names of its {count} parameters: give a list of {count} "
            "strings, or leave the key out"
        )


def import_state(
    saved_state: dict[Any, Any], saved_groups: list[dict[str, Any]], groups: list[dict[str, Any]]
) -> defaultdict[Any, dict[str, Any]]:
    """Returns a copy of the per-parameter state, in the dtype of the arithmetic, on the parameters' devices.

    Args:
        saved_state: `state_dict["state"]`.
        saved_groups: `state_dict["param_groups"]`. The groups list the keys of `saved_state`.
        groups: The optimizer's groups.

    Raises:
        TypeError, ValueError: The state of a parameter is malformed or does not fit. The message names the parameter.
    """
    if not isinstance(saved_state, dict):
        raise TypeError(f"loaded state dict has a state of type {type(saved_state).__name__}, not a dict")
    named = [(name, param) for name, param, _ in named_parameters(groups)]
    by_key = dict(zip(chain.from_iterable(s["params"] for s in saved_groups), named, strict=True))
    state: defaultdict[Any, dict[str, Any]] = defaultdict(dict)
    for key, value in saved_state.items():
        if key not in by_key:
            state[key] = value
            continue
        name, param = by_key[key]
        if not isinstance(value, dict):
            raise TypeError(
                f"loaded state dict has a {type(value).__name__} as the state of {name}, not a dict"
            )
        imported = {k: _import_value(name, param, k, v) for k, v in value.items()}
        state[param] = {k: v for k, v in imported.items() if v is not None}
    return state


def _import_value(name: str, param: Tensor, key: str, value: Any) -> Any:
    if isinstance(value, Tensor) and missing_bytes(value):
        raise ValueError(
            f"loaded state dict has a {key} for {name} whose memory was freed: its storage lacks "
            f"{missing_bytes(value)} bytes"
        )
    if key == MASTER_PARAM and param.dtype not in LOW_PRECISION:
        return None
    if key not in STATE_TENSORS:
        try:
            return value.to(param.device, copy=True) if isinstance(value, Tensor) else value
        except (RuntimeError, NotImplementedError) as error:
            raise ValueError(
                f"loaded state dict has a {key} for {name} that cannot be copied: {error}"
            ) from error
    # torch.distributed.checkpoint returns {} for state that is not in the file.
    if value is None or (isinstance(value, dict) and not value):
        return None
    if not isinstance(value, Tensor):
        raise TypeError(
            f"loaded state dict has a {key} of type {type(value).__name__} for {name}, not a tensor"
        )
    if value.is_nested or value.shape != param.shape:
        raise ValueError(
            f"loaded state dict has a {key} of shape {_shape(value)} for {name} of shape {tuple(param.shape)}"
        )
    if not value.dtype.is_floating_point or value.layout != torch.strided:
        raise ValueError(
            f"loaded state dict has a {key} of dtype {value.dtype} and layout {value.layout} for {name}, not a dense "
            "floating-point tensor"
        )
    if value.is_meta and not param.is_meta:
        raise ValueError(f"loaded state dict has a {key} without values, on the meta device, for {name}")
    local = local_part(placed_like(value, param))
    imported = torch.empty_like(local_part(param), dtype=state_dtype(param), requires_grad=False).copy_(local)
    return distributed_like(imported, param)


def _shape(value: Tensor) -> str:
    return "a nested tensor" if value.is_nested else str(tuple(value.shape))
