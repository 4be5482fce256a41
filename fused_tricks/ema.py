"""The averages of a model's weights that the optimizer keeps: export, and evaluation with them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .distributed.sharding import local_part, placed_like
from .optimizer import FusedSGD
from .step.model_weights import check_model, check_trains, register_shards, with_weights
from .step.ordinary_tensors import outside_inference_mode
from .step.parameters import EMA_PARAM, LOW_PRECISION, is_in_use


@outside_inference_mode()
def ema_state_dict(model: nn.Module, optimizer: FusedSGD) -> dict[str, Any]:
    """Returns `model.state_dict()` with the averages of the weights, in full precision.

    Keys, order and metadata are those of `model.state_dict()`. A parameter with `ema_decay` is replaced by its average,
    which is FP32 (FP64 for an FP64 parameter). Until the first update of a parameter, the average is the parameter
    itself. Parameters without `ema_decay` and buffers keep their values; FP16 and BF16 are converted to FP32. All
    tensors are copies. Synchronises with the device.

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
        if average is not None:
            return placed_like(average.detach(), tensor).clone()
        value = tensor.detach().clone()
        return value.float() if value.dtype in LOW_PRECISION else value

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

    Args:
        model: The model.
        optimizer: The optimizer of the model's parameters, with `ema_decay` in at least one group.

    Raises:
        RuntimeError: The contexts of one optimizer are nested. Inside, `optimizer.step`, `refresh_masters`,
            `fp32_state_dict` and `load_fp32_state_dict` raise as well.
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
        rounded = [(local_part(param), local_part(placed_like(a, param))) for param, a in averages.items()]
        former = [(param, param.detach().clone()) for param, _ in rounded]
    optimizer._lend_weights()
    try:
        _write(rounded)
        yield
    finally:
        _write(former)
        # A forward pass without a backward pass leaves the gathered averages in place.
        register_shards(model)
        optimizer._take_weights_back()


@outside_inference_mode()
def _write(values: list[tuple[Tensor, Tensor]]) -> None:
    for param, value in values:
        param.detach().copy_(value)


def _averages(optimizer: FusedSGD) -> dict[Tensor, Tensor]:
    """Returns the averages that an update has written, by parameter.

    Raises:
        ValueError: The optimizer has no average, and no group with `ema_decay`.
    """
    held = {param: own[EMA_PARAM] for param, own in optimizer.state.items() if own.get(EMA_PARAM) is not None}
    if not held and not any(is_in_use(EMA_PARAM, group) for group in optimizer.param_groups):
        raise ValueError(
            "optimizer has no average of the weights; set ema_decay, as in FusedSGD(..., ema_decay=0.999)"
        )
    with optimizer._lock:
        unwritten = optimizer._unwritten()
    return {param: average for param, average in held.items() if id(average) not in unwritten}
