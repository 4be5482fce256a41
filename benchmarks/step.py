"""Times the optimizer step alone: fused_tricks against `GradScaler` and `torch.optim.SGD` in its three forms.

``python -m benchmarks.step`` measures the times, the bandwidth of our step as a share of a plain copy loop's, and
the host time of a step over many tiny parameters. benchmarks/README.md says how each number is measured.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib import pyplot
from torch import Tensor, nn

import fused_tricks
from benchmarks import machine, parameter_sets, report
from benchmarks.harness import Section, Spread, interleave, ratios
from benchmarks.step_contestants import (
    COPY,
    FOR_LOOP,
    FOREACH,
    FUSED,
    FUSED_CASTS,
    FUSED_NEW_CASTS,
    OURS,
    SCALE,
    cache_eviction,
    casts_in_place,
    casts_to_new,
    loops,
    ours,
    torch_amp,
    traffic,
)

TINY_SET = "synthetic:161:1"


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
    parser.add_argument("--parameters", default="resnet50", metavar="SET", help=f"{sets} or synthetic:N:SIZE")
    parser.add_argument(
        "--dtype", choices=("float16", "bfloat16"), default="float16", help="of our parameters"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument(
        "--host-rounds", type=int, default=500, help="rounds of the step over tiny parameters"
    )
    parser.add_argument(
        "--loop-mib", type=int, default=256, help="size of each buffer of the two plain loops"
    )
    parser.add_argument("--output", type=Path, default=report.RESULTS, metavar="DIR")
    return parser.parse_args(arguments)


def measure_step(
    options: argparse.Namespace,
) -> tuple[dict[str, list[Section]], dict[str, int], list[torch.nn.Parameter]]:
    """Times every contestant and the plain loops on the chosen parameters.

    Returns:
        The samples; the bytes that our step and the loops move; our parameters.
    """
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    cast = fused_tricks.cast_model(parameter_sets.build(options.parameters), dtype)
    parameters = list(cast.parameters())
    low = [parameter.dtype == dtype for parameter in parameters]

    def module() -> nn.Module:
        return parameter_sets.build(options.parameters)

    plain_loops, moved = loops(options.loop_mib, device)
    contestants = [
        torch_amp(FOR_LOOP, module(), device, foreach=False, fused=False),
        torch_amp(FOREACH, module(), device, foreach=True),
        torch_amp(FUSED, module(), device, fused=True),
        torch_amp(FUSED_CASTS, module(), device, casts=casts_in_place(low, dtype), fused=True),
        torch_amp(FUSED_NEW_CASTS, module(), device, casts=casts_to_new(low, dtype), fused=True),
        ours(module(), dtype, device),
        *plain_loops,
    ]
    samples = interleave(
        contestants, rounds=options.rounds, warmup=5, device=device, between=cache_eviction(device)
    )
    return samples, {OURS: traffic(parameters), **moved}, parameters


def measure_host(options: argparse.Namespace) -> dict[str, list[Section]]:
    """Times steps over 161 parameters of one element, where the work is nothing and the calls are all."""
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    contestants = [
        torch_amp(FUSED, parameter_sets.build(TINY_SET), device, fused=True),
        ours(parameter_sets.build(TINY_SET), dtype, device),
    ]
    return interleave(contestants, rounds=options.host_rounds, warmup=20, device=device)


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
            "host µs of our step, 161 one-element parameters",
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


def summarise(
    options: argparse.Namespace,
    arguments: Sequence[str],
    samples: dict[str, list[Section]],
    moved: dict[str, int],
    host_samples: dict[str, list[Section]],
    parameters: Sequence[Tensor],
) -> dict[str, Any]:
    """The result as JSON-able values; every spread is of the rounds."""
    device = torch.device(options.device)
    step = {name: [section.device for section in sections] for name, sections in samples.items()}
    host = {name: [section.host for section in sections] for name, sections in host_samples.items()}
    count = sum(parameter.numel() for parameter in parameters)
    return {
        "benchmark": "step",
        "machine": machine.describe("benchmarks.step", arguments, device),
        "setting": (
            f"{options.parameters}: {count:,} elements in {len(parameters)} parameters, {options.dtype} with "
            f"dynamic loss scaling on {device.type}, {options.rounds} rounds"
        ),
        "contestants": {
            name: {
                "ms": asdict(Spread.of(seconds * 1e3 for seconds in samples_of_name)),
                "ours_is_faster_by": asdict(ratios(samples_of_name, step[OURS])),
            }
            for name, samples_of_name in step.items()
            if name not in (COPY, SCALE)
        },
        "bandwidth": {
            name: {
                "bytes": size,
                "gb_per_second": asdict(Spread.of(size / seconds / 1e9 for seconds in step[name])),
                "share_of_copy": asdict(
                    ratios([size / s for s in step[name]], [moved[COPY] / s for s in step[COPY]])
                ),
            }
            for name, size in moved.items()
        },
        "host": {name: {"us": asdict(Spread.of(s * 1e6 for s in seconds))} for name, seconds in host.items()},
        "budgets": [
            {**asdict(budget), "budget": budget.limit_text, "met": budget.met}
            for budget in budgets(
                step, moved, host, promised=device.type == "cpu" and options.parameters == "resnet50"
            )
        ],
    }


def markdown(result: dict[str, Any]) -> str:
    """The result as a page of tables."""
    steps = [
        [name, Spread(**row["ms"]).text(2), Spread(**row["ours_is_faster_by"]).text(2)]
        for name, row in result["contestants"].items()
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
    hosts = [[name, Spread(**row["us"]).text(1)] for name, row in result["host"].items()]
    promises = [
        [
            row["what"],
            Spread(**row["spread"]).text(row["decimals"]),
            row["budget"],
            "yes" if row["met"] else "**no**",
        ]
        for row in result["budgets"]
    ]
    explanation = (
        "Numbers are median (lower – upper quartile) over rounds; ratios are taken within each round."
    )
    return "\n\n".join(
        [
            "# The optimizer step alone",
            f"{result['setting']}. {explanation}",
            report.table(["what", "measured", "budget", "met"], promises),
            report.table(["contestant", "ms a step", "its time / ours"], steps),
            report.table(["loop", "MB moved", "GB/s", "share of the copy loop"], bandwidths),
            report.table(["host time, 161 one-element parameters", "µs a step"], hosts),
            "![The tables as a picture](step.png)",
            report.machine_note(result["machine"]),
            "benchmarks/README.md says what each number counts.\n",
        ]
    )


def picture(result: dict[str, Any], path: Path) -> None:
    """Three panels: time of a step, bandwidth, host time."""
    figure, panels = pyplot.subplot_mosaic(
        [["time", "bandwidth"], ["time", "host"]],
        figsize=(13, 5.8),
        layout="constrained",
        width_ratios=(1.15, 1),
    )
    for panel, rows, column, title, better, decimals in (
        ("time", result["contestants"], "ms", "Time of a step (ms)", "lower", 1),
        ("bandwidth", result["bandwidth"], "gb_per_second", "Memory bandwidth (GB/s)", "higher", 1),
        ("host", result["host"], "us", "Host time, 161 one-element parameters (µs)", "lower", 0),
    ):
        names = list(rows)
        report.bars(
            panels[panel],
            [Spread(**row[column]) for row in rows.values()],
            report.colours(names, [OURS]),
            title=title,
            better=better,
            decimals=decimals,
        )
        panels[panel].set_yticks(range(len(names)), [name.replace(", with", ",\nwith") for name in names])
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
    samples, moved, parameters = measure_step(options)
    result = summarise(options, arguments, samples, moved, measure_host(options), parameters)
    options.output.mkdir(parents=True, exist_ok=True)
    report.write_json(options.output / "step.json", result)
    (options.output / "step.md").write_text(markdown(result), encoding="utf-8")
    picture(result, options.output / "step.png")
    print(markdown(result))


if __name__ == "__main__":
    main(sys.argv[1:])
