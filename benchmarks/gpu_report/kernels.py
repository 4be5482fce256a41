"""The device time of our step and of each of its kernels, beside the expected time of its bytes.

`python -m benchmarks.gpu_report.kernels` measures them. benchmarks/README.md describes the measurement, and has
estimates for an H100.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, supported_activities

import fused_tricks
from benchmarks.lib import backend_choice, command_line, gpu, machine, parameter_sets, progress, report
from benchmarks.lib.harness import Spread, interleave
from benchmarks.lib.names import GRAPH
from benchmarks.step import lineup as step_lineup
from benchmarks.step.contestants import COPY, OUR_WORK, Entry, cache_eviction, loops, ours

SETS = ("resnet18", "resnet50", "vit_b_16")
OPTIONS: dict[str, dict[str, Any]] = {"loss scale": {}, "loss scale, norm": {"max_grad_norm": math.inf}}
KERNELS = ("scan", "decide", "update", "write")
MOST_OVER_COPY = 1.15
"""The longest expected time of a step, as a multiple of a copy of the same number of bytes."""


def candidates(name: str, device: torch.device, backends: Sequence[str]) -> list[step_lineup.Candidate]:
    """Returns our step on one set of parameters, by each backend, called and replayed."""
    module = partial(parameter_sets.build, name, device)
    graphs = (False, True) if gpu.is_gpu(device) else (False,)
    found = []
    for backend in backends:
        for said, options in OPTIONS.items():
            for graph in graphs:
                who = f"{backend}, {said}{GRAPH if graph else ''}"
                build = partial(
                    ours, who, dtype=torch.float16, device=device, backend=backend, graph=graph, **options
                )
                found.append(
                    step_lineup.Candidate(who, partial(_build, build, module), optional=True, module=module)
                )
    return found


def _build(build: Callable[..., Entry], module: Callable[[], torch.nn.Module]) -> Entry:
    return build(module=module())


def kernel_times(run: Callable[[], object], evict: Callable[[], object], times: int) -> dict[str, float]:
    """Returns the median microseconds of each kernel of a step with cold caches, as the driver reports them.

    The dict is empty if torch's profiler sees no GPU.
    """
    if ProfilerActivity.CUDA not in supported_activities():
        return {}
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        for _ in range(times):
            evict()
            run()
        torch.cuda.synchronize()
    found: dict[str, list[float]] = {}
    for event in profiled.events() or []:
        for kernel in KERNELS:
            if event.device_type.name == "CUDA" and f"{kernel}_kernel" in event.name:
                found.setdefault(kernel, []).append(event.time_range.elapsed_us())
    return {kernel: statistics.median(durations) for kernel, durations in found.items()}


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Times our step on one set of parameters beside the copy loop."""
    device = options.device
    entries, left_out = step_lineup.assemble(candidates(name, device, options.backends), device)
    plain_loops, moved = loops(options.loop_mib, device)
    evict = cache_eviction(device)
    sections = interleave(
        [*(entry.contestant for entry in entries), *plain_loops],
        rounds=options.rounds,
        warmup=3,
        device=device,
        between=evict,
        head_start=True,
        shown_as=name,
    )
    times = {who: Spread.of(section.device for section in found) for who, found in sections.items()}
    meta = parameter_sets.build(name, torch.device("meta"))
    size = OUR_WORK.traffic(fused_tricks.cast_model(meta, torch.float16).parameters())
    copied = moved[COPY] / times[COPY].median
    kernels = {}
    if gpu.is_gpu(device):
        for entry in entries:
            kernels[entry.contestant.name] = kernel_times(entry.contestant.run, evict, options.rounds)
    return {
        "set": name,
        "bytes": size,
        "copy_tb_per_second": copied / 1e12,
        "expected_us": [size / copied * 1e6, size / copied * 1e6 * MOST_OVER_COPY],
        "steps": {
            entry.contestant.name: {
                "us": asdict(Spread.of(section.device * 1e6 for section in sections[entry.contestant.name])),
                "share_of_copy": size / times[entry.contestant.name].median / copied,
                "kernels_us": kernels.get(entry.contestant.name, {}),
                "check": entry.checked.text if entry.checked else "not checked",
            }
            for entry in entries
        },
        "left_out": left_out,
    }


def markdown(result: dict[str, Any]) -> str:
    """Returns the page with one table."""
    header = ["set", "step", "µs", "expected µs", "share of the copy loop"]
    header += [*(f"{kernel}, µs" for kernel in KERNELS), "numbers checked"]
    rows = []
    for point in result["sets"]:
        expected = " – ".join(f"{value:,.0f}" for value in point["expected_us"])
        for who, row in point["steps"].items():
            kernels = [row["kernels_us"].get(kernel) for kernel in KERNELS]
            rows.append(
                [
                    point["set"],
                    who,
                    Spread(**row["us"]).text(1),
                    expected,
                    f"{row['share_of_copy']:.2f}",
                    *("–" if duration is None else f"{duration:.1f}" for duration in kernels),
                    row["check"],
                ]
            )
        for who, why in point["left_out"].items():
            rows.append([point["set"], who, why, *["–"] * (len(header) - 4), "**no**"])
    return "\n\n".join(
        [
            "# The kernels of our step",
            f"{result['setting']}. Numbers are median (lower – upper quartile) over rounds, with cold caches. "
            "*Expected* is the time of the step's bytes at the bandwidth of the copy loop in this run, and "
            f"{MOST_OVER_COPY - 1:.0%} more.",
            report.table(header, rows),
            report.machine_note(result["machine"]) + "\n",
        ]
    )


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_report.kernels", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument(
        "--sets", nargs="+", type=command_line.parameter_set, default=list(SETS), metavar="SET"
    )
    parser.add_argument("--rounds", type=command_line.positive, default=30)
    parser.add_argument(
        "--loop-mib", type=command_line.positive, default=1024, help="size of each buffer of the copy loop"
    )
    command_line.add_device_to(parser)
    backend_choice.add_to(parser)
    report.add_output_to(parser)
    options = parser.parse_args(arguments)
    options.backends, _ = backend_choice.choose(parser, options.backend, options.device)
    return options


def main(arguments: Sequence[str]) -> None:
    """Measures the kernels and writes gpu_kernels.json and gpu_kernels.md."""
    options = parse(arguments)
    gpu.use(options.device)
    result = {
        "benchmark": "gpu_kernels",
        "machine": machine.describe("benchmarks.gpu_report.kernels", arguments, options.device),
        "setting": f"float16 with dynamic loss scaling on {options.device.type}, {options.rounds} rounds",
        "sets": [measure(name, options) for name in progress.bar(options.sets, desc="sets")],
    }
    report.write(options.output, result, markdown(result))


if __name__ == "__main__":
    main(sys.argv[1:])
