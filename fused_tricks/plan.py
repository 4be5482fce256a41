"""Which memory a step works on: built once, and again only when something that it holds changes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .agreement import Agreement
from .parameters import (
    LOW_PRECISION,
    MASTER_PARAM,
    MOMENTUM_BUFFER,
    SUPPORTED,
    check_state,
    check_update,
    is_wrapper,
    named_parameters,
    state_dtype,
)
from .sharding import distributed_like, is_distributed, local_part, placed_like
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
from .step_state import StepState


@dataclass(eq=False)
class Entry:
    """One parameter.

    Attributes:
        group: The index of its group.
        param: The parameter as its group lists it.
        live: Whether it can be updated: it had a gradient when the plan was made, or has had one before and is ready
            for the next. What follows is empty where it cannot.
        source: The tensor whose memory and ``.grad`` the kernels use: the parameter, or a stand-in. That is an alias of
            the part of a ``DTensor`` that is here, or a contiguous copy where the parameter has gaps or its gradient
            has other strides.
        grad_dtype: The type of its gradients; one of another type needs another plan.
        is_copy: The stand-in has memory of its own.
        part: Which part of the model the parameter belongs to, as :class:`~fused_tricks.agreement.Agreement` says.
        master: FP32 weights of an FP16 or BF16 parameter, with the strides of ``source``.
        buffer: Momentum in the type of the arithmetic, with the strides of ``source``.
        distributed: ``DTensor``s of which ``master`` and ``buffer`` are the parts that are here, where the parameter is
            one, by their keys in the optimizer's state.
        first: ``buffer`` is not in the optimizer's state yet: no update is known to have written it.
        is_new: ``master`` or ``buffer`` is not in the optimizer's state yet.
        identity: The parameter's address and version counters when ``master`` was last known to agree with it.
        storage: Keeps that address from being given to other data.
    """

    group: int
    param: Tensor
    live: bool
    source: Tensor
    grad_dtype: torch.dtype | None = None
    is_copy: bool = False
    part: int = 0
    master: Tensor | None = None
    buffer: Tensor | None = None
    distributed: dict[str, Tensor] = field(default_factory=dict)
    first: bool = False
    is_new: bool = False
    identity: tuple[int, ...] = ()
    storage: Tensor | None = None

    def own_state(self) -> dict[str, Tensor]:
        """What of it belongs into the optimizer's state."""
        tensors = {MASTER_PARAM: self.master, MOMENTUM_BUFFER: self.buffer} | self.distributed
        return {k: t for k, t in tensors.items() if t is not None and t.shape == self.param.shape}

    @property
    def is_staged(self) -> bool:
        return self.source is not self.param


@dataclass
class Plan:
    """The entries of every parameter of every group, in order.

    Attributes:
        entries: All of them.
        stand_ins: The stand-ins among the entries' sources.
        new: Those whose masters or buffers are not in the optimizer's state yet.
        lrs: The groups' learning rates as they were, tensors that follow the updates applied among them.
        agreement: How to decide with other processes; None where this one decides alone.
        is_in_order: Parameters have to be updated one after the other, because some share memory.
        is_outdated: What the plan was made from has changed in a way that backends do not look for.
    """

    entries: list[Entry]
    lrs: list[Any]
    agreement: Agreement | None = None
    is_in_order: bool = False
    stand_ins: StandIns = field(init=False)
    new: list[Entry] = field(init=False)
    is_outdated: bool = False

    def __post_init__(self) -> None:
        self.stand_ins = StandIns(self.entries)
        self.new = [entry for entry in self.entries if entry.is_new]

    def keeps_its_memory(self) -> bool:
        """True if each parameter still is where it was when the plan began to keep its memory."""
        return all(
            entry.storage is None or address_of(local_part(entry.param)) == address_of(entry.storage)
            for entry in self.entries
        )

    def publish(
        self,
        groups: list[dict[str, Any]],
        state: dict[Tensor, dict[str, Tensor]],
        step_state: StepState,
        written_state: Callable[[Entry, bool], tuple[dict[str, Tensor], bool]],
    ) -> None:
        """Moves the new masters and buffers that an update has written into the optimizer's state.

        Args:
            groups: The optimizer's groups.
            state: The optimizer's state.
            step_state: The optimizer's state on the device.
            written_state: For an entry, and whether its group has momentum: what an update has written of its state,
                and whether the rest may still be.
        """
        unfinished = []
        for entry in self.new:
            written, may_follow = written_state(entry, groups[entry.group]["momentum"] != 0)
            held = state.get(entry.param, {})
            if not may_follow or any(held.get(key) is not tensor for key, tensor in written.items()):
                state.setdefault(entry.param, {}).update(written)
                self.is_outdated = True
            for tensor in written.values():
                step_state.unwritten.pop(tensor, None)
            if may_follow:
                unfinished.append(entry)
        self.new = unfinished
        if self.is_outdated:
            # Those that need none as well, where others have: torch.distributed.checkpoint misses them otherwise.
            for entry in self.entries:
                if entry.live and not entry.own_state():
                    state.setdefault(entry.param, {})


def applied_state(entry: Entry, has_momentum: bool, had_grad: bool) -> tuple[dict[str, Tensor], bool]:
    """What a step that was applied has written of a new entry's state, and whether the rest may still be."""
    if not had_grad:
        return {}, True
    written = entry.own_state()
    if entry.first and not has_momentum:
        # Momentum was switched off before any update was applied.
        written.pop(MOMENTUM_BUFFER, None)
    return written, False


def build_plan(
    groups: list[dict[str, Any]],
    state: dict[Tensor, dict[str, Any]],
    step_state: StepState,
    former: Plan | None = None,
    agreement: Agreement | None = None,
) -> Plan:
    """Makes a plan from an optimizer's groups, gradients and state.

    Nothing is changed but this: a master takes over its parameter's values where the parameter is no longer the
    master's rounding, because somebody else wrote to it; and a state tensor of another dtype, device or layout is
    replaced by one that fits.

    Args:
        groups: The optimizer's groups.
        state: The optimizer's state.
        step_state: The optimizer's state on the device.
        former: The plan before, whose new masters and buffers may be written although the host has not heard of it.
        agreement: How to decide with other processes, if that is needed.

    Raises:
        RuntimeError: A parameter or gradient cannot be updated. Then nothing is changed at all.
        TypeError: The state has something else than tensors for a parameter.
    """
    with torch.no_grad():
        return _build_plan(groups, state, step_state, former, agreement)


def _build_plan(
    groups: list[dict[str, Any]],
    state: dict[Tensor, dict[str, Any]],
    step_state: StepState,
    former: Plan | None,
    agreement: Agreement | None,
) -> Plan:
    listed = named_parameters(groups)
    for name, param, _ in listed:
        check_state(name, state.get(param, {}))
    # Read once: another thread may set them.
    grads = [param.grad for _, param, _ in listed]
    pending = {} if former is None else {entry.param: entry.own_state() for entry in former.new}
    used = [_used_state(p, groups[g], [state.get(p, {}), pending.get(p, {})]) for _, p, g in listed]
    seen: dict[Tensor, str] = {}
    for (name, param, _), grad, own in zip(listed, grads, used, strict=True):
        if grad is not None:
            check_update(name, param, grad, state.get(param, {}), own)
            if param in seen:
                raise RuntimeError(f"{name} is also {seen[param]}, and would be updated twice; list it once")
            seen[param] = name
    devices = {param.device for param in seen}
    before = {} if former is None else {entry.param: entry for entry in former.entries if entry.live}
    is_live = [
        grad is not None or (param.device in devices and _is_ready(before.get(param), param, own))
        for (_, param, _), grad, own in zip(listed, grads, used, strict=True)
    ]
    pieces = [
        piece
        for (name, param, _), grad, own, live in zip(listed, grads, used, is_live, strict=True)
        if live
        for piece in _pieces(name, param, grad, own)
    ]
    is_in_order = must_be_in_order(pieces)
    entries = []
    for (_, param, group), grad, live in zip(listed, grads, is_live, strict=True):
        if not live:
            entries.append(Entry(group, param, live=False, source=param))
            continue
        if is_in_order:
            is_dense = True
        elif grad is None:
            is_dense = not before[param].is_copy
        else:
            local = local_part(param)
            is_dense = _fits(grad if local is param else local, local)
        has_momentum = groups[group]["momentum"] != 0
        states = [state.get(param, {}), pending.get(param, {})]
        entry = _entry(param, group, is_dense, has_momentum, states, step_state, is_in_order)
        entry.grad_dtype = before[param].grad_dtype if grad is None else grad.dtype
        entries.append(entry)
    if agreement is not None:
        for entry, part in zip(entries, agreement.part_of, strict=True):
            entry.part = part
    return Plan(entries, [group["lr"] for group in groups], agreement, is_in_order)


def _used_state(
    param: Tensor, group: dict[str, Any], states: list[dict[str, Any]]
) -> dict[str, Tensor | None]:
    """What an update of a parameter needs of its state, from the first dict that has it."""
    keys = [MASTER_PARAM] if param.dtype in LOW_PRECISION else []
    keys += [MOMENTUM_BUFFER] if group["momentum"] != 0 else []
    return {key: next((s[key] for s in states if s.get(key) is not None), None) for key in keys}


def _is_ready(former: Entry | None, param: Tensor, used: dict[str, Tensor | None]) -> bool:
    """Whether a parameter without a gradient can stay live, so that gradients that take turns need no new plans."""
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


def _pieces(name: str, param: Tensor, grad: Tensor | None, used: dict[str, Tensor | None]) -> Iterator[Piece]:
    """What an update of a parameter reads and writes."""
    tensors = {PARAMETER: param, **used, GRADIENT: grad}
    for key, tensor in tensors.items():
        if tensor is not None:
            yield Piece(local_part(tensor), key, name, MASTER_PARAM in used)


def _entry(
    param: Tensor,
    group: int,
    is_dense: bool,
    has_momentum: bool,
    states: list[dict[str, Any]],
    step_state: StepState,
    is_in_order: bool,
) -> Entry:
    local = local_part(param)
    source = param
    if not is_dense:
        source = local.detach().clone(memory_format=torch.contiguous_format)
    elif local is not param:
        source = local.detach()
    entry = Entry(group, param, live=True, source=source, is_copy=not is_dense, storage=local.detach())
    entry.identity = identity_of(param, local)
    if param.dtype in LOW_PRECISION:
        entry.master, entry.is_new = _find_state(entry, states, MASTER_PARAM, step_state, is_in_order)
        if entry.master is None:
            entry.master = source.detach().to(torch.float32, memory_format=torch.preserve_format)
        else:
            adopt_foreign_values(entry.master, local)
    else:
        # A master from before the parameter was converted would be stale when the parameter is converted back.
        states[0].pop(MASTER_PARAM, None)
    if has_momentum:
        entry.buffer, entry.first = _find_state(entry, states, MOMENTUM_BUFFER, step_state, is_in_order)
        if entry.buffer is None:
            entry.buffer = torch.zeros_like(source, dtype=state_dtype(param), requires_grad=False)
        entry.is_new = entry.is_new or entry.first
    if is_distributed(param):
        for key, tensor in ((MASTER_PARAM, entry.master), (MOMENTUM_BUFFER, entry.buffer)):
            if tensor is not None and key not in entry.distributed:
                entry.distributed[key] = distributed_like(tensor, param)
    return entry


def _find_state(
    entry: Entry, states: list[dict[str, Any]], key: str, step_state: StepState, is_in_order: bool
) -> tuple[Tensor | None, bool]:
    """The tensor of that name in the first dict that has it, and whether no update is known to have written it."""
    for index, state in enumerate(states):
        value: Tensor | None = state.get(key)
        if value is None:
            state.pop(key, None)  # torch.optim.SGD takes None for "not there yet"
        else:
            value = _fitting_state(entry, state, key, value, step_state, is_in_order)
            if is_distributed(value):
                entry.distributed[key] = value
            return local_part(value), index > 0 or value in step_state.unwritten
    return None, True


def _fits(grad: Tensor, param: Tensor) -> bool:
    """Whether both can be walked as two flat arrays that list the same elements in the same order."""
    dense = torch.empty_like(param, device="meta")
    if not (same_strides(param, dense) and same_strides(param, grad)):
        return False
    return not (grad.is_neg() or param.is_neg() or grad._is_zerotensor())


def _fitting_state(
    entry: Entry, state: dict[str, Any], key: str, value: Tensor, step_state: StepState, is_in_order: bool
) -> Tensor:
    source = entry.source
    dtype = state_dtype(source)
    placed = placed_like(value, entry.param)
    local = local_part(placed)
    if (
        placed is value
        and value.dtype == dtype
        and local.device == source.device
        and (is_in_order or (same_strides(local, source) and not local.is_neg()))
    ):
        return value
    fitting = torch.empty_like(source, dtype=dtype, requires_grad=False).copy_(local)
    fitting = distributed_like(fitting, entry.param)
    if value in step_state.first_steps:
        step_state.first_steps[fitting] = step_state.first_steps.pop(value).to(fitting.device)
    if value in step_state.applied_before:
        step_state.applied_before[fitting] = step_state.applied_before.pop(value)
    if value in step_state.unwritten:
        step_state.unwritten[fitting] = step_state.unwritten.pop(value)
    state[key] = fitting
    return fitting


def adopt_foreign_values(master: Tensor, param: Tensor) -> None:
    """A master takes over those of its parameter's elements that are not its rounding: somebody else wrote them."""
    agrees = master.to(param.dtype) == param
    # To look costs a GPU a synchronisation, and the CPU less memory than to write what is there already.
    if param.device.type != "cpu" or not has_memory(param) or not agrees.all():
        master.copy_(torch.where(agrees, master, param.to(master.dtype)))
