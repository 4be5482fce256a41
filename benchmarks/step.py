"""Times the optimizer step alone: fused_tricks against `GradScaler` and `torch.optim.SGD` in its three forms.

``python -m benchmarks.step`` measures the times, the bandwidth of our step as a share of a plain copy loop's, and
the host time of a step over many tiny parameters. On a GPU it also times replayed CUDA graphs, every GPU backend,
and Apex and FlashOptim where they are installed. benchmarks/README.md says how each number is measured.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib import pyplot
from torch import Tensor

import fused_tricks
from benchmarks import command_line, gpu, machine, parameter_sets, report, step_lineup
from benchmarks.harness import Section, Spread, interleave, ratios
from benchmarks.names import FUSED, OURS
from benchmarks.step_contestants import (
    COPY,
    FUSED_CASTS,
    Work,
    cache_eviction,
    loops,
)

TINY_SET = "synthetic:161:1"
# Steps over tiny parameters that run back to back, so that a sample is of the calls and not of what a cold cache
# costs after the other contestants.
HOST_REPEATS = 20


@dataclass(frozen=True)
class Budget:
    """One promise of the project and what was measured: `spread` of the rounds against `limit`."""

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
        "--dtype", choices=("float16", "bfloat16"), default="float16", help="of our parameters"
    )
    command_line.add_device_to(parser)
    parser.add_argument(
        "--backend",
        action="append",
        metavar="NAME",
        help="of fused_tricks; may be repeated; every one that is usable here and made for the device unless given",
    )
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
    report.add_output_to(parser)
    options = parser.parse_args(arguments)
    command_line.check_backends(parser, options.backend or [], options.device)
    return options


@dataclass(frozen=True)
class Measurement:
    """What a run of the benchmark found.

    Attributes:
        step: the samples of every contestant and of the plain loops on the chosen parameters.
        host: the samples of steps over 161 parameters of one element, back to back.
        host_alternating: the same where every step has new gradients and follows another contestant's.
        works: what each contestant does.
        peaks: bytes of memory of each contestant.
        moved: bytes that each of ours and the plain loops read and write.
        parameters: the chosen ones, as `cast_model` leaves them.
        backend: of the contestant called `OURS`.
        left_out: who could not take part, and why.
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


def measure(options: argparse.Namespace) -> Measurement:
    """Times every contestant and the plain loops on the chosen parameters, and the host on tiny ones."""
    device, dtype = options.device, getattr(torch, options.dtype)
    gpu.use(device)
    backends, left_out = step_lineup.usable_backends(device)
    if options.backend:
        backends, left_out = list(dict.fromkeys(options.backend)), {}

    candidates = step_lineup.of_a_model(options.parameters, dtype, device, backends)
    entries, out_of_step = step_lineup.assemble(candidates, device)
    plain_loops, moved = loops(options.loop_mib, device)
    step = interleave(
        [*(entry.contestant for entry in entries), *plain_loops],
        rounds=options.rounds,
        warmup=5,
        device=device,
        between=cache_eviction(device),
        head_start=True,
    )
    works = {entry.contestant.name: entry.work for entry in entries}
    taking_part = [candidate for candidate in candidates if candidate.name in works]
    del entries, candidates

    candidates = step_lineup.of_tiny_parameters(TINY_SET, dtype, device, backends)
    entries, out_of_host = step_lineup.assemble(candidates, device)
    contestants = [entry.contestant for entry in entries]
    host = interleave(contestants, rounds=options.host_rounds, warmup=5, device=device, repeats=HOST_REPEATS)
    host_alternating = interleave(contestants, rounds=options.host_rounds, warmup=20, device=device)

    peaks = {candidate.name: step_lineup.peak_bytes(candidate, device) for candidate in taking_part}
    cast = fused_tricks.cast_model(parameter_sets.build(options.parameters), dtype)
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
        left_out={**left_out, **out_of_host, **out_of_step},
    )


def budgets(
    step: dict[str, list[float]], moved: dict[str, int], host: dict[str, list[float]], *, promised: bool
) -> list[Budget]:
    """What is promised, and how the measurement stands to it.

    Args:
        step: seconds of every contestant, by round.
        moved: bytes that our step and the plain loops read and write.
        host: host seconds of the two contestants on tiny parameters, by round.
        promised: whether the parameters and the device are those that the promises about the step are for.
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
    return [
        Budget("speed over torch.amp, fused", ratios(step[FUSED], step[OURS]), 1.25, True, 2),
        Budget("speed over torch.amp, fused, with casts", ratios(step[FUSED_CASTS], step[OURS]), 2, True, 2),
        Budget("our bandwidth / copy loop's", ratios(bandwidth[OURS], bandwidth[COPY]), 0.85, True, 2),
        *host_budgets,
    ]


def summarise(options: argparse.Namespace, arguments: Sequence[str], found: Measurement) -> dict[str, Any]:
    """The result as JSON-able values; every spread is of the rounds."""
    device = options.device
    step = {name: [section.device for section in sections] for name, sections in found.step.items()}
    host = {name: [section.host for section in sections] for name, sections in found.host.items()}
    alternating = {
        name: [section.host for section in sections] for name, sections in found.host_alternating.items()
    }
    count = sum(parameter.numel() for parameter in found.parameters)
    return {
        "benchmark": "step",
        "machine": machine.describe("benchmarks.step", arguments, device),
        "setting": (
            f"{options.parameters}: {count:,} elements in {len(found.parameters)} parameters, {options.dtype} with "
            f"dynamic loss scaling on {device.type} (backend {found.backend}), {options.rounds} rounds"
        ),
        "contestants": {
            name: {
                "ms": asdict(Spread.of(seconds * 1e3 for seconds in step[name])),
                "ours_is_faster_by": asdict(ratios(step[name], step[OURS])),
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
        ],
    }


def markdown(result: dict[str, Any]) -> str:
    """The result as a page of tables."""
    on_gpu = result["machine"]["gpu"] is not None
    steps = [
        [
            name,
            Spread(**row["ms"]).text(3 if on_gpu else 2),
            Spread(**row["ours_is_faster_by"]).text(2),
            *([f"{row['rounds_that_waited_for_the_host'] / row['ms']['samples']:.0%}"] if on_gpu else []),
        ]
        for name, row in result["contestants"].items()
    ]
    step_header = ["contestant", "ms a step", "its time / ours", *(["waited for the host"] if on_gpu else [])]
    works = [
        [
            name,
            f"{row['work']['low_bytes']:g}",
            f"{row['work']['fp32_bytes']:g}",
            f"{row['bytes'] / 1e6:,.1f}",
            f"{row['peak_memory_bytes'] / 1e6:,.1f}",
            row["work"]["keeps"],
            row["work"]["overflow"],
        ]
        for name, row in result["contestants"].items()
    ]
    work_header = [
        "what a step does",
        "bytes, 16-bit element",
        "bytes, FP32 element",
        "MB moved",
        "peak memory, MB",
        "keeps",
        "unscales and skips",
    ]
    bandwidths = [
        [
            name,
            f"{row['bytes'] / 1e6:,.1f}",
            Spread(**row["gb_per_second"]).text(1),
            Spread(**row["share_of_copy"]).text(2),
        ]
        for name, row in result["bandwidth"].items()
    ]
    hosts = [
        [name, Spread(**row["us"]).text(1), Spread(**row["alternating_us"]).text(1)]
        for name, row in result["host"].items()
    ]
    promises = [
        [
            row["what"],
            Spread(**row["spread"]).text(row["decimals"]),
            row["budget"],
            "yes" if row["met"] else "**no**",
        ]
        for row in result["budgets"]
    ]
    left_out = "\n".join(f"- {name}: {reason}" for name, reason in result["left_out"].items())
    explanation = (
        "Numbers are median (lower – upper quartile) over rounds; ratios are taken within each round."
    )
    return "\n\n".join(
        [
            "# The optimizer step alone",
            f"{result['setting']}. {explanation}",
            report.table(["what", "measured", "budget", "met"], promises),
            report.table(step_header, steps),
            *([f"Not measured:\n\n{left_out}"] if left_out else []),
            report.table(work_header, works),
            report.table(["loop", "MB moved", "GB/s", "share of the copy loop"], bandwidths),
            report.table(
                [
                    "host time, 161 one-element parameters",
                    "µs a step, back to back",
                    "µs a step, new gradients, after another's",
                ],
                hosts,
            ),
            "![The tables as a picture](step.png)",
            report.machine_note(result["machine"]),
            "benchmarks/README.md says what each number counts.\n",
        ]
    )


def picture(result: dict[str, Any], path: Path) -> None:
    """Three panels: time of a step, bandwidth, host time."""
    on_gpu = result["machine"]["gpu"] is not None
    figure, panels = pyplot.subplot_mosaic(
        [["time", "bandwidth"], ["time", "host"]],
        figsize=(13, max(5.8, 1.6 + 0.5 * len(result["contestants"]))),
        layout="constrained",
        width_ratios=(1.15, 1),
    )
    for panel, rows, column, title, better, decimals in (
        ("time", result["contestants"], "ms", "Time of a step (ms)", "lower", 2 if on_gpu else 1),
        ("bandwidth", result["bandwidth"], "gb_per_second", "Memory bandwidth (GB/s)", "higher", 1),
        ("host", result["host"], "us", "Host time, 161 one-element parameters (µs)", "lower", 0),
    ):
        names = list(rows)
        report.bars(
            panels[panel],
            [Spread(**row[column]) for row in rows.values()],
            report.colours(names, [name for name in names if name.startswith(OURS)]),
            title=title,
            better=better,
            decimals=decimals,
        )
        panels[panel].set_yticks(
            range(len(names)), [re.sub(", (?=with|CUDA)", ",\n", name) for name in names]
        )
    report.save_figure(
        figure,
        path,
        "The optimizer step alone: fused_tricks and torch.amp",
        result["setting"] + ". Bars are medians, black lines quartiles.",
        result["machine"],
    )


def main(arguments: Sequence[str]) -> None:
    """Measures, and writes step.json, step.md and step.png."""
    options = parse(arguments)
    result = summarise(options, arguments, measure(options))
    report.write(options.output, result, markdown(result), picture)


if __name__ == "__main__":
    main(sys.argv[1:])
