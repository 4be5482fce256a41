"""The search for the parameters whose gradients are not finite."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .._torch import is_wrapper_subclass
from ..distributed.sharding import local_part
from .ordinary_tensors import outside_all_modes
from .parameters import SUPPORTED, own_names
from .shared_memory import has_memory, missing_bytes


def overflowing_parameters(groups: list[dict[str, Any]]) -> list[str]:
    """Returns the names of the parameters whose gradients have an infinite or NaN element on this process.

    Copies to the host once for each device, and once for each gradient that wraps other tensors.
    """
    named = own_names(groups)
    largest: dict[torch.device, dict[int, Tensor]] = {}
    overflowing: set[int] = set()
    with outside_all_modes():
        for index, (_, param, _) in enumerate(named):
            grad = param.grad
            if grad is None or not has_memory(grad) or missing_bytes(grad):
                continue
            local = local_part(grad)
            if local.numel():
                largest.setdefault(local.device, {})[index] = _largest_magnitude(local)
        for magnitudes in largest.values():
            # torch.stack promotes to the widest dtype, which keeps finite values finite.
            are_finite = torch.stack(list(magnitudes.values())).isfinite().tolist()
            overflowing.update(
                index for index, is_finite in zip(magnitudes, are_finite, strict=True) if not is_finite
            )
    return [name for index, (name, _, _) in enumerate(named) if index in overflowing]


def _largest_magnitude(grad: Tensor) -> Tensor:
    """Returns the largest magnitude of a gradient's elements as a tensor of shape (); NaN if an element is NaN."""
    dense = grad if grad.layout == torch.strided else grad.to_dense()
    if dense.dtype not in SUPPORTED and not dense.is_complex():
        dense = dense.float()
    # Unlike isfinite(), the norm creates no tensor of the gradient's size.
    largest: Tensor = torch.linalg.vector_norm(dense, math.inf)
    if is_wrapper_subclass(largest):
        return torch.tensor(largest.item(), dtype=torch.float64, device=grad.device)
    return largest
