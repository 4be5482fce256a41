"""The cost of an optimizer step on many sets of parameters: well-known networks, many tensors, many elements.

`python -m benchmarks.step.sizes` times the contestants of `benchmarks.step` on each set, beside the time of our step's
bytes at the bandwidth of the in-place loop. benchmarks/README.md describes each measurement.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

import fused_tricks
from benchmarks.lib import backend_choice, command_line, gpu, machine, parameter_sets, progress, report
from benchmarks.lib.harness import Contestant, Spread, interleave, ratios
from benchmarks.lib.names import OURS
from benchmarks.step import compiled, lineup, peers, sizes_page
from benchmarks.step.contestants import COPY, SCALE, cache_eviction, loops
from benchmarks.step.sizes_page import ELEMENT_TENSORS, TENSOR_SIZE

MODELS = ("resnet18", "resnet50", "resnet152", "mobilenet_v3_large", "vit_b_16")
TENSOR_COUNTS = (1, 10, 100, 1_000, 10_000, 100_000)
ELEMENT_COUNTS = (10**3, 10**4, 10**5, 10**6, 10**7, 10**8)
MOST_COMPILED = 100
"""The most tensors of a set that is compiled: the time of compilation grows with their number."""


@dataclass(frozen=True)
class Point:
    """One set of parameters and its measurements.

    Attributes:
        name: The name of the set, as `parameter_sets.build` knows it.
        tensors: The number of parameters.
        elements: The number of elements of all parameters.
        rounds: The number of rounds.
        ms: Milliseconds of a step, by contestant.
        speed: The time of each contestant over ours, round by round.
        host_us: Microseconds until the calls of a step returned, by contestant; on a GPU only.
        loop_ms: Milliseconds of the plain loops, which take their turns.
        bytes: The bytes that our step reads and writes.
        gb_per_second: The bandwidth of our step.
        share_of_copy: The same over the bandwidth of the copy loop, round by round.
        limit_ms: The time of our bytes at the bandwidth of the in-place loop.
        peak_memory_bytes: The peak memory by contestant; for networks only.
        left_out: The contestants that could not take part, and the reasons.
        checks: The outcome of the check of each contestant.
        compile_seconds: The time of compilation, of the contestants that compile.
    """

    name: str
    tensors: int
    elements: int
    rounds: int
    ms: dict[str, Spread]
    speed: dict[str, Spread]
    host_us: dict[str, Spread]
    loop_ms: dict[str, Spread]
    bytes: int
    gb_per_second: Spread
    share_of_copy: Spread
    limit_ms: float
    peak_memory_bytes: dict[str, int]
    left_out: dict[str, str]
    checks: dict[str, str]
    compile_seconds: dict[str, float]


class NotMeasured(Exception):
    """A set of parameters cannot be measured here, with the reason."""


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.step.sizes",
        description="Times the optimizer step of torch.amp and of fused_tricks on many sets of parameters.",
    )
    parser.add_argument(
        "--models", nargs="*", type=command_line.parameter_set, default=list(MODELS), metavar="NAME"
    )
    parser.add_argument(
        "--tensor-counts", nargs="*", type=command_line.positive, default=list(TENSOR_COUNTS), metavar="N"
    )
    parser.add_argument(
        "--element-counts", nargs="*", type=_elements, default=list(ELEMENT_COUNTS), metavar="N"
    )
    parser.add_argument("--dtype", choices=("float16", "bfloat16"), default="float16")
    command_line.add_device_to(parser)
    parser.add_argument(
        "--seconds",
        type=command_line.positive_number,
        default=10.0,
        help="of timed steps on each set, approximately",
    )
    parser.add_argument(
        "--most-rounds",
        type=command_line.positive,
        default=100,
        help="the most rounds on each set; at least 5 run",
    )
    parser.add_argument(
        "--loop-mib", type=command_line.positive, default=256, help="size of each buffer of the copy loop"
    )
    parser.add_argument(
        "--no-compiled",
        dest="compiled",
        action="store_false",
        help=f"leave out the contestants that torch.compile compiles, also on sets of up to {MOST_COMPILED} tensors",
    )
    backend_choice.add_to(parser)
    report.add_output_to(parser)
    options = parser.parse_args(arguments)
    options.backends, options.unusable = backend_choice.choose(parser, options.backend, options.device)
    return options


def _elements(text: str) -> int:
    """Returns a number of elements that is a multiple of `ELEMENT_TENSORS`."""
    value = int(text)
    if value < 1 or value % ELEMENT_TENSORS:
        raise argparse.ArgumentTypeError(f"must be a positive multiple of {ELEMENT_TENSORS}, got {text}")
    return value


def measure(
    name: str,
    options: argparse.Namespace,
    plain_loops: Sequence[Contestant],
    moved: dict[str, int],
    *,
    with_memory: bool,
) -> Point:
    """Times all contestants on one set of parameters.

    Args:
        name: The name of the set.
        options: The command line.
        plain_loops: The plain loops, which take their turns.
        moved: The bytes that each plain loop reads and writes.
        with_memory: True also measures the peak memory, which is slow for many tensors.
    """
    device, dtype = options.device, getattr(torch, options.dtype)
    meta = parameter_sets.build(name, torch.device("meta"))
    parameters = list(fused_tricks.cast_model(meta, dtype).parameters())
    compiles = options.compiled and len(parameters) <= MOST_COMPILED
    # torch compiles a function at most eight times, and runs it as it is from then on.
    torch.compiler.reset()
    candidates, too_large = lineup.fitting(
        lineup.of_a_model(name, dtype, device, options.backends, compiles=compiles),
        parameter_sets.count(name),
        device,
    )
    if options.compiled and not compiles:
        why = f"compiled only for sets of at most {MOST_COMPILED} tensors"
        too_large |= dict.fromkeys(lineup.COMPILED, why)
    if not candidates:
        raise NotMeasured(next(iter(too_large.values())))
    entries, left_out = lineup.assemble(candidates, device)
    if OURS not in (entry.contestant.name for entry in entries):
        raise NotMeasured(f"{OURS}: {left_out[OURS]}")
    contestants = [*(entry.contestant for entry in entries), *plain_loops]
    evict = cache_eviction(device)
    trial = interleave(contestants, rounds=1, warmup=1, device=device, between=evict, shown_as=name)
    seconds = sum(section.host for (section,) in trial.values())
    rounds = max(5, min(options.most_rounds, round(options.seconds / seconds)))
    sections = interleave(
        contestants,
        rounds=rounds,
        warmup=1,
        device=device,
        between=evict,
        head_start=True,
        shown_as=name,
    )
    times = {who: [section.device for section in found] for who, found in sections.items()}
    # On an idle device: a contestant that reads found_inf on the host would also wait for the head start.
    hosts = interleave(contestants, rounds=rounds, warmup=1, device=device) if gpu.is_gpu(device) else {}
    loop_times = {loop.name: times.pop(loop.name) for loop in plain_loops}
    checks = {entry.contestant.name: entry.checked.text for entry in entries if entry.checked}
    compile_seconds = {
        entry.contestant.name: entry.compile_seconds for entry in entries if entry.compile_seconds is not None
    }
    (ours,) = (entry.work.traffic(parameters) for entry in entries if entry.contestant.name == OURS)

    del entries, contestants
    peaks = {
        candidate.name: lineup.peak_bytes(candidate, device)
        for candidate in candidates
        if with_memory and candidate.name in times
    }
    bandwidth = [ours / seconds for seconds in times[OURS]]
    return Point(
        name,
        len(parameters),
        sum(parameter.numel() for parameter in parameters),
        rounds,
        {who: Spread.of(s * 1e3 for s in found) for who, found in times.items()},
        {who: ratios(found, times[OURS]) for who, found in times.items()},
        {who: Spread.of(s.host * 1e6 for s in hosts[who]) for who in times if who in hosts},
        {who: Spread.of(s * 1e3 for s in found) for who, found in loop_times.items()},
        ours,
        Spread.of(rate / 1e9 for rate in bandwidth),
        ratios(bandwidth, [moved[COPY] / seconds for seconds in loop_times[COPY]]),
        Spread.of(loop_times[SCALE]).median * ours / moved[SCALE] * 1e3,
        peaks,
        {**{f"{OURS}, {each}": reason for each, reason in options.unusable.items()}, **too_large, **left_out},
        checks,
        compile_seconds,
    )


def sweeps(options: argparse.Namespace) -> Iterator[tuple[dict[str, list[Point]], dict[str, str]]]:
    """Measures the sets of each kind: networks, growing numbers of tensors, growing numbers of elements.

    Yields:
        After each set all results so far: a point for each set, by kind; and by name of the set, the reasons for sets
        that were not measured.
    """
    device = options.device
    gpu.use(device)
    plain_loops, moved = loops(options.loop_mib, device)
    names = {
        "models": options.models,
        "tensors": [f"synthetic:{count}:{TENSOR_SIZE}" for count in options.tensor_counts],
        "elements": [
            f"synthetic:{ELEMENT_TENSORS}:{count // ELEMENT_TENSORS}" for count in options.element_counts
        ],
    }
    points: dict[str, list[Point]] = {kind: [] for kind in names}
    skipped = {}
    shown = progress.bar(desc="sets", total=sum(map(len, names.values())), unit="set")
    for kind, of_kind in names.items():
        for name in of_kind:
            try:
                point = measure(name, options, plain_loops, moved, with_memory=kind == "models")
            except NotMeasured as reason:
                skipped[name] = str(reason)
            else:
                points[kind].append(point)
            shown.update()
            yield points, skipped
    shown.close()


def summarise(
    options: argparse.Namespace,
    arguments: Sequence[str],
    found: dict[str, list[Point]],
    skipped: dict[str, str],
) -> dict[str, Any]:
    """Returns the result as JSON-able values."""
    device = options.device
    return {
        "benchmark": "step_sizes",
        "machine": machine.describe("benchmarks.step.sizes", arguments, device, versions=peers.versions()),
        "setting": f"{options.dtype} with dynamic loss scaling on {device.type}",
        "skipped": skipped,
        "sweeps": {kind: [asdict(point) for point in points] for kind, points in found.items()},
    }


def main(arguments: Sequence[str]) -> None:
    """Measures the sets and writes step_sizes.json, step_sizes.md and step_sizes.png."""
    options = parse(arguments)
    result: dict[str, Any] = {}
    with compiled.cold_cache():
        for points, skipped in sweeps(options):
            # A stopped run keeps the results so far.
            result = summarise(options, arguments, points, skipped)
            report.write_json(options.output / "step_sizes.json", result)
            (options.output / "step_sizes.md").write_text(sizes_page.markdown(result), encoding="utf-8")
    report.write(
        options.output,
        result,
        sizes_page.markdown(result),
        sizes_page.picture if sizes_page.drawn(result) else None,
    )


if __name__ == "__main__":
    main(sys.argv[1:])
