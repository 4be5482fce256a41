"""The entry of one parameter in a plan."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .parameters import EMA_PARAM, MASTER_PARAM, MOMENTUM_BUFFER


@dataclass(eq=False)
class Entry:
    """One parameter of a plan.

    Attributes:
        group: The index of the parameter's group.
        param: The parameter, as listed in the group.
        live: True if the plan can update the parameter: the parameter had a gradient when the plan was made, or the
            former plan could update the parameter and its state is complete. Otherwise the entry has no stand-in and
            no state.
        source: The tensor whose memory and `.grad` the kernels use: the parameter, or a stand-in. A stand-in is an
            alias of the local part of a `DTensor` or of a parameter whose gradient has other strides, or a contiguous
            copy of a parameter that has gaps.
        local: The local part of the parameter.
        spec: The `DTensorSpec` of a parameter whose local part and gradient a plan guard can read; else None.
        grad_dtype: The dtype of the parameter's gradients. A gradient of another dtype requires a new plan.
        is_copy: True if the stand-in has memory of its own.
        shard_class: The parameter's shard class in `StepReduction`.
        state: The parameter's tensors in the optimizer's state, by their keys there.
        local_state: The local parts of these tensors, with the strides of `source`.
        first_updates: By the keys of `state`: 0-dim INT64, the number of the update that first wrote the tensor; -1
            before that update. The backends write the number.
        identity: The address and version counters of a copied parameter when `master` was last synchronised with it.
        storage: A reference to the parameter's memory, so that other data cannot get the same address.
    """

    group: int
    param: Tensor
    live: bool
    source: Tensor
    local: Tensor
    spec: object = None
    grad_dtype: torch.dtype | None = None
    is_copy: bool = False
    shard_class: int = 0
    state: dict[str, Tensor] = field(default_factory=dict)
    local_state: dict[str, Tensor] = field(default_factory=dict)
    first_updates: dict[str, Tensor] = field(default_factory=dict)
    identity: tuple[int, ...] = ()
    storage: Tensor | None = None

    @property
    def master(self) -> Tensor | None:
        """The local part of the FP32 weights of an FP16 or BF16 parameter."""
        return self.local_state.get(MASTER_PARAM)

    @property
    def buffer(self) -> Tensor | None:
        """The local part of the momentum buffer, in the dtype of the arithmetic."""
        return self.local_state.get(MOMENTUM_BUFFER)

    @property
    def ema(self) -> Tensor | None:
        """The local part of the average of the weights, in the dtype of the arithmetic."""
        return self.local_state.get(EMA_PARAM)

    @property
    def is_staged(self) -> bool:
        """True if the kernels use a stand-in."""
        return self.source is not self.param

    @property
    def home(self) -> Tensor:
        """The tensor whose address and layout must stay the same: the local part, or a copy."""
        return self.source if self.is_copy else self.local

    @property
    def counted(self) -> tuple[Tensor, ...]:
        """The tensors whose version counters an update increments; none for a copy, as torch writes it back."""
        if self.is_copy or not self.live:
            return ()
        return (self.param,) if self.local is self.param else (self.param, self.local)
