"""The names of an optimizer's parameters in errors, and the checks before an update."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._torch import is_wrapper_subclass
from ..distributed.sharding import is_distributed, local_part
from .shared_memory import GRADIENT, PARAMETER, has_memory, missing_bytes, overlaps_itself

MASTER_PARAM = "master_param"
MOMENTUM_BUFFER = "momentum_buffer"
EMA_PARAM = "ema_param"
STATE_TENSORS = (MASTER_PARAM, MOMENTUM_BUFFER, EMA_PARAM)
"""The keys of a parameter's tensors in the optimizer's state, in the order of csrc/core/state_tensors.h."""
LOW_PRECISION = (torch.float16, torch.bfloat16)
GRAD_DTYPES = {
    torch.float16: (torch.float16, torch.float32),
    torch.bfloat16: (torch.bfloat16, torch.float32),
    torch.float32: (torch.float32, torch.float16, torch.bfloat16),
    torch.float64: (torch.float64,),
}
"""The dtypes of a gradient, by the dtype of its parameter."""
SUPPORTED = tuple(GRAD_DTYPES)


def is_in_use(key: str, group: dict[str, Any]) -> bool:
    """True if the options of a group switch a state tensor on. `uses` in csrc/core/group.h has the same conditions.

    The dtype of a parameter, not an option, determines whether the parameter has a master.
    """
    if key == MOMENTUM_BUFFER:
        return bool(group["momentum"] != 0)
    return key == MASTER_PARAM or group["ema_decay"] is not None


def own_names(groups: list[dict[str, Any]]) -> list[tuple[str, Tensor, int]]:
    """Returns the name, the parameter and the group's index, for every parameter.

    The name is the parameter's own name if the group has `param_names`, otherwise its position.
    """
    return [
        (
            group["param_names"][index]
            if "param_names" in group
            else f"parameter {index} of group {group_index}",
            param,
            group_index,
        )
        for group_index, group in enumerate(groups)
        for index, param in enumerate(group["params"])
    ]


def named_parameters(groups: list[dict[str, Any]]) -> list[tuple[str, Tensor, int]]:
    """Returns the name for errors, the parameter and the group's index, for every parameter."""
    return [
        (f"parameter '{name}'" if "param_names" in groups[group_index] else name, param, group_index)
        for name, param, group_index in own_names(groups)
    ]


def is_wrapper(tensor: Tensor) -> bool:
    """True if a tensor, or its local part, is a subclass that wraps other tensors. Kernels cannot read its elements."""
    return is_wrapper_subclass(local_part(tensor))


def state_dtype(param: Tensor) -> torch.dtype:
    """Returns the dtype of the arithmetic and of the state tensors: FP64 for an FP64 parameter, otherwise FP32."""
    return torch.float64 if param.dtype == torch.float64 else torch.float32


def check_state(name: str, state: Any) -> None:
    """Raises TypeError unless `state` is a valid entry of the optimizer's state for the parameter `name`."""
    if not isinstance(state, dict):
        raise TypeError(f"the state of {name} must be a dict, got {type(state).__name__}; delete the entry")
    for key in STATE_TENSORS:
        value = state.get(key)
        if value is not None and not isinstance(value, Tensor):
            raise TypeError(
                f"the {key} of {name} must be a tensor, got {type(value).__name__}; delete the entry, or put a tensor "
                "there"
            )


def check_update(
    name: str, param: Tensor, grad: Tensor, state: dict[str, Any], used: dict[str, Tensor | None]
) -> None:
    """Raises RuntimeError unless a parameter can be updated.

    Args:
        name: The name of the parameter in errors.
        param: The parameter.
        grad: The gradient of the parameter.
        state: The parameter's entry in the optimizer's state.
        used: The tensors of `state` that the update uses; None for a missing tensor.
    """
    for key, value in {PARAMETER: param, **used}.items():
        if value is not None and value.is_inference():
            owned = name if key == PARAMETER else f"the {key} of {name}"
            raise RuntimeError(
                f"{owned} was made under torch.inference_mode() and cannot be trained; make it outside, or clone() it "
                "outside"
            )
    if param.dtype not in SUPPORTED:
        raise RuntimeError(
            f"{name} has dtype {param.dtype}; FusedSGD updates float16, bfloat16, float32 and float64"
        )
    if grad.layout != torch.strided:
        raise RuntimeError(
            f"{name} has a gradient of layout {grad.layout}; FusedSGD requires dense gradients; build the layer with "
            "sparse=False, or use torch.optim.SGD for it"
        )
    if param.layout != torch.strided:
        raise RuntimeError(f"{name} has layout {param.layout}; FusedSGD requires dense parameters")
    if grad.dtype not in GRAD_DTYPES[param.dtype]:
        raise RuntimeError(
            f"{name} has dtype {param.dtype} and a gradient of dtype {grad.dtype}; cast the gradient to "
            + " or ".join(str(dtype) for dtype in GRAD_DTYPES[param.dtype])
        )
    if is_distributed(grad) != is_distributed(param):
        kinds = ["a DTensor" if is_distributed(tensor) else "a plain tensor" for tensor in (param, grad)]
        raise RuntimeError(
            f"{name} is {kinds[0]} and its gradient is {kinds[1]}; give the gradient the parameter's placement"
        )
    if grad.device != param.device:
        raise RuntimeError(
            f"{name} is on {param.device} and its gradient is on {grad.device}; move the gradient to {param.device}"
        )
    if grad.shape != param.shape:
        raise RuntimeError(
            f"{name} has shape {tuple(param.shape)} and a gradient of shape {tuple(grad.shape)}; give the gradient the "
            "parameter's shape"
        )
    if overlaps_itself(local_part(param)):
        raise RuntimeError(
            f"{name} has elements that share memory (it was expanded); clone() it before it is optimized"
        )
    for key in STATE_TENSORS:
        value = state.get(key)
        if value is not None and value.shape != param.shape:
            raise RuntimeError(
                f"{name} has shape {tuple(param.shape)} and a {key} of shape {tuple(value.shape)} in the optimizer's "
                "state; load the state that belongs to this model, or delete the entry"
            )
    for key, value in {PARAMETER: param, GRADIENT: grad, **used}.items():
        if value is not None:
            _check_memory(name if key == PARAMETER else f"the {key} of {name}", value, has_memory(param))


def _check_memory(name: str, tensor: Tensor, is_needed: bool) -> None:
    missing = missing_bytes(tensor)
    if missing:
        raise RuntimeError(
            f"{name} has no memory for its elements: its storage was resized and lacks {missing} bytes; restore it, or "
            "replace the tensor"
        )
    if is_needed and not has_memory(tensor):
        raise RuntimeError(
            f"{name} has no memory (it is a {type(tensor).__name__} on {tensor.device}), but its parameter has memory; "
            "replace the tensor"
        )
