"""The choice of the ablation's learning rate: by the small batch alone, on seeds that the ablation does not use.

`python -m benchmarks.ablation.pilot` trains the first two rows, which have no trick, with several learning rates. A
killed run continues when it is started again.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from benchmarks.ablation import __main__ as ablation
from benchmarks.ablation import options as ablation_options
from benchmarks.ablation.recipe import ROWS as ALL_ROWS
from benchmarks.ablation.recipe import Recipe, Setting
from benchmarks.lib import data, gpu, machine, report
from benchmarks.lib.command_line import several
from benchmarks.lib.harness import mean_and_deviation

RATES = (0.1, 0.2, 0.4, 0.8)
FIRST_SEED = 100
ROWS = ALL_ROWS[:2]


def _name(row: Recipe, lr: float) -> str:
    return f"{row.name}, learning rate {lr:g}"


def markdown(result: dict[str, Any]) -> str:
    """Returns the page with one table."""
    lines = [
        [f"{rate['lr']:g}", *(cell for row in rate["rows"].values() for cell in _cells(row))]
        for rate in result["rates"]
    ]
    header = ["learning rate for 256"]
    for row in ROWS:
        header += [f"{row.name}: test accuracy %", f"{row.name}: test loss"]
    return "\n\n".join(
        [
            "# The learning rate of the ablation",
            f"{result['setting']}. Numbers are mean ± standard deviation over seeds. {_lowest(result)}",
            report.table(header, lines),
            report.machine_note(result["machine"]) + "\n",
        ]
    )


def _lowest(result: dict[str, Any]) -> str:
    rate = result["lowest_loss_at"]
    if rate is None:
        return "The small batch diverged at every learning rate."
    return f"The test loss of the small batch is lowest at {rate:g}."


def _cells(row: dict[str, list[float]]) -> list[str]:
    return [
        report.mean_text(*mean_and_deviation(row[what]), factor, decimals)
        for what, factor, decimals in (("accuracy", 100, 2), ("loss", 1, 3))
    ]


def parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, Setting, data.Images]:
    """Reads the command line and loads its images."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.ablation.pilot",
        description="Trains the rows without a trick with several learning rates.",
    )
    ablation_options.add_to(parser)
    ablation_options.add_batches_to(parser)
    ablation_options.add_depth_to(parser)
    parser.add_argument(
        "--seeds", type=several, default=2, help="repeat with this many initial weights and orders"
    )
    options = parser.parse_args(arguments)
    images = ablation_options.load_images(parser, options, ["--small-batch", "--large-batch"])
    return options, ablation.setting_of(options, options.depth), images


def main(arguments: Sequence[str]) -> None:
    """Trains the missing rows and writes ablation_pilot.json and ablation_pilot.md."""
    options, setting, images = parse(arguments)
    gpu.use(setting.device, deterministic=True)
    record = machine.describe("benchmarks.ablation.pilot", arguments, setting.device)
    seeds = range(FIRST_SEED, FIRST_SEED + options.seeds)
    log = ablation.open_log(options.output / "ablation_pilot.jsonl", options, setting, record)
    ablation.train_all(
        {
            (setting.depth, _name(row, lr), seed): (row, replace(setting, lr=lr))
            for seed in seeds
            for lr in RATES
            for row in ROWS
        },
        images,
        log,
    )
    rates: list[dict[str, Any]] = []
    for lr in RATES:
        outcomes = {
            row.name: [log.outcomes[setting.depth, _name(row, lr), seed] for seed in seeds] for row in ROWS
        }
        rows = {
            name: {what: [getattr(outcome, what) for outcome in found] for what in ("accuracy", "loss")}
            for name, found in outcomes.items()
        }
        rates.append({"lr": lr, "rows": rows})
    losses = {rate["lr"]: mean_and_deviation(rate["rows"][ROWS[0].name]["loss"])[0] for rate in rates}
    best = min(losses, key=losses.__getitem__)
    result = {
        "benchmark": "ablation_pilot",
        "machine": record,
        "setting": (
            f"{setting.depth}-layer residual network {ablation.describe(options, setting)}, {options.seeds} seeds"
        ),
        "seeds": list(seeds),
        "rates": rates,
        "lowest_loss_at": best if math.isfinite(losses[best]) else None,
    }
    report.write(options.output, result, markdown(result))
    log.path.unlink()


if __name__ == "__main__":
    main(sys.argv[1:])
