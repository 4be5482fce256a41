"""Measures the saving of each host-time trick of the CPU backend, by switching the trick off.

`python -m benchmarks.host_time` compiles variants of the extension from edited copies of `csrc/`, and replaces
functions of the package in this process, so that the package itself requires no switch. The variants take turns. There
are two settings, each with new gradients in every step:

- One element: 161 FP16 parameters of one element each. The whole step is timed, with warm caches.
- ResNet-50: its 161 parameters, cast to FP16. The two passes over memory (scan and update) would hide the host's part.
  Every variant, including the variant with all tricks, is therefore compiled without the passes for models of more than
  32,768 elements. Plan guard, skip decision and version counters remain. Caches are warm. After a backward pass they
  are cold, and the host's time is several times longer.

The row "nothing" is a second contestant that has all tricks. Its difference is the error of the measurement.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from types import ModuleType
from typing import Any
from unittest import mock

import torch

import fused_tricks
from benchmarks.host_time.tricks import LEFT_OUT, TRICKS, Trick
from benchmarks.lib import command_line, machine, parameter_sets, progress, report, variants
from benchmarks.lib.harness import Spread, shuffled
from fused_tricks import FusedSGD
from fused_tricks.backends import cpu

CPU = torch.device("cpu")
SETTINGS = {"one element": "synthetic:161:1", "ResNet-50": "resnet50"}
ALL, NOTHING = "all tricks", "nothing"
LEFT_OUT_ABOVE = 2**15  # kSmall in csrc/cpu/step.cpp
WARMUP = 10


def load(trick: Trick) -> ModuleType:
    """Returns the extension without a trick."""
    return variants.load(variants.build(trick.edits, LEFT_OUT), trick.without)


class Steps:
    """The steps of one optimizer, with one trick switched off.

    All tricks share the parameters, because another place in memory can change a step by microseconds.

    Args:
        parameters: The name of the set.
    """

    def __init__(self, parameters: str) -> None:
        model = fused_tricks.cast_model(parameter_sets.build(parameters), torch.float16)
        self._parameters = list(model.parameters())
        self._optimizer = FusedSGD(
            self._parameters, lr=0.1, momentum=0.9, weight_decay=1e-4, loss_scale="dynamic", backend="cpu"
        )
        self._optimizer.scale(torch.ones(()))
        # Gradients that no scan reads need no values.
        is_scanned = sum(parameter.numel() for parameter in self._parameters) <= LEFT_OUT_ABOVE
        self._new = torch.zeros_like if is_scanned else torch.empty_like

    def time(self, trick: Trick, module: ModuleType, count: int) -> float:
        """Returns the seconds of a step without the trick: the median of `count`, each with new gradients."""
        self._optimizer.__class__ = trick.optimizer
        with ExitStack() as switched:
            switched.enter_context(mock.patch.object(cpu, "load_extension", lambda: module))
            for where, name, value in trick.patches:
                switched.enter_context(mock.patch.object(where, name, value))
            with torch.no_grad():
                self._parameters[0].add_(0)  # a write, after which the next step makes a new plan
            for _ in range(WARMUP):
                self._step()
            return statistics.median(self._step() for _ in range(count))

    def _step(self) -> float:
        self._optimizer.zero_grad()
        for parameter in reversed(self._parameters):
            parameter.grad = self._new(parameter)
        began = time.perf_counter()
        self._optimizer.step()
        return time.perf_counter() - began


def measure(options: argparse.Namespace, tricks: Sequence[Trick]) -> dict[str, Any]:
    """Returns, for each setting, the microseconds of a step and the saving of each trick."""
    everyone = [Trick(ALL), Trick(NOTHING), *tricks]
    modules = {trick.name: load(trick) for trick in everyone}
    found = {}
    for setting, parameters in SETTINGS.items():
        steps, dice = Steps(parameters), random.Random(0)
        us: dict[str, list[float]] = {trick.name: [] for trick in everyone}
        for _ in progress.bar(range(options.rounds), desc=setting, unit="round"):
            for trick in shuffled(everyone, dice):
                us[trick.name].append(steps.time(trick, modules[trick.name], options.steps) * 1e6)
        found[setting] = {
            "step_us": asdict(Spread.of(us[ALL])),
            "saved_us": {
                trick.name: asdict(Spread.of(a - b for a, b in zip(us[trick.name], us[ALL], strict=True)))
                for trick in everyone[1:]
            },
        }
    return found


def markdown(result: dict[str, Any]) -> str:
    """Returns the page of the result."""
    found = result["settings"]
    rows = [
        [
            name,
            where or "–",
            *(Spread(**found[setting]["saved_us"][name]).text(1) for setting in SETTINGS),
            goes or "–",
        ]
        for name, where, goes in [(NOTHING, "", ""), *map(tuple, result["tricks"])]
    ]
    steps = ", ".join(f"{setting}: {Spread(**found[setting]['step_us']).text(1)}" for setting in SETTINGS)
    return (
        "\n\n".join(
            [
                "# Host time",
                "Microseconds that each host-time trick saves in a step of the CPU backend over 161 FP16 parameters. "
                "[benchmarks/host_time](../host_time/__main__.py) describes the measurement. In brackets: the "
                "quartiles of the rounds.",
                f"A step with all tricks takes, in µs: {steps}.",
                report.table(
                    ["trick", "where", *(f"µs saved, {s}" for s in SETTINGS), "obsolete with"], rows
                ),
                report.machine_note(result["machine"]),
            ]
        )
        + "\n"
    )


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.host_time",
        description="Measures the saving of each host-time trick of the CPU backend.",
    )
    parser.add_argument("--rounds", type=command_line.positive, default=60)
    parser.add_argument(
        "--steps", type=command_line.positive, default=50, help="steps in a round, for each trick"
    )
    report.add_output_to(parser)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> None:
    """Measures the tricks and writes host_time.json and host_time.md."""
    options = parse(arguments)
    result = {
        "benchmark": "host_time",
        "machine": machine.describe("benchmarks.host_time", arguments, CPU),
        "tricks": [[trick.name, trick.where, trick.goes] for trick in TRICKS],
        "settings": measure(options, TRICKS),
    }
    report.write(options.output, result, markdown(result))


if __name__ == "__main__":
    main(sys.argv[1:])
