"""Training curves of fused_tricks and of torch.amp, from the same weights on the same batches.

`python -m benchmarks.losslessness` trains side by side in FP32 and in low precision. It compares the loss at every
step, the test accuracy during training and the final weights. benchmarks/README.md describes the comparison.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fused_tricks
from benchmarks.ablation import options as ablation_options
from benchmarks.ablation.network import small_resnet
from benchmarks.lib import data, gpu, machine, progress, report
from benchmarks.lib.command_line import positive, several
from benchmarks.lib.harness import mean_and_deviation
from benchmarks.lib.names import FOR_LOOP, FUSED, OURS
from benchmarks.train import contestants as train_contestants
from benchmarks.train.contestants import Recipe, Trainer
from benchmarks.train.images import accuracy, batches

BASELINE = FOR_LOOP
ROUNDED = f"{OURS}, begun from rounded weights"
TESTS = 8
"""The number of accuracy measurements in a training, at equal distances; at most one per step."""


@dataclass
class Curves:
    """The record of one contestant, with one list per seed."""

    losses: list[list[float]] = field(default_factory=list)
    accuracies: list[list[float]] = field(default_factory=list)
    same_weights: list[bool] = field(default_factory=list)
    """For each seed, True if full-precision weights and buffers equal those of the baseline, bit for bit."""


def parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, data.Images]:
    """Reads the command line and loads its images."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.losslessness",
        description="Compares the training curves of fused_tricks and of torch.amp.",
    )
    ablation_options.add_to(parser)
    ablation_options.add_depth_to(parser)
    parser.add_argument("--batch-size", type=positive, default=64)
    parser.add_argument("--epochs", type=positive, default=2)
    parser.add_argument(
        "--seeds",
        type=several,
        default=3,
        help="repeat with this many initial weights and orders",
    )
    options = parser.parse_args(arguments)
    return options, ablation_options.load_images(parser, options, ["--batch-size"])


def build_all(model: nn.Module, recipe: Recipe) -> dict[str, Trainer]:
    """Returns all contestants, each with a copy of the model; ours twice in low precision, once with FP32 masters."""
    trainers = {
        name: train_contestants.build(name, copy.deepcopy(model), recipe) for name in train_contestants.NAMES
    }
    if recipe.dtype != torch.float32:
        trainers[ROUNDED] = train_contestants.build(OURS, copy.deepcopy(model), recipe)
        optimizer = trainers[OURS].optimizer
        assert isinstance(optimizer, fused_tricks.FusedSGD)
        fused_tricks.load_fp32_state_dict(trainers[OURS].model, optimizer, model.state_dict())
    return trainers


def full_precision(trainer: Trainer) -> dict[str, Tensor]:
    """Returns the weights and buffers of a trainer's model, with masters in place of low-precision weights."""
    if isinstance(trainer.optimizer, fused_tricks.FusedSGD):
        return fused_tricks.fp32_state_dict(trainer.model, trainer.optimizer)
    return trainer.model.state_dict()


def steps_tested(steps: int) -> list[int]:
    """Returns the steps after which the test accuracy is measured: `TESTS` steps, or all if there are fewer."""
    return sorted({steps * (test + 1) // TESTS for test in range(TESTS)} - {0})


def train_all(
    images: data.Images, recipe: Recipe, options: argparse.Namespace, steps: int
) -> dict[str, Curves]:
    """Trains all contestants for every seed, step by step on the same batches."""
    curves: dict[str, Curves] = {}
    tested = steps_tested(steps)
    for seed in range(options.seeds):
        torch.manual_seed(seed)
        model = small_resnet(images.classes, options.depth)
        model = model.to(recipe.device).to(memory_format=torch.channels_last)
        trainers = build_all(model, recipe)
        schedules = [
            fused_tricks.WarmupCosineLR(trainer.optimizer, steps, warmup_steps=steps // 10)
            for trainer in trainers.values()
        ]
        for name in trainers:
            curves.setdefault(name, Curves()).losses.append([])
            curves[name].accuracies.append([])
        training = batches(images, options.batch_size, steps, seed)
        for step, (pixels, labels) in enumerate(
            progress.bar(training, total=steps, desc=f"seed {seed}"), start=1
        ):
            pixels = pixels.to(recipe.device, memory_format=torch.channels_last)
            labels = labels.to(recipe.device)
            for name, trainer in trainers.items():
                loss = trainer.forward(pixels, labels)
                trainer.backward(loss)
                trainer.update()
                curves[name].losses[-1].append(loss.item())
                if step in tested:
                    curves[name].accuracies[-1].append(accuracy(trainer, images, recipe.device))
                    trainer.model.train()
            for schedule in schedules:
                schedule.step()
        expected = full_precision(trainers[BASELINE])
        for name, trainer in trainers.items():
            values = full_precision(trainer)
            curves[name].same_weights.append(
                values.keys() == expected.keys()
                and all(torch.equal(values[key], expected[key]) for key in expected)
            )
    return curves


def distances(curves: Sequence[Sequence[float]], others: Sequence[Sequence[float]]) -> list[float]:
    """Returns the absolute differences of all points of all pairs of curves."""
    return [abs(a - b) for curve, other in zip(curves, others) for a, b in zip(curve, other)]


def largest(values: Sequence[float]) -> float:
    """Returns the largest value, or nan if there is one, which `max` would pass over."""
    return math.nan if any(map(math.isnan, values)) else max(values)


def summarise(curves: dict[str, Curves]) -> dict[str, Any]:
    """Returns the raw curves, the distance of each contestant from the baseline, and that between its seeds."""
    baseline = curves[BASELINE]

    def summary(losses: list[float], accuracies: list[float]) -> dict[str, float]:
        return {
            "largest_loss": largest(losses),
            "mean_loss": statistics.fmean(losses),
            "largest_accuracy": largest(accuracies),
        }

    pairs = list(itertools.permutations(range(len(baseline.losses)), 2))
    first, second = ([pair[place] for pair in pairs] for place in (0, 1))
    return {
        "contestants": {
            name: {
                "distance": summary(
                    distances(own.losses, baseline.losses), distances(own.accuracies, baseline.accuracies)
                ),
                **asdict(own),
            }
            for name, own in curves.items()
        },
        "between_seeds": summary(
            distances([baseline.losses[i] for i in first], [baseline.losses[i] for i in second]),
            distances([baseline.accuracies[i] for i in first], [baseline.accuracies[i] for i in second]),
        ),
    }


def markdown(result: dict[str, Any]) -> str:
    """Returns the page with one table for each precision."""
    sections = []
    tests = len(next(iter(result["precisions"].values()))["contestants"][BASELINE]["accuracies"][0])
    for precision, summary in result["precisions"].items():
        header = [
            "contestant",
            "largest difference of the loss",
            "mean difference of the loss",
            "largest difference of the test accuracy, points",
            "final weights equal",
            "final test accuracy %",
        ]
        rows = []
        for name, own in summary["contestants"].items():
            final = mean_and_deviation([curve[-1] for curve in own["accuracies"]])
            numbers = report.mean_text(*final, 100, 2)
            equal = f"{sum(own['same_weights'])} of {len(own['same_weights'])} seeds"
            if name == BASELINE:
                rows.append([name, "", "", "", "", numbers])
            else:
                rows.append([name, *_distance_texts(own["distance"]), equal, numbers])
        rows.append([f"{BASELINE}, between its seeds", *_distance_texts(summary["between_seeds"]), "", ""])
        sections += [f"## {precision}", report.table(header, rows)]
    explanation = (
        f"Differences are absolute, from *{BASELINE}* of the same seed, over all steps and seeds; 0 is exact, and "
        f"nan is where a loss was not a number, or infinite on both sides. Accuracy is measured {tests} times in a "
        "training. Weights are compared bit for bit, masters where there are some."
    )
    return "\n\n".join(
        [
            "# Losslessness: fused_tricks and torch.amp from the same weights",
            f"{result['setting']}. {explanation}",
            *sections,
            "![The curves](losslessness.png)",
            report.machine_note(result["machine"]),
            "benchmarks/README.md says what is compared.\n",
        ]
    )


def _distance_texts(distance: dict[str, float]) -> list[str]:
    return [
        report.number(distance["largest_loss"], ".3g"),
        report.number(distance["mean_loss"], ".3g"),
        report.number(100 * distance["largest_accuracy"], ".3g"),
    ]


def picture(result: dict[str, Any], path: Path) -> None:
    """Draws for each precision the loss of every seed, its distance from the baseline, and the test accuracy."""
    pyplot = report.plotting()
    figure, panels = pyplot.subplots(2, 3, figsize=(16.5, 7.8), layout="constrained")
    looks: dict[str, dict[str, Any]] = {
        BASELINE: {"color": report.GREYS[0], "linewidth": 4.5},
        FUSED: {"color": report.LINE_COLOURS[2], "linewidth": 2.5},
        ROUNDED: {"color": report.MARK_COLOUR, "linewidth": 0.8},
        OURS: {"color": report.OURS_COLOUR, "linewidth": 1.2, "linestyle": (0, (4, 3))},
    }
    for (loss, distance, tested), (precision, summary) in zip(panels, result["precisions"].items()):
        curves = {name: summary["contestants"][name] for name in looks if name in summary["contestants"]}
        baseline = curves[BASELINE]
        steps = range(1, len(baseline["losses"][0]) + 1)
        ends: list[tuple[float, float, str, str]] = []
        for name, own in curves.items():
            if name != FUSED:
                loss.plot(steps, list(zip(*own["losses"])), **looks[name])
                percent = [[100 * value for value in test] for test in zip(*own["accuracies"])]
                tested.plot(steps_tested(len(steps)), percent, **looks[name])
            if name != BASELINE:
                farthest = [
                    largest(distances([ours], [theirs]))
                    for ours, theirs in zip(zip(*own["losses"]), zip(*baseline["losses"]))
                ]
                distance.plot(steps, farthest, **looks[name])
                label = name.replace(", begun ", ",\nbegun ")
                ends.append((len(steps), farthest[-1], label, looks[name]["color"]))
        apart = [
            statistics.fmean(abs(a - b) for a, b in itertools.combinations(step, 2))
            for step in zip(*baseline["losses"])
        ]
        distance.plot(steps, apart, color=report.GREYS[2])
        ends.append((len(steps), apart[-1], "mean distance\nbetween seeds", report.GREYS[2]))
        for name in curves:
            if name != FUSED:
                tested.plot([], [], label=name, **looks[name])
        for panel, title in (
            (loss, f"{precision.partition(',')[0]}: training loss, all seeds"),
            (distance, f"Loss: largest distance from {BASELINE}"),
            (tested, "Test accuracy (%), all seeds"),
        ):
            report.dress(panel, title, "")
            panel.set_xlabel("step", color="#555555")
        tested.legend(frameon=False, fontsize=8, loc="lower right")
        loss.set_yscale("log")
        distance.set_yscale("symlog", linthresh=1e-6)
        distance.set_ylim(bottom=-1e-7)
        distance.set_ylabel("symmetric-logarithmic,\nlinear below 10⁻⁶", color="#555555")
        distance.margins(x=0)
        report.label_lines(distance, ends, fontsize=8)
    report.save_figure(
        figure,
        path,
        "fused_tricks and torch.amp, from the same weights on the same batches",
        result["setting"],
        result["machine"],
    )


def main(arguments: Sequence[str]) -> None:
    """Trains and writes losslessness.json, losslessness.md and losslessness.png."""
    options, images = parse(arguments)
    device, dtype = ablation_options.device_and_dtype(options)
    gpu.use(device, deterministic=True)
    steps = options.epochs * (len(images.train) // options.batch_size)  # type: ignore[arg-type]
    precisions = {}
    for precision in (torch.float32, dtype):
        low = precision != torch.float32
        recipe = Recipe(
            device=device,
            dtype=precision,
            loss_scaling=low,
            lr=fused_tricks.scale_lr(options.lr, options.batch_size),
            backend=options.backends[0],
        )
        name = str(precision).removeprefix("torch.") + (", dynamic loss scale" if low else "")
        precisions[name] = summarise(train_all(images, recipe, options, steps))
    result: dict[str, Any] = {
        "benchmark": "losslessness",
        "machine": machine.describe("benchmarks.losslessness", arguments, device),
        "setting": (
            f"{options.depth}-layer residual network {ablation_options.describe(options, device, dtype)}, "
            f"batch {options.batch_size}, {steps} steps, {options.seeds} seeds"
        ),
        "baseline": BASELINE,
        "precisions": precisions,
    }
    report.write(options.output, result, markdown(result), picture)


if __name__ == "__main__":
    main(sys.argv[1:])
