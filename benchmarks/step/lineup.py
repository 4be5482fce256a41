"""The contestants of benchmarks.step on a device, and the reasons for contestants that are left out."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

import fused_tricks
from benchmarks.lib import gpu, memory, parameter_sets, progress
from benchmarks.lib.names import AVERAGE, AVERAGED_MODEL, FOR_LOOP, FOREACH, FUSED, GRAPH, OURS
from benchmarks.step import check, compiled, peers
from benchmarks.step.contestants import (
    CASTS,
    FUSED_NEW_CASTS,
    FUSED_WORK,
    LERP,
    SEPARATE_WORK,
    TWIN,
    Averages,
    Casts,
    Entry,
    averaged_model,
    averaged_twin,
    casts_in_place,
    casts_to_new,
    grad_scaler,
    ours,
    with_average,
    with_casts,
)

COMPILED = (compiled.SGD, compiled.MASTERS, peers.HEAVYBALL)
"""The contestants whose first steps compile code."""
FORMS: dict[str, Any] = {
    FOR_LOOP: {"foreach": False, "fused": False},
    FOREACH: {"foreach": True},
    FUSED: {"fused": True},
}
BYTES_AN_ELEMENT = 28
"""The upper bound for a contestant on a GPU: weights, gradients twice, momentum, and temporary tensors of a step."""
CPU_BYTES_AN_ELEMENT = 18
"""The same on a CPU, where temporary tensors of one contestant at a time are shared out over all."""


@dataclass(frozen=True)
class Candidate:
    """A contestant before it is built.

    Attributes:
        name: The name of the contestant.
        build: Returns the entry.
        optional: True if the benchmark continues without a contestant that cannot be built or run.
        module: Returns the initial module of the contestant, for the check of its numbers; None skips the check.
    """

    name: str
    build: Callable[[], Entry]
    optional: bool = False
    module: Callable[[], nn.Module] | None = None


class CheckFailed(Exception):
    """The numbers of a contestant are wrong."""


def of_a_model(
    parameters: str,
    dtype: torch.dtype,
    device: torch.device,
    backends: Sequence[str],
    *,
    compiles: bool = False,
    averages: bool = False,
) -> list[Candidate]:
    """Returns the candidates for this type of device.

    Args:
        parameters: A name that `parameter_sets.build` knows.
        dtype: The dtype of low-precision weights.
        device: The device of the parameters.
        backends: The backends of fused_tricks, the first of them under the name `OURS`.
        compiles: True adds the contestants of `COMPILED`.
        averages: True adds contestants that average the weights.
    """
    module = partial(parameter_sets.build, parameters, device)
    meta = parameter_sets.build(parameters, torch.device("meta"))
    low = [p.dtype == dtype for p in fused_tricks.cast_model(meta, dtype).parameters()]

    candidates = [
        *_torch_amp(module, device),
        *_torch_amp(module, device, CASTS, casts_in_place(low, dtype)),
        _amp(FUSED_NEW_CASTS, FUSED, module, device, casts_to_new(low, dtype)),
    ]
    if gpu.is_gpu(device):
        candidates.append(_fused_graph(module, device))
    others = _others(module, dtype, device)
    candidates += [candidate for candidate in others if compiles or candidate.name not in COMPILED]
    candidates += _ours(module, dtype, device, backends)
    return candidates + (_averages(module, dtype, device, backends[0]) if averages else [])


def of_tiny_parameters(
    parameters: str, dtype: torch.dtype, device: torch.device, backends: Sequence[str]
) -> list[Candidate]:
    """Returns the candidates whose host time is measured. The arguments are those of `of_a_model`."""
    module = partial(parameter_sets.build, parameters, device)
    candidates = _torch_amp(module, device)
    if gpu.is_gpu(device):
        candidates.append(_fused_graph(module, device))
    candidates += _ours(module, dtype, device, backends)
    return candidates + _averages(module, dtype, device, backends[0])


def fitting(
    candidates: Sequence[Candidate], elements: int, device: torch.device
) -> tuple[list[Candidate], dict[str, str]]:
    """Returns the candidates that fit into memory together, ours and the fastest of torch.amp first.

    Returns:
        The candidates, in their order; and by name, the reasons for the candidates that are left out.
    """
    free = memory.free_bytes(device)
    if free is None:
        return list(candidates), {}
    each = BYTES_AN_ELEMENT if gpu.is_gpu(device) else CPU_BYTES_AN_ELEMENT
    most = int(0.9 * free / (elements * each))
    first = (OURS, FUSED, f"{FUSED}{CASTS}")
    # Contestants of other packages, which may be missing here, come last.
    order = sorted(candidates, key=lambda one: (one.name not in first, one.optional, one.name))
    chosen = {candidate.name for candidate in order[:most]}
    why = f"only {most} contestants of {elements:,} elements fit into {free / 2**20:,.0f} MiB of free memory"
    return (
        [candidate for candidate in candidates if candidate.name in chosen],
        {candidate.name: why for candidate in candidates if candidate.name not in chosen},
    )


def assemble(candidates: Iterable[Candidate], device: torch.device) -> tuple[list[Entry], dict[str, str]]:
    """Builds the contestants, runs the first steps of each, and checks its numbers.

    Returns:
        The entries; and by name, the reasons for the contestants that are left out: an optional contestant cannot run,
        or a check failed.
    """
    entries, left_out = [], {}
    for candidate in progress.bar(list(candidates), desc="contestants", unit="contestant"):
        try:
            entries.append(_built(candidate, device))
        except CheckFailed as failure:
            left_out[candidate.name] = str(failure)
        except Exception as error:
            if not candidate.optional:
                raise
            left_out[candidate.name] = _reason(error)
    return entries, left_out


def _built(candidate: Candidate, device: torch.device) -> Entry:
    entry = candidate.build()
    began = time.perf_counter()
    for _ in range(check.STEPS):
        entry.contestant.prepare()
        entry.contestant.run()
    if gpu.is_gpu(device):
        torch.cuda.synchronize()
    if candidate.name in COMPILED:
        entry = replace(entry, compile_seconds=time.perf_counter() - began)
    if candidate.module is None:
        return entry
    checked = check.check(entry.trained, candidate.module())
    if not checked.passed:
        raise CheckFailed(checked.text)
    return replace(entry, checked=checked)


def peak_bytes(candidate: Candidate, device: torch.device) -> int:
    """Returns the most bytes of a contestant's tensors at once: weights, gradients, state, and temporary tensors.

    The count runs from its construction to the end of its second step.
    """
    kept = 0

    def two_steps() -> None:
        nonlocal kept
        entry = candidate.build()
        kept = entry.kept_bytes
        entry.contestant.run()
        # HeavyBall drops the gradients.
        if any(parameter.grad is None for parameter in entry.trained.parameters):
            entry.contestant.prepare()
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
    build = partial(grad_scaler, name, device=device, make_optimizer=sgd, work=work, casts=casts)
    # A form that fails on a GPU, for example without enough memory, does not end the benchmark.
    return Candidate(name, lambda: build(module()), optional=gpu.is_gpu(device), module=module)


def _ours(
    module: Callable[[], nn.Module], dtype: torch.dtype, device: torch.device, backends: Sequence[str]
) -> list[Candidate]:
    def candidate(backend: str, name: str, graph: bool) -> Candidate:
        build = partial(ours, name, dtype=dtype, device=device, backend=backend, graph=graph)
        return Candidate(name, lambda: build(module()), optional=gpu.is_gpu(device), module=module)

    graphs = (False, True) if gpu.is_gpu(device) else (False,)
    return [
        candidate(backend, (f"{OURS}, {backend}" if place else OURS) + (GRAPH if graph else ""), graph)
        for place, backend in enumerate(backends)
        for graph in graphs
    ]


def _averages(
    module: Callable[[], nn.Module], dtype: torch.dtype, device: torch.device, backend: str
) -> list[Candidate]:
    """Returns contestants that also average the weights: by torch, by timm, ours by torch, and ours by itself."""

    def amp(name: str, averages: Averages) -> Entry:
        sgd, work = partial(torch.optim.SGD, fused=True), with_average(FUSED_WORK, *LERP)
        return grad_scaler(name, module(), device, sgd, work, averages=averages)

    of_ours = [(OURS + AVERAGE, False)] + [(OURS + AVERAGE + GRAPH, True)] * gpu.is_gpu(device)
    builders: dict[str, Callable[[str], Entry]] = {
        FUSED + AVERAGED_MODEL: lambda name: amp(name, averaged_model),
        peers.MODEL_EMA: lambda name: amp(name, peers.model_ema),
        TWIN: lambda name: averaged_twin(name, module(), dtype, device, backend),
        **{
            name: partial(
                _our_average, module=module, dtype=dtype, device=device, backend=backend, graph=graph
            )
            for name, graph in of_ours
        },
    }
    optional = {*builders} if gpu.is_gpu(device) else {peers.MODEL_EMA}
    return [
        Candidate(name, partial(build, name), optional=name in optional, module=module)
        for name, build in builders.items()
    ]


def _our_average(name: str, module: Callable[[], nn.Module], **options: Any) -> Entry:
    return ours(name, module(), average=True, **options)


def _fused_graph(module: Callable[[], nn.Module], device: torch.device) -> Candidate:
    sgd = partial(torch.optim.SGD, fused=True)
    name = f"{FUSED}{GRAPH}"
    return Candidate(
        name,
        lambda: grad_scaler(name, module(), device, sgd, FUSED_WORK, graph=True),
        optional=True,
        module=module,
    )


def _others(module: Callable[[], nn.Module], dtype: torch.dtype, device: torch.device) -> list[Candidate]:
    """Returns the contestants that are compiled, and those of other packages."""
    builders: dict[str, Callable[[str], Entry]] = {
        compiled.SGD: lambda name: compiled.sgd(name, module(), device),
        compiled.MASTERS: lambda name: compiled.masters(name, module(), dtype, device),
        peers.HEAVYBALL: lambda name: peers.heavyball(name, module(), device),
        peers.OPTIMI: lambda name: peers.optimi(name, module(), device),
        peers.OPTIMI_KAHAN: lambda name: peers.optimi_kahan(name, module(), dtype, device),
        peers.SGDW: lambda name: peers.sgdw(name, module(), device),
        peers.BITSANDBYTES: lambda name: peers.bitsandbytes(name, module(), device),
        peers.APEX: lambda name: peers.apex(name, module(), device),
        peers.APEX_MASTERS: lambda name: peers.apex_masters(name, module(), dtype, device),
        peers.TRANSFORMER_ENGINE: lambda name: peers.transformer_engine(name, module(), device),
        peers.FLASHOPTIM: lambda name: peers.flashoptim(
            name, module(), dtype, device, bits=24, work=peers.FLASHOPTIM_WORK
        ),
        peers.FLASHOPTIM_32: lambda name: peers.flashoptim(
            name, module(), dtype, device, bits=32, work=peers.FLASHOPTIM_32_WORK
        ),
    }
    return [
        Candidate(name, partial(build, name), optional=True, module=module)
        for name, build in builders.items()
    ]


def _reason(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError):
        return f"not installed (no module {error.name})"
    if isinstance(error, peers.CannotRun):
        return str(error)
    return f"{type(error).__name__}: {error}".splitlines()[0]
