"""The paper's ablation on small images: the effect of each trick on a large batch, by depth, with spreads over seeds.

`python -m benchmarks.ablation` trains every row at every depth with every seed. A killed run continues after the last
finished training when it is started again.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.ablation import options as ablation_options
from benchmarks.ablation import page
from benchmarks.ablation.log import Key, OutcomeLog
from benchmarks.ablation.recipe import ROWS, Recipe, Setting, train_once
from benchmarks.ablation.summary import CONFIDENCE, summarise
from benchmarks.lib import data, gpu, machine, progress, report
from benchmarks.lib.command_line import several


def parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[Setting], data.Images]:
    """Reads the command line and loads its images.

    Returns:
        The options, with one number of seeds for each depth; the setting of each depth; the images.
    """
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.ablation",
        description="Trains networks of several depths with the paper's tricks, one more in each row.",
    )
    ablation_options.add_to(parser)
    ablation_options.add_batches_to(parser)
    parser.add_argument(
        "--depths",
        type=ablation_options.depth,
        nargs="+",
        default=[14, 56, 110],
        metavar="DEPTH",
        help="layers of the residual networks, 6 · n + 2, in the order of the trainings",
    )
    parser.add_argument(
        "--seeds",
        type=several,
        nargs="+",
        default=[5],
        metavar="SEEDS",
        help="repeat every row with this many initial weights and orders: one number, or one for each depth",
    )
    options = parser.parse_args(arguments)
    if len(set(options.depths)) < len(options.depths):
        parser.error(f"--depths: each depth must be given once, got {' '.join(map(str, options.depths))}")
    if len(options.seeds) == 1:
        options.seeds *= len(options.depths)
    if len(options.seeds) != len(options.depths):
        parser.error(
            f"--seeds: got {len(options.seeds)} numbers for {len(options.depths)} depths; give one number, or one "
            "for each depth"
        )
    images = ablation_options.load_images(parser, options, ["--small-batch", "--large-batch"])
    return options, [setting_of(options, depth) for depth in options.depths], images


def setting_of(options: argparse.Namespace, depth: int) -> Setting:
    """Returns the setting of the options for a network with `depth` layers."""
    device, dtype = ablation_options.device_and_dtype(options)
    return Setting(
        device=device,
        dtype=dtype,
        small_batch=options.small_batch,
        large_batch=options.large_batch,
        lr=options.lr,
        epochs=options.epochs,
        depth=depth,
    )


def describe(options: argparse.Namespace, setting: Setting) -> str:
    """Returns what the settings of all depths have in common, for the head of a page."""
    return (
        f"{ablation_options.describe(options, setting.device, setting.dtype)}, batch {setting.small_batch} → "
        f"{setting.large_batch}, {setting.epochs} epochs"
    )


def open_log(path: Path, options: argparse.Namespace, setting: Setting, record: dict[str, Any]) -> OutcomeLog:
    """Returns the log of finished trainings. Ends the program if they had another setting or machine.

    The depth is a part of each outcome's key, and may differ.
    """
    made_with = {
        "dataset": options.dataset,
        "data": options.data,
        "image_size": options.image_size,
        **{
            name: value if isinstance(value, (int, float)) else str(value)
            for name, value in asdict(setting).items()
            if name != "depth"
        },
        **{name: record[name] for name in ("cpu", "threads", "gpu", "versions")},
    }
    try:
        return OutcomeLog(path, made_with)
    except ValueError as error:
        sys.exit(str(error))


def train_all(plan: Mapping[Key, tuple[Recipe, Setting]], images: data.Images, log: OutcomeLog) -> None:
    """Trains what is missing in the log, in the order of the plan.

    Args:
        plan: The recipe and setting of each training by its key in the log.
        images: The images for training and test.
        log: The outcomes so far. New outcomes are added.
    """
    missing = [key for key in plan if key not in log.outcomes]
    for key in progress.bar(missing, desc="trainings", unit="training"):
        _, _, seed = key
        log.add(key, train_once(*plan[key], images, seed))


def planned(settings: Sequence[Setting], seeds: Sequence[int]) -> dict[Key, tuple[Recipe, Setting]]:
    """Returns all trainings of the ablation: depth by depth, and seed by seed in a depth."""
    return {
        (setting.depth, row.name, seed): (row, setting)
        for setting, count in zip(settings, seeds)
        for seed in range(count)
        for row in ROWS
    }


def main(arguments: Sequence[str]) -> None:
    """Trains the missing rows and writes ablation.json, ablation.md and ablation.png."""
    options, settings, images = parse(arguments)
    gpu.use(options.device, deterministic=True)
    record = machine.describe("benchmarks.ablation", arguments, options.device)
    log = open_log(options.output / "ablation.jsonl", options, settings[0], record)
    train_all(planned(settings, options.seeds), images, log)
    count = len(images.train)  # type: ignore[arg-type]
    depths = {
        setting.depth: summarise(
            {
                row.name: [log.outcomes[setting.depth, row.name, seed] for seed in range(seeds)]
                for row in ROWS
            },
            setting,
            count,
        )
        for setting, seeds in sorted(zip(settings, options.seeds), key=lambda pair: pair[0].depth)
    }
    result: dict[str, Any] = {
        "benchmark": "ablation",
        "machine": record,
        "setting": describe(options, settings[0]),
        "lr": options.lr,
        "images": {"train": count, "test": len(images.test)},  # type: ignore[arg-type]
        "confidence": CONFIDENCE,
        "depths": {str(depth): rows for depth, rows in depths.items()},
    }
    report.write(options.output, result, page.markdown(result), page.picture)
    log.path.unlink()


if __name__ == "__main__":
    main(sys.argv[1:])
