"""Times the optimizer step alone: fused_tricks against `GradScaler` and `torch.optim.SGD` in its three forms.

`python -m benchmarks.step` measures the times, the bandwidth of our step as a share of a copy loop's bandwidth, and
the host time of a step over many tiny parameters. Compiled steps and the optimizers of other packages that are
installed take part. On a GPU it also times replayed CUDA graphs and every GPU backend. The numbers of every contestant
are checked before it is timed. benchmarks/README.md describes each measurement.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

import fused_tricks
from benchmarks.lib import backend_choice, command_line, gpu, machine, parameter_sets, progress, report
from benchmarks.lib.harness import Section, Spread, interleave, ratios
from benchmarks.lib.names import AVERAGE, FUSED, OURS
from benchmarks.step import compiled, lineup, page, peers
from benchmarks.step.check import Check
from benchmarks.step.contestants import (
    COPY,
    FUSED_CASTS,
    SCALE,
    Work,
    cache_eviction,
    loops,
)

TINY_SET = "synthetic:161:1"
# Steps over tiny parameters run back to back, so that a sample measures the calls and not the cold caches after another
# contestant.
HOST_REPEATS = 20


@dataclass(frozen=True)
class Budget:
    """One promise of the project and its measurement: `spread` of the rounds against `limit`."""

    what: str
    spread: Spread
    limit: float
    at_least: bool
    decimals: int

    @property
    def met(self) -> bool:
        return self.spread.median >= self.limit if self.at_least else self.spread.median <= self.limit

    @property
    def limit_text(self) -> str:
        return f"{'≥' if self.at_least else '≤'} {self.limit:g}"


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.step",
        description="Times the optimizer step of torch.amp and of fused_tricks.",
    )
    sets = ", ".join(parameter_sets.MODELS)
    parser.add_argument(
        "--parameters",
        type=command_line.parameter_set,
        default="resnet50",
        metavar="SET",
        help=f"{sets} or synthetic:N:SIZE",
    )
    parser.add_argument(
        "--dtype", choices=("float16", "bfloat16"), default="float16", help="dtype of our parameters"
    )
    command_line.add_device_to(parser)
    backend_choice.add_to(parser)
    parser.add_argument("--rounds", type=command_line.positive, default=60)
    parser.add_argument(
        "--host-rounds",
        type=command_line.positive,
        default=200,
        help="rounds of the step over tiny parameters",
    )
    parser.add_argument(
        "--loop-mib",
        type=command_line.positive,
        default=256,
        help="size of each buffer of the two plain loops",
    )
    parser.add_argument(
        "--no-compiled",
        dest="compiled",
        action="store_false",
        help="leave out the contestants that torch.compile compiles, which can take minutes",
    )
    parser.add_argument(
        "--budgets",
        action="store_true",
        help="compare with the limits that the developers set for themselves",
    )
    report.add_output_to(parser)
    options = parser.parse_args(arguments)
    options.backends, options.unusable = backend_choice.choose(parser, options.backend, options.device)
    return options


@dataclass(frozen=True)
class Measurement:
    """The result of one run.

    Attributes:
        step: The samples of every contestant and of the plain loops on the chosen parameters.
        host: The samples of steps over 161 parameters of one element, back to back.
        host_alternating: The same, where every step has new gradients and follows another contestant's step.
        works: The work of each contestant.
        peaks: The peak memory of each contestant, in bytes.
        moved: The bytes that our contestants and the plain loops read and write.
        parameters: The chosen parameters, as `cast_model` leaves them.
        backend: The backend of the contestant `OURS`.
        left_out: The contestants that could not take part, and the reasons.
        checks: The outcome of the check of each contestant.
        compile_seconds: The time of compilation, of the contestants that compile.
    """

    step: dict[str, list[Section]]
    host: dict[str, list[Section]]
    host_alternating: dict[str, list[Section]]
    works: dict[str, Work]
    peaks: dict[str, int]
    moved: dict[str, int]
    parameters: Sequence[Tensor]
    backend: str
    left_out: dict[str, str]
    checks: dict[str, Check]
    compile_seconds: dict[str, float]


def measure(options: argparse.Namespace) -> Measurement:
    """Times every contestant and the plain loops on the chosen parameters, and the host on tiny ones."""
    device, dtype = options.device, getattr(torch, options.dtype)
    gpu.use(device)
    backends = options.backends
    left_out = {f"{OURS}, {name}": reason for name, reason in options.unusable.items()}
    plain_loops, moved = loops(options.loop_mib, device)
    elements = parameter_sets.count(options.parameters)
    candidates, too_large = lineup.fitting(
        lineup.of_a_model(
            options.parameters, dtype, device, backends, compiles=options.compiled, averages=True
        ),
        elements,
        device,
    )
    if OURS in too_large:
        raise SystemExit(f"--parameters {options.parameters}: {too_large[OURS]}")
    entries, out_of_step = lineup.assemble(candidates, device)
    step = interleave(
        [*(entry.contestant for entry in entries), *plain_loops],
        rounds=options.rounds,
        warmup=5,
        device=device,
        between=cache_eviction(device),
        head_start=True,
        shown_as="steps",
    )
    checks = {entry.contestant.name: entry.checked for entry in entries if entry.checked}
    works = {entry.contestant.name: entry.work for entry in entries}
    compile_seconds = {
        entry.contestant.name: entry.compile_seconds for entry in entries if entry.compile_seconds is not None
    }
    taking_part = [candidate for candidate in candidates if candidate.name in works]
    del entries, candidates

    candidates = lineup.of_tiny_parameters(TINY_SET, dtype, device, backends)
    entries, out_of_host = lineup.assemble(candidates, device)
    contestants = [entry.contestant for entry in entries]
    rounds = options.host_rounds
    host = interleave(
        contestants,
        rounds=rounds,
        warmup=min(5, rounds),
        device=device,
        repeats=HOST_REPEATS,
        shown_as="host time",
    )
    host_alternating = interleave(
        contestants, rounds=rounds, warmup=min(20, rounds), device=device, shown_as="host time, new gradients"
    )

    peaks = {
        candidate.name: lineup.peak_bytes(candidate, device)
        for candidate in progress.bar(taking_part, desc="peak memory")
    }
    meta = parameter_sets.build(options.parameters, torch.device("meta"))
    cast = fused_tricks.cast_model(meta, dtype)
    parameters = list(cast.parameters())
    ours = {name: work.traffic(parameters) for name, work in works.items() if name.startswith(OURS)}
    return Measurement(
        step=step,
        host=host,
        host_alternating=host_alternating,
        works=works,
        peaks=peaks,
        moved={**ours, **moved},
        parameters=parameters,
        backend=backends[0],
        left_out={**left_out, **too_large, **out_of_host, **out_of_step},
        checks=checks,
        compile_seconds=compile_seconds,
    )


def budgets(
    step: dict[str, list[float]], moved: dict[str, int], host: dict[str, list[float]], *, promised: bool
) -> list[Budget]:
    """Returns the promises and their measurements.

    Args:
        step: The seconds of every contestant, by round.
        moved: The bytes that our step and the plain loops read and write.
        host: The host seconds of the two contestants on tiny parameters, by round.
        promised: True if the promises about the step apply to these parameters and this device.
    """
    host_budgets = [
        Budget(
            "host µs of our step, 161 one-element parameters, back to back",
            Spread.of(s * 1e6 for s in host[OURS]),
            25,
            False,
            1,
        ),
        Budget("the same as a share of torch.amp, fused", ratios(host[OURS], host[FUSED]), 0.1, False, 3),
    ]
    if not promised:
        return host_budgets
    bandwidth = {name: [size / seconds for seconds in step[name]] for name, size in moved.items()}
    speeds = (
        ("torch.amp, fused", FUSED, 1.4),
        ("torch.amp, fused, with casts", FUSED_CASTS, 2.2),
        ("masters by hand under torch.compile", compiled.MASTERS, 1.2),
    )
    return [
        *(
            Budget(f"speed over {who}", ratios(step[name], step[OURS]), limit, True, 2)
            for who, name, limit in speeds
            if name in step
        ),
        Budget("our bandwidth / in-place loop's", ratios(bandwidth[OURS], bandwidth[SCALE]), 0.9, True, 2),
        *host_budgets,
    ]


def summarise(options: argparse.Namespace, arguments: Sequence[str], found: Measurement) -> dict[str, Any]:
    """Returns the result as JSON-able values. Every spread is over the rounds."""
    device = options.device
    step = {name: [section.device for section in sections] for name, sections in found.step.items()}
    host = {name: [section.host for section in sections] for name, sections in found.host.items()}
    alternating = {
        name: [section.host for section in sections] for name, sections in found.host_alternating.items()
    }
    count = sum(parameter.numel() for parameter in found.parameters)
    compared_with = {name: OURS + AVERAGE if work.averages else OURS for name, work in found.works.items()}
    described = machine.describe("benchmarks.step", arguments, device, versions=peers.versions())
    return {
        "benchmark": "step",
        "machine": described,
        "setting": (
            f"{options.parameters}: {count:,} elements in {len(found.parameters)} parameters, {options.dtype} with "
            f"dynamic loss scaling on {device.type} (backend {found.backend}), {options.rounds} rounds"
        ),
        "contestants": {
            name: {
                "ms": asdict(Spread.of(seconds * 1e3 for seconds in step[name])),
                "ours_is_faster_by": asdict(ratios(step[name], step[compared_with[name]]))
                if compared_with[name] in step
                else None,
                "check": found.checks[name].text,
                "compile_seconds": found.compile_seconds.get(name),
                "rounds_that_waited_for_the_host": sum(section.waited for section in found.step[name]),
                "bytes": work.traffic(found.parameters),
                "peak_memory_bytes": found.peaks[name],
                "work": asdict(work),
            }
            for name, work in found.works.items()
        },
        "samples_ms": {
            name: [float(f"{seconds * 1e3:.6g}") for seconds in samples] for name, samples in step.items()
        },
        "left_out": found.left_out,
        "bandwidth": {
            name: {
                "bytes": size,
                "gb_per_second": asdict(Spread.of(size / seconds / 1e9 for seconds in step[name])),
                "share_of_copy": asdict(
                    ratios([size / s for s in step[name]], [found.moved[COPY] / s for s in step[COPY]])
                ),
            }
            for name, size in found.moved.items()
        },
        "host": {
            name: {
                "us": asdict(Spread.of(s * 1e6 for s in seconds)),
                "alternating_us": asdict(Spread.of(s * 1e6 for s in alternating[name])),
            }
            for name, seconds in host.items()
        },
        "budgets": [
            {**asdict(budget), "budget": budget.limit_text, "met": budget.met}
            for budget in budgets(
                step, found.moved, host, promised=device.type == "cpu" and options.parameters == "resnet50"
            )
        ]
        if options.budgets and OURS in step
        else [],
    }


def main(arguments: Sequence[str]) -> None:
    """Measures the step and writes step.json, step.md and step.png."""
    options = parse(arguments)
    with compiled.cold_cache():
        result = summarise(options, arguments, measure(options))
    report.write(options.output, result, page.markdown(result), page.picture)


if __name__ == "__main__":
    main(sys.argv[1:])
