"""The FP32 masters of an optimizer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..distributed.sharding import local_part
from .new_state import NewState
from .parameters import LOW_PRECISION, MASTER_PARAM
from .plan import adopt_foreign_values
from .shared_memory import missing_bytes


def masters_in_use(
    groups: list[dict[str, Any]], state: dict[Tensor, dict[str, Any]]
) -> dict[Tensor, Tensor | None]:
    """Returns the master of each parameter in the optimizer's state, or None."""
    params = [param for group in groups for param in group["params"]]
    return {param: state.get(param, {}).get(MASTER_PARAM) for param in params}


@torch.no_grad()
def refresh_masters(masters: dict[Tensor, Tensor | None], new_state: NewState) -> None:
    """Resynchronises each master where its parameter is no longer its rounding.

    Args:
        masters: The result of `masters_in_use`.
        new_state: The record of unwritten state.

    Raises:
        RuntimeError: The storage of a parameter or master was resized. No master is changed then.
    """
    masters_with_memory = []
    for param, master in masters.items():
        if master is None or param.dtype not in LOW_PRECISION or master.shape != param.shape:
            continue
        if missing_bytes(param) or missing_bytes(master):
            raise RuntimeError(
                f"a parameter of shape {tuple(param.shape)} or its master has no memory: its storage was resized; "
                "restore the storage before the masters are refreshed"
            )
        masters_with_memory.append((master, param))
    for master, param in masters_with_memory:
        with new_state.resynchronised(master):
            adopt_foreign_values(local_part(master), local_part(param))
