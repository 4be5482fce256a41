"""Reading a saved optimizer state."""

from __future__ import annotations

import sys
from collections import defaultdict
from itertools import chain
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from .parameters import LOW_PRECISION, MASTER_PARAM, MOMENTUM_BUFFER, named_parameters, state_dtype
from .sharding import distributed_like, local_part, placed_like

# Written into every group of a state dict; not options of a group.
COUNTERS = ("applied_steps", "skipped_steps")
SCALE_KEYS = (*COUNTERS, "loss_scale", "growth_tracker", "hysteresis_tracker")


def is_asked_for_state() -> bool:
    """Whether the present step is none of training, but one that is to create the optimizer's state.

    ``torch.distributed.checkpoint`` takes it, with gradients of zero and ``lr=0``, when it finds no state. Only that it
    takes it sets it apart: a first step of training may look the same, and on one process of several alone.
    """
    module = sys.modules.get("torch.distributed.checkpoint.state_dict")
    if module is None:
        return False
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_code is not module._init_optim_state.__code__:
        frame = frame.f_back
    return frame is not None


def import_state(
    saved_state: dict[Any, Any], saved_groups: list[dict[str, Any]], groups: list[dict[str, Any]]
) -> defaultdict[Any, dict[str, Any]]:
    """Per-parameter state as a copy, in the type of the arithmetic, on the parameters' devices.

    Args:
        saved_state: ``state_dict["state"]``.
        saved_groups: ``state_dict["param_groups"]``, which list the keys of ``saved_state``.
        groups: The optimizer's groups.

    Raises:
        ValueError: Groups or shapes do not match.
    """
    if len(groups) != len(saved_groups):
        raise ValueError(
            f"loaded state dict has a different number of parameter groups: {len(saved_groups)}, not {len(groups)}"
        )
    if any(len(g["params"]) != len(s["params"]) for g, s in zip(groups, saved_groups, strict=True)):
        raise ValueError(
            "loaded state dict contains a parameter group that doesn't match the size of optimizer's group"
        )
    named = [(name, param) for name, param, _ in named_parameters(groups)]
    by_key = dict(zip(chain.from_iterable(s["params"] for s in saved_groups), named, strict=True))
    state: defaultdict[Any, dict[str, Any]] = defaultdict(dict)
    for key, value in saved_state.items():
        if key not in by_key:
            state[key] = value
            continue
        name, param = by_key[key]
        imported = {k: _import_value(name, param, k, v) for k, v in value.items()}
        state[param] = {k: v for k, v in imported.items() if v is not None}
    return state


def _import_value(name: str, param: Tensor, key: str, value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    if key == MASTER_PARAM and param.dtype not in LOW_PRECISION:
        return None
    if key not in (MASTER_PARAM, MOMENTUM_BUFFER):
        return value.to(param.device, copy=True)
    if value.shape != param.shape:
        raise ValueError(
            f"loaded state dict has a {key} of shape {tuple(value.shape)} for {name} of shape {tuple(param.shape)}"
        )
    local = local_part(placed_like(value, param))
    imported = torch.empty_like(local_part(param), dtype=state_dtype(param), requires_grad=False).copy_(local)
    return distributed_like(imported, param)
