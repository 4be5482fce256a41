"""The part that this process has of a tensor that is distributed over several (a `DTensor`, as FSDP2 makes them)."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor

from .._torch import ZERO_REDUNDANCY_OPTIMIZER, is_called_by, is_flattened_by_fsdp1, is_wrapper_subclass

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_distributed(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether a tensor is a `DTensor`."""
    # Whoever made one has imported the module; to do so here would take most of the time of `import fused_tricks`.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def is_partitioning() -> bool:
    """True while `ZeroRedundancyOptimizer` makes or extends the optimizer of one process.

    Its groups state every option, also those that their author left to the optimizer, and have only a part of the
    parameters: what they seem to say of biases and norms differs between processes.
    """
    return is_called_by(ZERO_REDUNDANCY_OPTIMIZER)


def check_flattened(named: Iterable[tuple[str, Tensor]], group: dict[str, Any], decides_alone: bool) -> None:
    """Refuses what would go wrong on parameters that FSDP1 (`FullyShardedDataParallel`) has flattened and divided.

    Args:
        named: What errors call each parameter of a group, and the parameter.
        group: The group's options.
        decides_alone: Whether this process would skip steps, or clip, by its own part of the gradients.

    Raises:
        ValueError: Weights would not be decayed, because flattened they look like biases; or the processes would not
            agree.
    """
    for name, param in named:
        if not is_flattened_by_fsdp1(param):
            continue
        if not group["bias_decay"] and group["weight_decay"] != 0:
            raise ValueError(
                f"{name} was flattened by FSDP1, after which nothing tells weights from biases; use fully_shard "
                "(FSDP2), or bias_decay=True to decay all"
            )
        if decides_alone:
            raise ValueError(
                f"{name} was divided by FSDP1, and each process would skip or clip by its own part of the gradient; "
                "use fully_shard (FSDP2), or pass the process group that divides it as partition_group"
            )


def local_part(tensor: Tensor) -> Tensor:
    """This process's part of a `DTensor`, which shares its memory; any other tensor itself.

    To be called under `torch.no_grad()`, or the part is one for autograd.
    """
    if is_distributed(tensor):
        local: Any = tensor.to_local()
        # Its communication may not have finished.
        is_pending = is_wrapper_subclass(local) and hasattr(local, "wait")
        finished: Tensor = local.wait() if is_pending else local
        return finished
    return tensor


def placed_like(value: Tensor, param: Tensor) -> Tensor:
    """`value` with its elements on the same processes as the parameter's.

    Where they are elsewhere every process of the parameter's mesh has to call this. A plain tensor is the whole value,
    the same on every process.
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
    """The tensor of which `local` is this process's part, where `param` is a `DTensor`; else `local` itself."""
    if not is_distributed(param):
        return local
    from torch.distributed.tensor import DTensor

    stride = param.stride()
    if local.stride() != local_part(param).stride():
        stride = torch.empty(param.shape, device="meta").stride()
    return DTensor.from_local(
        local, param.device_mesh, param.placements, run_check=False, shape=param.shape, stride=stride
    )
