"""The step plan: tensors and layouts, cached between steps and rebuilt when any of them changes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._torch import is_zero_tensor
from ..distributed.found_inf_reduction import StepReduction
from ..distributed.sharding import distributed_like, local_part, placed_like, shard_of
from .device_state import StepState
from .entry import Entry
from .new_state import NewState
from .parameters import (
    EMA_PARAM,
    LOW_PRECISION,
    MASTER_PARAM,
    MOMENTUM_BUFFER,
    STATE_TENSORS,
    SUPPORTED,
    check_state,
    check_update,
    is_in_use,
    is_wrapper,
    named_parameters,
    state_dtype,
)
from .shared_memory import (
    GRADIENT,
    PARAMETER,
    Piece,
    address_of,
    has_memory,
    missing_bytes,
    must_be_in_order,
    overlaps_itself,
)
from .stand_ins import StandIns, identity_of, same_strides

# The values of new state tensors, until their first update. In a file of torch.distributed.checkpoint, a tensor of NaN
# shows that no update has written the average.
_UNWRITTEN = {MOMENTUM_BUFFER: 0.0, EMA_PARAM: math.nan}


@dataclass
class Plan:
    """The entries of all parameters, in the order of the groups.

    Attributes:
        entries: The entries.
        lrs: The `lr` of each group when the plan was made. A tensor may follow the applied steps (`DeviceLR`).
        reduction: The reduction over processes; None if this process decides alone.
        is_in_order: True if parameters must be updated one after the other, because some share memory.
        placed: The keys of the state tensors that the plan has put into the optimizer's state, by parameter.
        stand_ins: The stand-ins among the entries' sources.
        is_outdated: True if the plan is stale for a reason that the plan guards of the backends do not check.
    """

    entries: list[Entry]
    lrs: list[Any]
    reduction: StepReduction | None = None
    is_in_order: bool = False
    placed: dict[Tensor, list[str]] = field(default_factory=dict)
    stand_ins: StandIns = field(init=False)
    is_outdated: bool = False

    def __post_init__(self) -> None:
        self.stand_ins = StandIns(self.entries)

    def keeps_its_memory(self) -> bool:
        """True if each parameter is still at the address that `Entry.storage` keeps."""
        return all(
            entry.storage is None or address_of(local_part(entry.param)) == address_of(entry.storage)
            for entry in self.entries
        )

    def place_state(self, state: dict[Tensor, dict[str, Any]]) -> None:
        """Puts the plan's state tensors into the optimizer's state, unless they are already there."""
        owned = {entry.param: entry.state for entry in self.entries if entry.live}
        if not any(owned.values()):
            return
        # torch.distributed.checkpoint requires an entry for every parameter if any parameter has one.
        for param, own in owned.items():
            held = state.get(param, {})
            new = {key: tensor for key, tensor in own.items() if held.get(key) is not tensor}
            if new or param not in state:
                self.placed[param] = list(new)
                state.setdefault(param, {}).update(new)

    def withdraw_state(self, state: dict[Tensor, dict[str, Any]]) -> None:
        """Undoes `place_state`."""
        for param, keys in self.placed.items():
            held = state.get(param, {})
            for key in keys:
                held.pop(key, None)
            if not held:
                state.pop(param, None)
        self.placed.clear()


def build_plan(
    groups: list[dict[str, Any]],
    state: dict[Tensor, dict[str, Any]],
    step_state: StepState,
    new_state: NewState,
    device: torch.device,
    former: Plan | None = None,
    reduction: StepReduction | None = None,
) -> Plan:
    """Builds a plan from an optimizer's groups, gradients and state.

    Adds missing state tensors to the state. Resynchronises a master where its parameter is no longer its
    rounding, i.e. where user code wrote to the parameter. Replaces a state tensor of another dtype, device or layout
    by a tensor that fits.

    Args:
        groups: The optimizer's groups.
        state: The optimizer's state.
        step_state: The optimizer's step state.
        new_state: The record of unwritten state. New state tensors are added to the record.
        device: The device on which a backend notes first updates.
        former: The previous plan. Parameters that the previous plan can update stay live while they have no gradient.
        reduction: The reduction over processes; None if this process decides alone.

    Returns:
        The plan. Its new state is in `state`; `Plan.withdraw_state` removes the new state again.

    Raises:
        RuntimeError: A parameter or gradient cannot be updated. Nothing is changed then.
        TypeError: The state of a parameter is malformed. Nothing is changed then.
    """
    with torch.no_grad():
        plan = _Builder(groups, state, step_state, new_state, device).build(former)
    if reduction is not None:
        for entry, shard_class in zip(plan.entries, reduction.shard_class_of, strict=True):
            entry.shard_class = shard_class
        plan.reduction = reduction
    plan.place_state(state)
    return plan


class _Listed(NamedTuple):
    """A parameter of a group, its gradient and state, and the state tensors that an update uses."""

    name: str
    param: Tensor
    group: int
    grad: Tensor | None
    state: dict[str, Any]
    used: dict[str, Tensor | None]


class _Builder:
    """The builder of one plan, with the arguments of `build_plan`."""

    def __init__(
        self,
        groups: list[dict[str, Any]],
        state: dict[Tensor, dict[str, Any]],
        step_state: StepState,
        new_state: NewState,
        device: torch.device,
    ) -> None:
        self._groups = groups
        self._state = state
        self._step_state = step_state
        self._new_state = new_state
        self._device = device
        self._is_in_order = False
        self._masters: list[Tensor] = []
        self._without_values: list[Tensor] = []

    def build(self, former: Plan | None) -> Plan:
        listed = [self._listed(*parameter) for parameter in named_parameters(self._groups)]
        updated = self._check_updates(listed)
        devices = {param.device for param in updated}
        before = {} if former is None else {entry.param: entry for entry in former.entries if entry.live}
        live = [
            item.grad is not None
            or (item.param.device in devices and _is_ready(before.get(item.param), item.param, item.used))
            for item in listed
        ]
        pieces = [
            piece for item, is_live in zip(listed, live, strict=True) if is_live for piece in _pieces(item)
        ]
        self._is_in_order = must_be_in_order(pieces)
        entries = [
            self._entry(item, before.get(item.param))
            if is_live
            else Entry(item.group, item.param, live=False, source=item.param, local=item.param)
            for item, is_live in zip(listed, live, strict=True)
        ]
        self._new_state.add(self._masters, self._without_values, self._step_state, self._device)
        state = [(entry, key, tensor) for entry in entries for key, tensor in entry.state.items()]
        notes = self._new_state.first_updates_of([tensor for _, _, tensor in state], self._device)
        for (entry, key, _), note in zip(state, notes, strict=True):
            entry.first_updates[key] = note
        return Plan(entries, [group["lr"] for group in self._groups], is_in_order=self._is_in_order)

    def _listed(self, name: str, param: Tensor, group: int) -> _Listed:
        held = self._state.get(param, {})
        check_state(name, held)
        # A parameter may change its shape before its first update. Its unwritten state is then dropped, not refused.
        state = {
            key: value
            for key, value in held.items()
            if not (
                isinstance(value, Tensor)
                and value.shape != param.shape
                and self._new_state.is_unwritten(value, self._step_state)
            )
        }
        # Reads param.grad once, because another thread may set it.
        return _Listed(name, param, group, param.grad, state, _used_state(param, self._groups[group], state))

    def _check_updates(self, listed: list[_Listed]) -> dict[Tensor, str]:
        """Checks the parameters that have a gradient, and returns their names by parameter."""
        seen: dict[Tensor, str] = {}
        for name, param, _, grad, state, used in listed:
            if grad is None:
                continue
            check_update(name, param, grad, state, used)
            if param in seen:
                raise RuntimeError(f"{name} is also {seen[param]} and would be updated twice; list it once")
            seen[param] = name
        return seen

    def _entry(self, item: _Listed, former: Entry | None) -> Entry:
        param, grad = item.param, item.grad
        shard = shard_of(param)
        local = local_part(param)
        is_dense = self._is_in_order or _fits(local, local)
        if grad is None:
            assert former is not None
            is_staged, grad_dtype = former.is_staged, former.grad_dtype
        else:
            is_staged = local is not param or not (self._is_in_order or _fits(grad, local))
            grad_dtype = grad.dtype
        source = param
        if not is_dense:
            source = local.detach().clone(memory_format=torch.contiguous_format)
        elif is_staged:
            source = local.detach()
        entry = Entry(
            group=item.group,
            param=param,
            live=True,
            source=source,
            local=local,
            spec=None if shard is None or not is_dense else shard.spec,
            grad_dtype=grad_dtype,
            is_copy=not is_dense,
            storage=local.detach(),
        )
        entry.identity = identity_of(param, local)
        held = self._state.get(param, {})
        for key in held.keys() - item.state.keys():
            del held[key]
        if param.dtype in LOW_PRECISION:
            if self._take_state(entry, item.state, MASTER_PARAM):
                with self._new_state.resynchronised(entry.state[MASTER_PARAM]):
                    adopt_foreign_values(entry.local_state[MASTER_PARAM], local)
            else:
                master = source.detach().to(torch.float32, memory_format=torch.preserve_format)
                self._masters.append(_add_new_state(entry, MASTER_PARAM, master))
        else:
            # An old master would have old values if the parameter were converted back to FP16 or BF16.
            held.pop(MASTER_PARAM, None)
        for key, value in _UNWRITTEN.items():
            if is_in_use(key, self._groups[item.group]) and not self._take_state(entry, item.state, key):
                tensor = torch.full_like(source, value, dtype=state_dtype(param), requires_grad=False)
                self._without_values.append(_add_new_state(entry, key, tensor))
        return entry

    def _take_state(self, entry: Entry, state: dict[str, Any], key: str) -> bool:
        """Adds a state tensor to an entry, converted if necessary; returns False if the tensor is missing."""
        # In torch.optim.SGD, None also means a missing buffer.
        if state.get(key) is None:
            return False
        value = self._fitting_state(entry, key, state[key])
        entry.state[key] = value
        entry.local_state[key] = local_part(value)
        return True

    def _fitting_state(self, entry: Entry, key: str, value: Tensor) -> Tensor:
        source = entry.source
        dtype = state_dtype(source)
        placed = placed_like(value, entry.param)
        local = local_part(placed)
        if (
            placed is value
            and value.dtype == dtype
            and local.device == source.device
            and (self._is_in_order or (same_strides(local, source) and not local.is_neg()))
        ):
            return value
        fitting = torch.empty_like(source, dtype=dtype, requires_grad=False).copy_(local)
        fitting = distributed_like(fitting, entry.param)
        self._new_state.replace(value, fitting, self._step_state, self._device)
        self._state[entry.param][key] = fitting
        return fitting


def _add_new_state(entry: Entry, key: str, local: Tensor) -> Tensor:
    """Adds a new tensor to an entry and returns its form in the optimizer's state: a `DTensor` beside a `DTensor`."""
    entry.state[key] = distributed_like(local, entry.param)
    entry.local_state[key] = local_part(entry.state[key])
    return entry.state[key]


def _used_state(param: Tensor, group: dict[str, Any], state: dict[str, Any]) -> dict[str, Tensor | None]:
    """Returns the state tensors that an update of a parameter uses; None for a missing tensor."""
    return {
        key: state.get(key)
        for key in STATE_TENSORS
        if is_in_use(key, group) and (key != MASTER_PARAM or param.dtype in LOW_PRECISION)
    }


def _is_ready(former: Entry | None, param: Tensor, used: dict[str, Tensor | None]) -> bool:
    """True if a parameter without a gradient can stay live. Alternating gradients then require no new plans."""
    if former is None or is_wrapper(param) or param.dtype not in SUPPORTED or param.layout != torch.strided:
        return False
    if not has_memory(param) or missing_bytes(param) or overlaps_itself(local_part(param)):
        return False
    if not former.is_copy and not _fits(local_part(param), local_part(param)):
        return False
    return all(
        value is not None and value.shape == param.shape and has_memory(value) and not missing_bytes(value)
        for value in used.values()
    )


def _pieces(item: _Listed) -> Iterator[Piece]:
    """Yields the tensors that an update of a parameter reads or writes."""
    tensors = {PARAMETER: item.param, **item.used, GRADIENT: item.grad}
    for key, tensor in tensors.items():
        if tensor is not None:
            yield Piece(local_part(tensor), key, item.name, MASTER_PARAM in item.used)


def _fits(grad: Tensor, param: Tensor) -> bool:
    """True if gradient and parameter are flat arrays in memory, with the same elements in the same order."""
    # A tensor without elements is contiguous with any strides.
    if not (param.numel() and param.is_contiguous() and grad.is_contiguous()):
        dense = torch.empty_like(param, device="meta")
        if not (same_strides(param, dense) and same_strides(param, grad)):
            return False
    return not (grad.is_neg() or param.is_neg() or is_zero_tensor(grad))


def adopt_foreign_values(master: Tensor, param: Tensor) -> None:
    """Resynchronises the master where the parameter is no longer its rounding, i.e. where user code wrote to it."""
    is_rounding = master.to(param.dtype) == param
    # On a GPU, the check would synchronise. On the CPU, the check costs less memory traffic than the copy.
    if param.device.type != "cpu" or not has_memory(param) or not is_rounding.all():
        master.copy_(torch.where(is_rounding, master, param.to(master.dtype)))
