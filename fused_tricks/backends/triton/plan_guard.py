"""The plan guard in Python, for installations without the extension. csrc/python/plan_guard.cpp has the same checks.

The lists have one item for each parameter. C functions such as `map` build and compare the lists, because a Python loop
would take longer than the rest of the step.
"""

from __future__ import annotations

import bisect
from itertools import compress, repeat
from operator import attrgetter, is_, is_not
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...distributed.sharding import is_distributed, local_part
from ...step.parameters import MASTER_PARAM, STATE_TENSORS, is_in_use
from ...step.plan import Plan
from ...step.shared_memory import missing_bytes
from ...step.stand_ins import same_strides
from ...validation import check_range
from ..compiled import Gradients

_grad = attrgetter("grad")
_dtype = attrgetter("dtype")
_shape = attrgetter("shape")
_version = attrgetter("_version")


class _State(NamedTuple):
    """The items of `Optimizer.state` at the first step of the plan, and the tensors of the plan among them."""

    keys: list[Any]
    values: list[Any]
    dicts: list[dict[str, Any]]
    held: dict[str, list[Any]]
    tensors: list[Tensor]
    addresses: list[int]
    sharded: list[Tensor]
    local_parts: list[Tensor]


class _Layout(NamedTuple):
    """The arrangement of an entry's memory when the plan was made."""

    address: int
    strides: tuple[int, ...]
    dtype: torch.dtype
    shape: torch.Size
    device: int
    elements: int

    @classmethod
    def of(cls, home: Tensor) -> _Layout:
        return cls(
            home.data_ptr(),
            home.stride(),
            home.dtype,
            home.shape,
            home.get_device(),
            home.numel(),
        )


class PlanGuard:
    """The plan guard: compares groups, parameters, gradients and state with the plan."""

    def __init__(self, plan: Plan) -> None:
        entries = plan.entries
        self._entries = entries
        self._groups: list[list[Tensor]] = []
        for entry in entries:
            self._groups += [[] for _ in range(entry.group + 1 - len(self._groups))]
            self._groups[entry.group].append(entry.param)
        self._sources = [entry.source for entry in entries]
        self._layouts = {index: _Layout.of(e.home) for index, e in enumerate(entries) if e.live}
        self._without = {
            key: {entry.group for entry in entries if entry.live and key not in entry.local_state}
            for key in STATE_TENSORS
            if key != MASTER_PARAM
        }
        self._state: _State | None = None
        self._grads: list[Tensor] = []
        self._written = sorted(
            (tensor.data_ptr(), tensor.data_ptr() + tensor.numel() * tensor.element_size())
            for entry in entries
            if entry.live
            for tensor in (entry.home, *entry.local_state.values())
            if tensor.numel()
        )
        self._begins = [begin for begin, _ in self._written]
        self._watched = [t for e in entries if e.live and e.master is not None for t in e.counted]
        self._versions = list(map(_version, self._watched))
        self._expect([entry.live for entry in entries])

    def _watch(self, state: dict[Any, Any]) -> None:
        """Records the optimizer's state at the first step of the plan."""
        live = [(entry, state[entry.param]) for entry in self._entries if entry.live and entry.param in state]
        pairs = [(own.get(key), tensor) for entry, own in live for key, tensor in entry.local_state.items()]
        # A DTensor has no address of its own. Its local part is the plan's tensor.
        tensors = [tensor if is_distributed(held) else held for held, tensor in pairs if held is not None]
        # A pending local part is another tensor once it is complete.
        sharded: list[Tensor] = [
            held for held, tensor in pairs if is_distributed(held) and local_part(held) is tensor
        ]
        self._state = _State(
            list(state),
            list(state.values()),
            [own for _, own in live],
            {key: [own.get(key) for _, own in live] for key in STATE_TENSORS},
            tensors,
            list(map(Tensor.data_ptr, tensors)),
            sharded,
            list(map(local_part, sharded)),
        )

    def gradients(self, groups: list[dict[str, Any]], state: dict[Any, Any]) -> Gradients | None:
        """Reads the gradients of this step, and keeps them alive until `release_gradients`.

        Args:
            groups: The optimizer's groups.
            state: The optimizer's state.

        Returns:
            The gradients; None if the plan is stale.
        """
        if self._state is None:
            self._watch(state)
        if not (self._has_groups(groups) and self._has_state(state)):
            return None
        grads = list(map(_grad, self._sources))
        has_grad = list(map(is_not, grads, repeat(None)))
        if has_grad != self._has_grad:
            if any(
                present and not entry.live for present, entry in zip(has_grad, self._entries, strict=True)
            ):
                return None
            self._expect(has_grad)
        try:
            addresses = self._addresses(grads if self._all_have else list(compress(grads, has_grad)))
        except (RuntimeError, NotImplementedError):
            # Sparse and nested tensors have no address.
            return None
        if addresses is None:
            return None
        for index in self._updated_groups:
            check_range(groups[index])
        if not self._all_have:
            remaining = iter(addresses)
            addresses = [next(remaining) if present else 0 for present in has_grad]
        self._grads = grads
        return Gradients(addresses, self._in_double)

    def release_gradients(self) -> None:
        """Drops the gradients that were read last."""
        self._grads = []

    def mark_updated(self) -> None:
        """Increments the version counters of the updated parameters, for autograd."""
        torch.autograd.graph.increment_version(self._updated)
        # Reads the counters again, because parameters that are views of one tensor share one counter.
        self._versions = list(map(_version, self._watched))

    def _expect(self, has_grad: list[bool]) -> None:
        """Sets the expected layouts of the entries that have a gradient."""
        present = list(compress(self._entries, has_grad))
        # Layouts from when the plan was made: a parameter may have changed in the step in which a gradient appeared.
        layouts = [self._layouts[index] for index in compress(range(len(has_grad)), has_grad)]
        self._has_grad = has_grad
        self._all_have = len(present) == len(self._entries)
        self._present = present
        self._updated_groups = sorted({entry.group for entry in present})
        self._homes = [entry.home for entry in present]
        self._home_addresses = [layout.address for layout in layouts]
        self._home_strides = [layout.strides for layout in layouts]
        self._home_dtypes = [layout.dtype for layout in layouts]
        self._shapes = [layout.shape for layout in layouts]
        self._devices = [layout.device for layout in layouts]
        self._updated = [tensor for entry in present for tensor in entry.counted]
        self._empty = [index for index, layout in enumerate(layouts) if layout.elements == 0]
        self._in_double = any(layout.dtype == torch.float64 and layout.elements for layout in layouts)
        self._grad_addresses: list[int] = []
        self._grad_strides: list[Any] = []
        self._grad_dtypes = [entry.grad_dtype for entry in present]

    def _has_groups(self, groups: list[dict[str, Any]]) -> bool:
        if len(groups) < len(self._groups):
            return False
        for index, group in enumerate(groups):
            params = self._groups[index] if index < len(self._groups) else []
            if len(group["params"]) != len(params) or not all(map(is_, group["params"], params)):
                return False
            if any(index in without and is_in_use(key, group) for key, without in self._without.items()):
                return False
        return True

    def _has_state(self, state: dict[Any, Any]) -> bool:
        known = self._state
        return known is not None and (
            len(state) == len(known.keys)
            and all(map(is_, state, known.keys))
            and all(map(is_, state.values(), known.values))
            and all(
                all(map(is_, map(dict.get, known.dicts, repeat(key)), held))
                for key, held in known.held.items()
            )
            and list(map(Tensor.data_ptr, known.tensors)) == known.addresses
            and not any(map(Tensor.is_neg, known.tensors))
            and all(map(is_, map(local_part, known.sharded), known.local_parts))
        )

    def _addresses(self, grads: list[Tensor]) -> list[int] | None:
        """Returns the addresses of the gradients that are present; None if the plan is stale."""
        homes = self._homes
        if (
            list(map(Tensor.data_ptr, homes)) != self._home_addresses
            or list(map(Tensor.stride, homes)) != self._home_strides
            or list(map(_dtype, homes)) != self._home_dtypes
            or list(map(_shape, homes)) != self._shapes
            or list(map(_version, self._watched)) != self._versions
            or list(map(_shape, grads)) != self._shapes
            or list(map(Tensor.get_device, grads)) != self._devices
            or any(map(Tensor.is_neg, grads))
            or any(map(Tensor.is_neg, homes))
        ):
            return None
        strides = list(map(Tensor.stride, grads))
        if strides != self._grad_strides:
            if not all(map(same_strides, homes, grads)):
                return None
            self._grad_strides = strides
        if list(map(_dtype, grads)) != self._grad_dtypes:
            return None
        addresses = list(map(Tensor.data_ptr, grads))
        for index in self._empty:
            addresses[index] = 0
        if addresses.count(0) != len(self._empty):
            # A wrapper subclass has elements and no address.
            return None
        if addresses != self._grad_addresses:
            if any(map(self._is_written, addresses, grads, homes)):
                return None
            # Resizing a storage changes its address, so equal addresses require no check.
            if any(map(missing_bytes, grads)):
                return None
            self._grad_addresses = list(addresses)
        return addresses

    def _is_written(self, address: int, grad: Tensor, home: Tensor) -> bool:
        """True if a gradient overlaps memory that the step writes. A gradient may be its own parameter."""
        if address == 0 or (address == home.data_ptr() and grad.dtype == home.dtype):
            return False
        after = bisect.bisect_left(self._begins, address + grad.numel() * grad.element_size())
        return after > 0 and self._written[after - 1][1] > address
