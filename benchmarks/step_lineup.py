"""Who takes part in benchmarks/step.py on a device, and who had to be left out and why."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

import fused_tricks
from benchmarks import gpu, memory, parameter_sets, step_peers
from benchmarks.names import FOR_LOOP, FOREACH, FUSED, OURS
from benchmarks.step_contestants import (
    CASTS,
    FUSED_NEW_CASTS,
    FUSED_WORK,
    SEPARATE_WORK,
    Casts,
    Entry,
    casts_in_place,
    casts_to_new,
    grad_scaler,
    ours,
    with_casts,
)
from fused_tricks.backends import BACKENDS

GRAPH = ", CUDA graph"
FORMS: dict[str, Any] = {
    FOR_LOOP: {"foreach": False, "fused": False},
    FOREACH: {"foreach": True},
    FUSED: {"fused": True},
}


@dataclass(frozen=True)
class Candidate:
    """A contestant that has yet to be built.

    Attributes:
        name: of the contestant.
        build: makes the entry.
        optional: whether the benchmark goes on without it when it cannot be built or run.
    """

    name: str
    build: Callable[[], Entry]
    optional: bool = False


def usable_backends(device: torch.device) -> tuple[list[str], dict[str, str]]:
    """The backends of fused_tricks written for this type of device, the fastest first.

    Returns:
        The usable ones, or the reference where there is none; and by contestant, why the others are not.
    """
    names = list(BACKENDS)
    reasons = {
        name: BACKENDS[name].unavailable_because()
        for name in names[: names.index("reference")]
        if BACKENDS[name].device_type == device.type
    }
    usable = [name for name, reason in reasons.items() if reason is None]
    return usable or ["reference"], {
        f"{OURS}, {name}": reason for name, reason in reasons.items() if reason is not None
    }


def of_a_model(
    parameters: str, dtype: torch.dtype, device: torch.device, backends: Sequence[str]
) -> list[Candidate]:
    """Everybody who can take part on this type of device.

    Args:
        parameters: a name that `parameter_sets.build` knows.
        dtype: of low-precision weights.
        device: where the parameters live.
        backends: of fused_tricks, the first of them under the name `OURS`.
    """
    module = partial(parameter_sets.build, parameters)
    low = [p.dtype == dtype for p in fused_tricks.cast_model(module(), dtype).parameters()]

    candidates = [
        *_torch_amp(module, device),
        *_torch_amp(module, device, CASTS, casts_in_place(low, dtype)),
        _amp(FUSED_NEW_CASTS, FUSED, module, device, casts_to_new(low, dtype)),
    ]
    if gpu.is_gpu(device):
        candidates += [_fused_graph(module, device), *_peers(module, dtype, device)]
    return candidates + _ours(module, dtype, device, backends)


def of_tiny_parameters(
    parameters: str, dtype: torch.dtype, device: torch.device, backends: Sequence[str]
) -> list[Candidate]:
    """Those whose host time is measured; arguments as of `of_a_model`."""
    module = partial(parameter_sets.build, parameters)
    candidates = _torch_amp(module, device)
    if gpu.is_gpu(device):
        candidates.append(_fused_graph(module, device))
    return candidates + _ours(module, dtype, device, backends)


def assemble(candidates: Iterable[Candidate], device: torch.device) -> tuple[list[Entry], dict[str, str]]:
    """Builds the contestants and lets each take one step.

    Returns:
        Those that can take part; and by name, why the optional others cannot.
    """
    entries, left_out = [], {}
    for candidate in candidates:
        try:
            entry = candidate.build()
            entry.contestant.prepare()
            entry.contestant.run()
            if gpu.is_gpu(device):
                torch.cuda.synchronize()
        except Exception as error:
            if not candidate.optional:
                raise
            left_out[candidate.name] = _reason(error)
        else:
            entries.append(entry)
    return entries, left_out


def peak_bytes(candidate: Candidate, device: torch.device) -> int:
    """The most bytes that the tensors of a contestant held at once: weights, gradients, state, and what a step makes.

    Counted from its construction to the end of its second step.
    """
    kept = 0

    def two_steps() -> None:
        nonlocal kept
        entry = candidate.build()
        kept = entry.kept_bytes
        entry.contestant.run()
        entry.contestant.run()

    return memory.peak_bytes(two_steps, device) - kept


def _torch_amp(
    module: Callable[[], nn.Module], device: torch.device, suffix: str = "", casts: Casts | None = None
) -> list[Candidate]:
    return [_amp(f"{form}{suffix}", form, module, device, casts) for form in FORMS]


def _amp(
    name: str, form: str, module: Callable[[], nn.Module], device: torch.device, casts: Casts | None
) -> Candidate:
    sgd = partial(torch.optim.SGD, **FORMS[form])
    work = FUSED_WORK if form == FUSED else SEPARATE_WORK
    if casts:
        work = with_casts(work)
    return Candidate(name, lambda: grad_scaler(name, module(), device, sgd, work, casts=casts))


def _ours(
    module: Callable[[], nn.Module], dtype: torch.dtype, device: torch.device, backends: Sequence[str]
) -> list[Candidate]:
    def candidate(backend: str, name: str, graph: bool) -> Candidate:
        build = partial(ours, name, dtype=dtype, device=device, backend=backend, graph=graph)
        return Candidate(name, lambda: build(module()), optional=graph)

    graphs = (False, True) if gpu.is_gpu(device) else (False,)
    return [
        candidate(backend, (f"{OURS}, {backend}" if place else OURS) + (GRAPH if graph else ""), graph)
        for place, backend in enumerate(backends)
        for graph in graphs
    ]


def _fused_graph(module: Callable[[], nn.Module], device: torch.device) -> Candidate:
    sgd = partial(torch.optim.SGD, fused=True)
    name = f"{FUSED}{GRAPH}"
    return Candidate(
        name, lambda: grad_scaler(name, module(), device, sgd, FUSED_WORK, graph=True), optional=True
    )


def _peers(module: Callable[[], nn.Module], dtype: torch.dtype, device: torch.device) -> list[Candidate]:
    builders: dict[str, Callable[[str], Entry]] = {
        step_peers.APEX: lambda name: step_peers.apex(name, module(), device),
        step_peers.APEX_MASTERS: lambda name: step_peers.apex_masters(name, module(), dtype, device),
        step_peers.FLASHOPTIM: lambda name: step_peers.flashoptim(
            name, module(), dtype, device, bits=24, work=step_peers.FLASHOPTIM_WORK
        ),
        step_peers.FLASHOPTIM_32: lambda name: step_peers.flashoptim(
            name, module(), dtype, device, bits=32, work=step_peers.FLASHOPTIM_32_WORK
        ),
    }
    return [Candidate(name, partial(build, name), optional=True) for name, build in builders.items()]


def _reason(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError):
        return f"not installed (no module {error.name})"
    return f"{type(error).__name__}: {error}".splitlines()[0]
