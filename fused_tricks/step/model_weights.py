"""The parameters and buffers of a model, with other values in their place."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..distributed.sharding import local_part, placed_like
from ..optimizer import FusedSGD
from ..validation import check_module
from .masters import masters_in_use
from .parameters import LOW_PRECISION, MASTER_PARAM
from .plan import adopt_foreign_values
from .shared_memory import missing_bytes


def check_model(model: nn.Module, optimizer: FusedSGD) -> None:
    """Raises an error unless the weights of a model can be read with their optimizer.

    Raises:
        RuntimeError: The model has its averages in place of its weights (`ema_weights`).
        TypeError: `model` is not a module, or `optimizer` is not a `FusedSGD`.
        ValueError: The storage of a parameter or master was resized.
    """
    check_module(model)
    if not isinstance(optimizer, FusedSGD):
        raise TypeError(
            f"optimizer must be a FusedSGD, got {type(optimizer).__name__}; give the FusedSGD that updates the "
            "parameters, such as zero.optim of a ZeroRedundancyOptimizer"
        )
    optimizer._check_has_its_weights()
    masters = masters_in_use(optimizer.param_groups, optimizer.state)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(tensor):
            continue
        master = masters.get(tensor)
        if missing_bytes(tensor) or (isinstance(master, Tensor) and missing_bytes(master)):
            raise ValueError(f"{name} or its master has no memory: its storage was resized; restore it first")


@contextmanager
def with_weights(
    model: nn.Module, optimizer: FusedSGD, value_of: Callable[[Tensor, dict[str, Any]], Tensor]
) -> Iterator[dict[Tensor, Tensor]]:
    """Replaces the modules' parameters and buffers by copies, and yields the copies by the originals.

    New data in the same parameters would remove their autograd hooks, which DistributedDataParallel requires.

    Args:
        model: The model.
        optimizer: The optimizer.
        value_of: Returns the copy of a parameter or buffer with the given entry in the optimizer's state.

    Raises:
        ValueError: `optimizer` has no parameter of `model`, or a parameter of a lazy module has no shape yet.
    """
    check_trains(optimizer, model)
    state = optimizer.state
    places = list(_places(model))
    # In the same order in every process, because the redistribution of a sharded master is a collective.
    tensors = dict.fromkeys(tensor for _, _, tensor in places)
    copies = {tensor: value_of(tensor, state.get(tensor, {})) for tensor in tensors}
    try:
        for table, key, tensor in places:
            table[key] = copies[tensor]
        yield copies
    finally:
        for table, key, tensor in places:
            # The module may have replaced the copy.
            if table.get(key) is copies[tensor]:
                table[key] = tensor


def register_shards(model: nn.Module) -> None:
    """Has FSDP2 free its gathered parameters and register its shards as the modules' parameters."""
    # The hook of FSDP2 does that in this call.
    model.state_dict()


def check_trains(optimizer: FusedSGD, model: nn.Module) -> None:
    """Raises ValueError if the optimizer has no parameter of the model. Registers the shards of FSDP."""
    register_shards(model)
    if {param for group in optimizer.param_groups for param in group["params"]}.isdisjoint(
        model.parameters()
    ):
        raise ValueError("optimizer has no parameter of this model; give the optimizer that trains it")


def _places(model: nn.Module) -> Iterator[tuple[dict[str, Tensor | None], str, Tensor]]:
    """Yields every parameter and buffer of every module, after its dict and its key there."""
    for prefix, module in model.named_modules():
        for table in (module._parameters, module._buffers):
            for key, tensor in table.items():
                if is_lazy(tensor):
                    name = f"{prefix}.{key}" if prefix else key
                    raise ValueError(f"{name} has no shape yet; run a forward pass first")
                if tensor is not None:
                    yield table, key, tensor


@torch.no_grad()
def full_precision(tensor: Tensor, own_state: dict[str, Any]) -> Tensor:
    """Returns a copy of a parameter or buffer: its master if it has one, with the values of later writes by user code.

    Without a master, FP16 and BF16 tensors are converted to FP32.
    """
    if tensor.dtype not in LOW_PRECISION:
        return tensor.detach().clone()
    master = own_state.get(MASTER_PARAM) if isinstance(own_state, dict) else None
    if master is None or master.shape != tensor.shape:
        return tensor.detach().to(torch.float32)
    value = placed_like(master.detach(), tensor).to(tensor.device, torch.float32, copy=True)
    adopt_foreign_values(local_part(value), local_part(tensor))
    return value
