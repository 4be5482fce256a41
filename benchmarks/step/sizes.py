"""The cost of an optimizer step on many sets of parameters: well-known networks, many tensors, many elements.

`python -m benchmarks.step.sizes` times the contestants of `benchmarks.step` on each set, beside the time of our step's
bytes at the bandwidth of the in-place loop. benchmarks/README.md describes each measurement.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import fused_tricks
from benchmarks.lib import backend_choice, command_line, gpu, machine, parameter_sets, progress, report
from benchmarks.lib.harness import Contestant, Spread, interleave, ratios
from benchmarks.lib.names import OURS
from benchmarks.step import lineup
from benchmarks.step.contestants import CASTS, COPY, SCALE, cache_eviction, loops

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MODELS = ("resnet18", "resnet50", "resnet152", "mobilenet_v3_large", "vit_b_16")
TENSOR_COUNTS = (1, 10, 100, 1_000, 10_000, 100_000)
TENSOR_SIZE = 100
ELEMENT_COUNTS = (10**3, 10**4, 10**5, 10**6, 10**7, 10**8)
ELEMENT_TENSORS = 100


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
    candidates, too_large = lineup.fitting(
        lineup.of_a_model(name, dtype, device, options.backends), parameter_sets.count(name), device
    )
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
    meta = parameter_sets.build(name, torch.device("meta"))
    parameters = list(fused_tricks.cast_model(meta, dtype).parameters())
    checks = {entry.contestant.name: entry.checked.text for entry in entries if entry.checked}
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
        "machine": machine.describe("benchmarks.step.sizes", arguments, device),
        "setting": f"{options.dtype} with dynamic loss scaling on {device.type}",
        "skipped": skipped,
        "sweeps": {kind: [asdict(point) for point in points] for kind, points in found.items()},
    }


HEADINGS = {
    "models": "Networks",
    "tensors": f"More tensors, of {TENSOR_SIZE} elements each",
    "elements": f"More elements, in {ELEMENT_TENSORS} tensors",
}


def markdown(result: dict[str, Any]) -> str:
    """Returns the page of the result: for each kind of set the times, and their ratios to ours."""
    parts = [
        "# The optimizer step on many sets of parameters",
        f"{result['setting']}. Numbers are median (lower – upper quartile) over rounds; ratios are taken within each "
        "round. *Limit* is the time that the bytes of our step take at the bandwidth of the in-place loop.",
    ]
    if _drawn(result):
        parts.append("![The sweeps as a picture](step_sizes.png)")
    for kind, points in result["sweeps"].items():
        if not points:
            continue
        names = list(dict.fromkeys(name for point in points for name in point["ms"]))
        head = [[point["name"], f"{point['tensors']:,}", f"{point['elements']:,}"] for point in points]
        times = [
            [*start, *(_time(point, name) for name in names), f"{point['limit_ms']:,.3f}"]
            for start, point in zip(head, points)
        ]
        others = [name for name in names if name != OURS]
        shares = [
            [
                *start,
                *(_text(point["speed"], name, 2) for name in others),
                f"{point['bytes'] / point['elements']:.1f}",
                Spread(**point["gb_per_second"]).text(1),
                f"{point['limit_ms'] / point['ms'][OURS]['median']:.2f}",
                Spread(**point["share_of_copy"]).text(2),
            ]
            for start, point in zip(head, points)
        ]
        columns = ["set", "tensors", "elements"]
        parts += [
            f"## {HEADINGS[kind]}",
            "ms a step:",
            report.table([*columns, *names, "limit"], times),
            "Time of the others / ours; of our step, bytes an element, bandwidth, limit / time, and share of the copy "
            "loop's bandwidth:",
            report.table(
                [*columns, *others, "bytes", "GB/s", "limit / time", "share of the copy loop"], shares
            ),
        ]
        checks = [
            [*start, *(point["checks"].get(name, "–") for name in names)]
            for start, point in zip(head, points)
        ]
        parts += ["Numbers checked:", report.table([*columns, *names], checks)]
        if points[0]["host_us"]:
            hosts = [
                [*start, *(_text(point["host_us"], name, 0) for name in names)]
                for start, point in zip(head, points)
            ]
            parts += ["Host time, µs a step:", report.table([*columns, *names], hosts)]
        if kind == "models":
            peaks = [
                [*start, *(_megabytes(point["peak_memory_bytes"], name) for name in names)]
                for start, point in zip(head, points)
            ]
            parts += ["Peak memory, MB:", report.table([*columns, *names], peaks)]
    left_out = {
        name: reason
        for points in result["sweeps"].values()
        for point in points
        for name, reason in point["left_out"].items()
    }
    left_out |= result["skipped"]
    if left_out:
        parts.append("Not measured:\n\n" + "\n".join(f"- {name}: {why}" for name, why in left_out.items()))
    return "\n\n".join([*parts, report.machine_note(result["machine"]) + "\n"])


def _time(point: dict[str, Any], name: str) -> str:
    why = point["left_out"].get(name, "–")
    return _text(point["ms"], name, 3) if name in point["ms"] or "check failed" not in why else why


def _text(spreads: dict[str, Any], name: str, decimals: int) -> str:
    return Spread(**spreads[name]).text(decimals) if name in spreads else "–"


def _megabytes(sizes: dict[str, int], name: str) -> str:
    return f"{sizes[name] / 1e6:,.1f}" if name in sizes else "–"


def _drawn(result: dict[str, Any]) -> list[str]:
    """The kinds of sets in the picture."""
    return [kind for kind in ("tensors", "elements") if result["sweeps"][kind]]


def picture(result: dict[str, Any], path: Path) -> None:
    """Draws a panel for each sweep, with logarithmic axes: time over tensors, and over elements."""
    kinds = _drawn(result)
    pyplot = report.plotting()
    figure, panels = pyplot.subplots(
        1, len(kinds), figsize=(6.5 * len(kinds), 7), layout="constrained", squeeze=False
    )
    for panel, kind in zip(panels[0], kinds):
        _draw(panel, kind, result["sweeps"][kind])
    report.save_figure(
        figure,
        path,
        "How the cost of a step grows",
        result["setting"] + ". Medians; the band is between the quartiles.",
        result["machine"],
    )


def _draw(panel: Axes, kind: str, points: list[dict[str, Any]]) -> None:
    names = list(dict.fromkeys(name for point in points for name in point["ms"]))
    ours = [name for name in names if name.startswith(OURS)]
    for name, colour in zip(names, report.colours(names, ours)):
        rows = [(point[kind], point["ms"][name]) for point in points if name in point["ms"]]
        places = [place for place, _ in rows]
        panel.plot(
            places,
            [row["median"] for _, row in rows],
            marker="o",
            color=colour,
            linestyle=":" if CASTS in name else "-",
            linewidth=2.5 if name in ours else 1.5,
            label=name,
            zorder=3 if name in ours else 2,
        )
        panel.fill_between(
            places,
            [row["lower_quartile"] for _, row in rows],
            [row["upper_quartile"] for _, row in rows],
            color=colour,
            alpha=0.2,
        )
    panel.plot(
        [point[kind] for point in points],
        [point["limit_ms"] for point in points],
        color=report.MARK_COLOUR,
        linestyle="--",
        label="limit: our bytes at the in-place loop's bandwidth",
    )
    panel.set_xscale("log")
    panel.set_yscale("log")
    panel.set_xlabel(kind, color="#555555")
    panel.set_ylabel("ms a step", color="#555555")
    panel.set_title(HEADINGS[kind], loc="left", fontsize=11, fontweight="bold")
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(color="#E3E3E3", linewidth=0.8)
    # The legend would cover lines in the panel.
    panel.legend(frameon=False, fontsize=9, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.1))


def main(arguments: Sequence[str]) -> None:
    """Measures the sets and writes step_sizes.json, step_sizes.md and step_sizes.png."""
    options = parse(arguments)
    result: dict[str, Any] = {}
    for points, skipped in sweeps(options):
        # A stopped run keeps the results so far.
        result = summarise(options, arguments, points, skipped)
        report.write_json(options.output / "step_sizes.json", result)
        (options.output / "step_sizes.md").write_text(markdown(result), encoding="utf-8")
    report.write(options.output, result, markdown(result), picture if _drawn(result) else None)


if __name__ == "__main__":
    main(sys.argv[1:])
