"""The averages of a model's weights that the optimizer keeps: export, and evaluation with them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .distributed.sharding import local_part, placed_like
from .optimizer import FusedSGD
from .step.model_weights import (
    check_model,
    check_trains,
    full_precision,
    register_shards,
    with_weights,
)
from .step.ordinary_tensors import outside_inference_mode
from .step.parameters import EMA_PARAM, check_state, is_in_use, named_parameters, state_dtype
from .step.shared_memory import missing_bytes


@outside_inference_mode()
def ema_state_dict(model: nn.Module, optimizer: FusedSGD) -> dict[str, Any]:
    """Returns `model.state_dict()` with the averages of the weights, in full precision.

    Keys, order and metadata are those of `model.state_dict()`. A parameter with `ema_decay` is replaced by its average,
    which is FP32 (FP64 for an FP64 parameter). Until the first update of a parameter, the average is the parameter
    itself. All other parameters and buffers are those of `fp32_state_dict`. All tensors are copies. Synchronises with
    the device.

    Args:
        model: The model, on any device.
        optimizer: The optimizer of the model's parameters, with `ema_decay` in at least one group.

    Returns:
        The state dict. `load_state_dict` of the same model in FP32 loads it.

    Raises:
        RuntimeError: The call is inside `ema_weights` of this optimizer.
        TypeError: `model` is not a module, or `optimizer` is not a `FusedSGD`.
        ValueError: `optimizer` has no parameter of `model` or no average, or a parameter of a lazy module has no shape
            yet.

    Source: `torch.optim.swa_utils.AveragedModel`, whose module has the same averages of FP32 weights.

    Example:
        ```python
        import fused_tricks as ft
        import torch

        model = ft.cast_model(torch.nn.Linear(4, 2), torch.bfloat16)
        optimizer = ft.FusedSGD(model.parameters(), lr=0.1, ema_decay=0.999)
        model(torch.randn(8, 4)).square().mean().backward()
        optimizer.step()
        average = torch.nn.Linear(4, 2)
        average.load_state_dict(ft.ema_state_dict(model, optimizer))
        ```
    """
    check_model(model, optimizer)
    averages = _averages(optimizer)

    def value_of(tensor: Tensor, own_state: dict[str, Any]) -> Tensor:
        average = averages.get(tensor)
        if average is None:
            return full_precision(tensor, own_state)
        return placed_like(average.detach(), tensor).to(state_dtype(tensor), copy=True)

    with torch.no_grad(), with_weights(model, optimizer, value_of):
        state: dict[str, Any] = model.state_dict()
    return state


@contextmanager
def ema_weights(model: nn.Module, optimizer: FusedSGD) -> Iterator[None]:
    """Returns a context in which the model has the averages in place of its weights, for an evaluation.

    Each parameter gets its average, rounded to its own dtype, in place. After the context, also after an exception,
    each parameter has its former bits again, and the optimizer continues as if nothing had happened. Masters and all
    other state do not change. Parameters without an average and buffers keep their values. The context requires memory
    for one copy of the averaged parameters. The next step builds a new plan.

    The writes invalidate a graph of autograd: call `backward` before the context, not after it. Save checkpoints
    outside the context, because `model.state_dict()` has the rounded averages inside.

    Args:
        model: The model.
        optimizer: The optimizer of the model's parameters, with `ema_decay` in at least one group.

    Raises:
        RuntimeError: The contexts of one optimizer are nested. Inside, a step, `refresh_masters`, `state_dict` and
            copies of the optimizer raise as well, and so do `fp32_state_dict`, `load_fp32_state_dict` and
            `ema_state_dict`.
        TypeError: `model` is not a module, or `optimizer` is not a `FusedSGD`.
        ValueError: `optimizer` has no parameter of `model`, or no average.

    Source: the evaluation of `torch.optim.swa_utils.AveragedModel`, without a second model.

    Example:
        ```python
        import fused_tricks as ft
        import torch

        model = ft.cast_model(torch.nn.Linear(4, 2), torch.bfloat16)
        optimizer = ft.FusedSGD(model.parameters(), lr=0.1, ema_decay=0.999)
        model(torch.randn(8, 4)).square().mean().backward()
        optimizer.step()
        with ft.ema_weights(model, optimizer), torch.no_grad():
            outputs = model(torch.randn(8, 4))
        ```
    """
    with outside_inference_mode():
        check_model(model, optimizer)
        check_trains(optimizer, model)
        averages = _averages(optimizer)
        averages = {
            param: averages[param] for param in dict.fromkeys(model.parameters()) if param in averages
        }
        swaps = [_Swap.of(param) for param in averages]
        rounded = [local_part(placed_like(average, param)) for param, average in averages.items()]
    optimizer._lend_weights()
    # Every callback runs, in the reverse order, even if another one raises.
    with ExitStack() as undone:
        undone.callback(optimizer._take_weights_back)
        # A forward pass without a backward pass leaves the gathered averages of FSDP2 in place.
        undone.callback(register_shards, model)
        for swap in swaps:
            undone.callback(swap.undo)
        with outside_inference_mode():
            for swap, value in zip(swaps, rounded, strict=True):
                swap.memory.copy_(value)
        yield


class _Swap(NamedTuple):
    """A parameter, the memory of its local part, and the former values of the memory."""

    param: Tensor
    memory: Tensor
    former: Tensor

    @classmethod
    def of(cls, param: Tensor) -> _Swap:
        memory = local_part(param).detach()
        return cls(param, memory, memory.clone())

    @outside_inference_mode()
    def undo(self) -> None:
        """Writes the former values, also if user code has freed the memory or given the parameter other memory."""
        if missing_bytes(self.memory):
            self.param.data = self.former
            return
        self.memory.copy_(self.former)
        local = local_part(self.param)
        if local is self.param and local.data_ptr() != self.memory.data_ptr():
            self.param.data = self.memory


def _averages(optimizer: FusedSGD) -> dict[Tensor, Tensor]:
    """Returns the averages that an update has written, by parameter.

    Raises:
        TypeError: The state of a parameter is malformed.
        ValueError: The optimizer has no average, and no group with `ema_decay`.
    """
    state = optimizer.state
    held: dict[Tensor, Tensor] = {}
    for name, param, _ in named_parameters(optimizer.param_groups):
        own = state.get(param, {})
        check_state(name, own)
        average = own.get(EMA_PARAM)
        if average is not None and average.shape == param.shape:
            held[param] = average
    if not held and not any(is_in_use(EMA_PARAM, group) for group in optimizer.param_groups):
        raise ValueError(
            "optimizer has no average of the weights; set ema_decay, as in FusedSGD(..., ema_decay=0.999), or in each "
            "group of optimizer.param_groups after a checkpoint without an average was loaded"
        )
    with optimizer._lock:
        unwritten = optimizer._unwritten()
    return {param: average for param, average in held.items() if id(average) not in unwritten}
