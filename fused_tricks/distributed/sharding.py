"""Conversion between a `DTensor`, as in FSDP2, and its local part; checks for FSDP1 and `ZeroRedundancyOptimizer`."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard

import torch
from torch import Tensor
from torch.nn import Parameter

from .._torch import (
    ZERO_REDUNDANCY_OPTIMIZER,
    is_called_by,
    is_flattened_by_fsdp1,
    is_wrapper_subclass,
    wrapped_by,
)

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

# These types override no method of Tensor.
PLAIN = (Tensor, Parameter)


def is_distributed(tensor: Tensor) -> TypeGuard[DTensor]:
    """True if a tensor is a `DTensor`."""
    return type(tensor) not in PLAIN and isinstance(tensor, _dtensor_type() or ())


def _dtensor_type() -> type[DTensor] | None:
    # A DTensor exists only after an import of the module. Importing it here would dominate `import fused_tricks`.
    module = sys.modules.get("torch.distributed.tensor")
    return None if module is None else module.DTensor


def is_partitioning() -> bool:
    """True while `ZeroRedundancyOptimizer` builds or extends the optimizer of one process.

    The groups of `ZeroRedundancyOptimizer` state every option, including options that user code left at their defaults.
    The groups have only a part of the parameters, so a group may consist of biases on one process only.
    """
    return is_called_by(ZERO_REDUNDANCY_OPTIMIZER)


def check_flattened(named: Iterable[tuple[str, Tensor]], group: dict[str, Any], decides_alone: bool) -> None:
    """Checks the options of a group for parameters that FSDP1 (`FullyShardedDataParallel`) has flattened.

    Args:
        named: The name for errors and the parameter, for each parameter of the group.
        group: The group's options.
        decides_alone: True if this process skips steps or clips by its own part of the gradients.

    Raises:
        ValueError: Weights would not decay, because a flattened weight has one dimension like a bias. Or the processes
            would decide differently.
    """
    for name, param in named:
        if not is_flattened_by_fsdp1(param):
            continue
        if not group["bias_decay"] and group["weight_decay"] != 0:
            raise ValueError(
                f"{name} was flattened by FSDP1, which makes weights look like biases; use fully_shard (FSDP2), or "
                "bias_decay=True to decay all parameters"
            )
        if decides_alone:
            raise ValueError(
                f"{name} was divided by FSDP1, and each process would skip or clip by its own part of the gradient; "
                "use fully_shard (FSDP2), or pass the process group of FSDP1 as partition_group"
            )


class Shard(NamedTuple):
    """The parts of a `DTensor` that a plan guard can read without Python code of torch.

    Attributes:
        local: The local part.
        spec: The `DTensorSpec`.
    """

    local: Tensor
    spec: object


def shard_of(param: Tensor) -> Shard | None:
    """Returns the parts of a `DTensor`; None for any other tensor, a subclass, or a pending local part."""
    if type(param) in PLAIN or type(param) is not _dtensor_type():
        return None
    shard = Shard(*wrapped_by(param))
    return None if is_wrapper_subclass(shard.local) else shard


def local_part(tensor: Tensor) -> Tensor:
    """Returns the local part of a `DTensor`, which shares the memory of the `DTensor`; any other tensor unchanged.

    Requires `torch.no_grad()`, because autograd would record the call.
    """
    if type(tensor) in PLAIN:
        return tensor
    shard = shard_of(tensor)
    if shard is not None:
        return shard.local
    if is_distributed(tensor):
        local: Any = tensor.to_local()
        # The communication of an asynchronous tensor may be incomplete.
        is_pending = is_wrapper_subclass(local) and hasattr(local, "wait")
        finished: Tensor = local.wait() if is_pending else local
        return finished
    return tensor


def is_shard_of(param: Tensor, local: Tensor, spec: object) -> bool:
    """True if `local` and `spec` are still the parts of a `DTensor`."""
    shard = shard_of(param)
    return shard is not None and shard.local is local and shard.spec is spec


def placed_like(value: Tensor, param: Tensor) -> Tensor:
    """Returns `value` with the placement of `param`.

    The call is a collective over the parameter's mesh if the placements differ. A plain tensor must be the whole value,
    equal on every process.
    """
    if not is_distributed(param):
        return value.full_tensor() if is_distributed(value) else value
    mesh, placements = param.device_mesh, param.placements
    if is_distributed(value):
        if value.device_mesh == mesh:
            return value if value.placements == placements else value.redistribute(mesh, placements)
        value = value.full_tensor()
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(param.device), mesh, placements, src_data_rank=None)


def distributed_like(local: Tensor, param: Tensor) -> Tensor:
    """Returns the `DTensor` like `param` whose local part is `local`; `local` itself if `param` is a plain tensor."""
    if not is_distributed(param):
        return local
    from torch.distributed.tensor import DTensor

    stride = param.stride()
    if local.stride() != local_part(param).stride():
        stride = torch.empty(param.shape, device="meta").stride()
    return DTensor.from_local(
        local, param.device_mesh, param.placements, run_check=False, shape=param.shape, stride=stride
    )
