"""The step of the CPU backend beside the limit of the memory, with other choices in its two passes.

`python -m benchmarks.cpu_sweep` compiles variants of the extension from edited copies of `csrc/` (requires a C++
compiler). All variants update the same tensors, and take turns with the in-place loop. A row is adopted if it is faster
on large sets on every kind of processor, and slower on none.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any
from unittest import mock

import torch

import fused_tricks
from benchmarks.lib import command_line, machine, parameter_sets, progress, report, variants
from benchmarks.lib.harness import Spread, shuffled
from benchmarks.lib.variants import Edit
from benchmarks.step.contestants import OUR_WORK, loops
from fused_tricks import FusedSGD
from fused_tricks.backends import cpu
from fused_tricks.extension import load_extension

CPU = torch.device("cpu")
LOOP = "in-place loop"
TODAY = "as it is"
TWO_OPERATIONS = "two operations in place of the update"
WARMUP = 2


@dataclass(frozen=True)
class Setting:
    """A set of parameters.

    Attributes:
        name: The name in the table.
        parameters: The name of the set in `parameter_sets`.
        dtype: The dtype of the weights.
        scales: True with loss scaling, which reads the gradients once more.
    """

    name: str
    parameters: str
    dtype: torch.dtype
    scales: bool


SETTINGS = (
    Setting("ResNet-50, FP16", "resnet50", torch.float16, True),
    Setting("ResNet-50, BF16", "resnet50", torch.bfloat16, True),
    Setting("ResNet-50, FP32, no scale", "resnet50", torch.float32, False),
    Setting("20 × 50,000, FP16", "synthetic:20:50000", torch.float16, True),
    Setting("20 × 5,000, FP16", "synthetic:20:5000", torch.float16, True),
)

# Both passes have this loop. The rest of its text is that of the update.
_FORWARD = "for (size_t i = static_cast<size_t>(begin); i < static_cast<size_t>(end); ++i) {"
_BACKWARD = "for (size_t i = static_cast<size_t>(end); i-- > static_cast<size_t>(begin);) {"
_OF_UPDATE = """
      const Chunk& chunk = chunks_[i];
      const Entry& entry = plan.entries[chunk.entry];
      if (entry.grad == nullptr) continue;
      const Span"""
_READ_WEIGHT = "  V w = Simd::load(weight);"


def _prefetch(distance: int, locality: int, *, gradient: bool) -> tuple[Edit, ...]:
    """Returns the edit that loads memory `distance` bytes ahead. Locality 0 marks it as used once, 3 keeps it."""
    names = ["weight", "buffer", *(["grad"] if gradient else [])]
    lines = [
        f"  __builtin_prefetch(reinterpret_cast<const char*>({name}) + {distance}, 0, {locality});"
        for name in names
    ]
    return (Edit("cpu/kernels_impl.h", _READ_WEIGHT, "\n".join([*lines, _READ_WEIGHT])),)


def _blocks(elements: int) -> tuple[Edit, ...]:
    """Returns the edit that loads the next block of each array before the first element of a block is used."""
    loop = "for (; i + Simd::kWidth <= span.count; i += Simd::kWidth) {"
    arrays = ["weight", "buffer", "grad"]
    loads = " ".join(
        f"for (int64_t j = 0; j < {elements}; j += 64 / static_cast<int64_t>(sizeof(*{name}))) "
        f"__builtin_prefetch({name} + i + {elements} + j, 0, 3);"
        for name in arrays
    )
    return (Edit("cpu/kernels_impl.h", loop, f"{loop}\n      if (i % {elements} == 0) {{ {loads} }}"),)


def _chunk(bits: int) -> tuple[Edit, ...]:
    return (Edit("core/chunk.h", "kCpuChunk = 1 << 15", f"kCpuChunk = 1 << {bits}"),)


def _unrolled(times: int) -> tuple[Edit, ...]:
    loop = "for (; i + Simd::kWidth <= span.count; i += Simd::kWidth) {"
    return (Edit("cpu/kernels_impl.h", loop, f'_Pragma("GCC unroll {times}")\n    {loop}'),)


VARIANTS: dict[str, tuple[Edit, ...]] = {
    TODAY: (),
    TWO_OPERATIONS: (
        Edit(
            "cpu/kernels_impl.h",
            "  sgd_update(rule, Simd::load(grad), w, b);\n  Simd::store(weight, w);",
            "  b = fma(V(1.0f), Simd::load(grad), b);\n  w = fma(V(1.0f), b, w);\n  Simd::store(weight, w);",
        ),
    ),
    "prefetch 512 bytes ahead": _prefetch(512, 3, gradient=True),
    "prefetch 1,024 bytes ahead": _prefetch(1024, 3, gradient=True),
    "prefetch 2,048 bytes ahead": _prefetch(2048, 3, gradient=True),
    "prefetch 1,024 bytes ahead, used once": _prefetch(1024, 0, gradient=True),
    "prefetch 1,024 bytes ahead, used once, not the gradient": _prefetch(1024, 0, gradient=False),
    "blocks of 256 elements, one array after the other": _blocks(256),
    "blocks of 512 elements, one array after the other": _blocks(512),
    "blocks of 1,024 elements, one array after the other": _blocks(1024),
    "blocks of 4,096 elements, one array after the other": _blocks(4096),
    "chunks of 8,192": _chunk(13),
    "chunks of 131,072": _chunk(17),
    "2 vectors at a time": _unrolled(2),
    "4 vectors at a time": _unrolled(4),
    "16-bit weights written through the caches": (
        Edit("cpu/step.cpp", "kLarge = 1 << 22", "kLarge = 1LL << 62"),
    ),
    "update from the last chunk to the first": (
        Edit("cpu/step.cpp", _FORWARD + _OF_UPDATE, _BACKWARD + _OF_UPDATE),
    ),
}
"""The edits of each variant."""


class Steps:
    """The steps of one optimizer, by one variant after the other."""

    def __init__(self, setting: Setting) -> None:
        module = fused_tricks.cast_model(parameter_sets.build(setting.parameters), setting.dtype)
        self._parameters = list(module.parameters())
        # Without a loss scale, no scan reads the gradients.
        scanned = 0 if setting.scales else sum(parameter.nbytes for parameter in self._parameters)
        self.bytes = OUR_WORK.traffic(self._parameters) - scanned
        self._optimizer = FusedSGD(
            self._parameters,
            lr=1e-3,
            momentum=0.9,
            weight_decay=1e-4,
            loss_scale="dynamic" if setting.scales else None,
            backend="cpu",
        )
        if setting.scales:
            self._optimizer.scale(torch.ones(()))
        for parameter in self._parameters:
            parameter.grad = torch.full_like(parameter, 1e-3)

    def prepare(self, variant: str) -> None:
        """Makes the next steps those of a variant."""
        module = variants.load(variants.build(VARIANTS[variant]))
        with torch.no_grad(), mock.patch.object(cpu, "load_extension", lambda: module):
            self._parameters[0].add_(0)  # a write, after which the next step makes a new plan
            for _ in range(WARMUP):
                self._optimizer.step()

    def run(self) -> None:
        """Takes a step."""
        self._optimizer.step()


def timed(run: Callable[[], object], count: int) -> float:
    """Returns the median of `count` runs, in seconds."""
    seconds = []
    for _ in range(count):
        began = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def measure(setting: Setting, options: argparse.Namespace) -> dict[str, Any]:
    """Returns the milliseconds of each variant, and its share of the bandwidth of the in-place loop."""
    steps, dice = Steps(setting), random.Random(0)
    contestants, traffic = loops(options.loop_mebibytes, CPU)
    (loop,) = (contestant for contestant in contestants if contestant.name == LOOP)
    times: dict[str, list[float]] = {name: [] for name in (LOOP, *VARIANTS)}
    for _ in progress.bar(range(options.rounds), desc=setting.name, unit="round"):
        for name in shuffled(list(times), dice):
            if name == LOOP:
                times[name].append(timed(loop.run, options.steps))
            else:
                steps.prepare(name)
                times[name].append(timed(steps.run, options.steps))
    limits = [steps.bytes * seconds / traffic[LOOP] for seconds in times.pop(LOOP)]
    return {
        name: {
            "ms": asdict(Spread.of(1e3 * second for second in seconds)),
            "share_of_loop": asdict(
                Spread.of(limit / second for limit, second in zip(limits, seconds, strict=True))
            ),
            "to_today": asdict(
                Spread.of(second / today for second, today in zip(seconds, times[TODAY], strict=True))
            ),
        }
        for name, seconds in times.items()
    }


def markdown(result: dict[str, Any]) -> str:
    """Returns the page of the result."""
    found = result["settings"]
    rows = [
        [
            name,
            *(
                f"{Spread(**found[setting][name]['ms']).median:.3g} · "
                f"{Spread(**found[setting][name]['to_today']).median:.3f} · "
                f"{Spread(**found[setting][name]['share_of_loop']).median:.2f}"
                for setting in found
            ),
        ]
        for name in VARIANTS
    ]
    return (
        "\n\n".join(
            [
                "# The CPU's limit",
                "A step of the CPU backend with other choices in its two passes over memory. Each cell has the "
                "milliseconds of a step, its ratio to the step *as it is* (median of the rounds' ratios; below 1 is "
                "faster), and its share of the bandwidth of the in-place loop, `target += 0.001 * source` over large "
                "FP32 buffers, which takes its turn. Caches are warm: a set that fits them exceeds 1. *Two operations "
                "in place of the update* read and write the same memory in the same order, so their time is that of "
                "the memory alone. Instruction set: "
                f"{result['instruction_set']}.",
                report.table(["variant", *found], rows),
                report.machine_note(result["machine"]),
            ]
        )
        + "\n"
    )


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cpu_sweep",
        description="Times the step of the CPU backend with other choices in its two passes over memory.",
    )
    parser.add_argument("--rounds", type=command_line.positive, default=10)
    parser.add_argument(
        "--steps", type=command_line.positive, default=10, help="steps of a variant in a round"
    )
    parser.add_argument(
        "--loop-mebibytes", type=command_line.positive, default=256, help="size of the loop's buffers"
    )
    parser.add_argument("--instruction-set", choices=cpu_sets(), help="the best of this processor by default")
    report.add_output_to(parser)
    return parser.parse_args(arguments)


def cpu_sets() -> list[str]:
    """Returns the instruction sets of this processor that have kernels."""
    return list(load_extension().instruction_sets())


def main(arguments: Sequence[str]) -> None:
    """Measures the variants and writes cpu_sweep.json and cpu_sweep.md."""
    options = parse(arguments)
    chosen = options.instruction_set or cpu_sets()[0]
    for edits in VARIANTS.values():
        variants.load(variants.build(edits)).select_instruction_set(chosen)
    result = {
        "benchmark": "cpu_sweep",
        "machine": machine.describe("benchmarks.cpu_sweep", arguments, CPU),
        "instruction_set": chosen,
        "settings": {setting.name: measure(setting, options) for setting in SETTINGS},
    }
    report.write(options.output, result, markdown(result))


if __name__ == "__main__":
    main(sys.argv[1:])
