"""The training of one network with every contestant side by side: the same weights, batches, and order.

`python -m benchmarks.train` compares throughput, cost of the optimizer, peak memory and accuracy of plain
torch.amp and of fused_tricks on real images. benchmarks/README.md describes each column.
"""

from __future__ import annotations

import argparse
import copy
import functools
import math
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
import torchvision

import fused_tricks
from benchmarks.lib import backend_choice, command_line, data, gpu, machine, memory, progress, report
from benchmarks.lib.command_line import network, positive
from benchmarks.lib.harness import Clock, Section, Spread, mean_and_deviation, ratios, shuffled
from benchmarks.lib.names import FUSED, OURS
from benchmarks.step.check import Check
from benchmarks.train import check as train_check
from benchmarks.train import contestants, page
from benchmarks.train.contestants import Recipe
from benchmarks.train.images import accuracy, batches

WARMUP_STEPS = 5
MEMORY_STEPS = 2
BASELINE = FUSED


@dataclass
class Record:
    """The record of one contestant over all seeds: one sample per timed step, one list of losses per seed."""

    forwards: list[Section] = field(default_factory=list)
    backwards: list[Section] = field(default_factory=list)
    updates: list[Section] = field(default_factory=list)
    losses: list[list[float]] = field(default_factory=list)
    accuracies: list[float] = field(default_factory=list)
    peak: int = 0
    check: Check | None = None

    @property
    def step_seconds(self) -> list[float]:
        steps = zip(self.forwards, self.backwards, self.updates)
        return [sum(section.device for section in sections) for sections in steps]


def parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, data.Images]:
    """Reads the command line and loads its images."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.train",
        description="Trains with torch.amp and with fused_tricks, side by side.",
    )
    parser.add_argument(
        "--model", type=network, default="resnet18", help="a torchvision classification model"
    )
    data.add_dataset_to(parser)
    parser.add_argument(
        "--image-size", type=positive, default=32, help="images are resized to this many pixels"
    )
    parser.add_argument("--batch-size", type=positive, default=64)
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--epochs", type=positive, default=2)
    length.add_argument("--steps", type=positive, help="train this many steps instead of --epochs")
    parser.add_argument(
        "--seeds", type=positive, default=3, help="repeat with this many initial weights and orders"
    )
    parser.add_argument(
        "--minutes",
        type=positive,
        help="take fewer seeds, then fewer steps, if the training would last longer than about this",
    )
    command_line.add_device_to(parser)
    parser.add_argument(
        "--dtype",
        choices=("float16", "bfloat16", "float32"),
        help="of the forward and backward pass; by default float16 on a GPU and bfloat16 on a CPU",
    )
    parser.add_argument(
        "--loss-scale", choices=("dynamic", "none"), default="dynamic", help="for all contestants"
    )
    parser.add_argument(
        "--compile",
        choices=("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"),
        help="of torch.compile, for all contestants; reduce-overhead replays CUDA graphs on a GPU",
    )
    parser.add_argument(
        "--graph",
        action="store_true",
        help="train fused_tricks and torch.amp, fused a second time, each with its whole step as one CUDA graph",
    )
    parser.add_argument(
        "--average",
        action="store_true",
        help="train fused_tricks and torch.amp, fused a second time, each with an average of its weights",
    )
    parser.add_argument(
        "--max-grad-norm", type=command_line.positive_number, help="clip gradients to this norm, for all"
    )
    backend_choice.add_to(parser)
    report.add_output_to(parser)
    options = parser.parse_args(arguments)
    options.backends, _ = backend_choice.choose(parser, options.backend, options.device)
    if options.graph and not gpu.is_gpu(options.device):
        parser.error("--graph: CUDA graphs require a GPU")
    if options.graph and options.compile:
        parser.error(
            "--graph and --compile: choose one, because a compiled model may replay graphs of its own"
        )
    try:
        images = data.load(options.dataset, options.data, options.image_size)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    options.dataset = images.name
    count = len(images.train)  # type: ignore[arg-type]
    if options.batch_size > count:
        parser.error(
            f"--batch-size {options.batch_size}: {options.dataset} has only {count} images to train on"
        )
    return options, images


def within(minutes: int, seconds_a_step: float, steps: int, seeds: int) -> tuple[int, int]:
    """Returns the numbers of steps and seeds that fit into a limit of time, at most `steps` and `seeds`.

    Args:
        minutes: The limit for all trainings, unless the least number of steps takes longer.
        seconds_a_step: The seconds of a step of all contestants.
        steps: The requested steps for each seed.
        seeds: The requested seeds.
    """
    affordable = int(minutes * 60 / seconds_a_step)
    if affordable >= steps:
        return steps, min(seeds, affordable // steps)
    return min(steps, max(affordable, 2 * WARMUP_STEPS)), 1


def seconds_a_step(
    build_model: Callable[[], torch.nn.Module], recipe: Recipe, images: tuple[int, ...]
) -> float:
    """Returns the approximate seconds of a training step of all contestants, from a few steps of one of them."""

    def seconds(steps: int) -> float:
        start = time.perf_counter()
        contestants.train_from_scratch(BASELINE, build_model, recipe, images, steps)
        return time.perf_counter() - start

    seconds(1)
    return max(seconds(3) - seconds(1), 1e-3) / 2 * len(contestants.names(recipe))


def train(
    images: data.Images,
    build_model: Callable[[], torch.nn.Module],
    recipe: Recipe,
    options: argparse.Namespace,
    steps: int,
    seeds: int,
) -> tuple[dict[str, Record], list[float]]:
    """Trains all contestants for every seed. They take turns step by step, in a random order from the seed.

    Returns:
        The record of each contestant, and the seconds of loading each batch, once for all contestants.
    """
    loading: list[Section] = []
    names = contestants.names(recipe)
    records = {name: Record() for name in names}
    clock = Clock(recipe.device)
    warmup = min(WARMUP_STEPS, steps - 1)
    shown = progress.bar(desc="training", total=seeds * steps, unit="step")
    for seed in range(seeds):
        torch.manual_seed(seed)
        dice = random.Random(seed)
        model = build_model().to(recipe.device).to(memory_format=torch.channels_last)
        trainers = {name: contestants.build(name, copy.deepcopy(model), recipe) for name in names}
        for record in records.values():
            record.losses.append([])
        loader = batches(images, options.batch_size, steps, seed)
        for step in range(steps):
            clock.start()
            pixels, labels = next(loader)
            pixels = pixels.to(recipe.device, memory_format=torch.channels_last)
            labels = labels.to(recipe.device)
            clock.mark()
            loading += clock.sections()
            for name in shuffled(list(trainers), dice):
                trainer, record = trainers[name], records[name]
                lr = recipe.lr * (1 + math.cos(math.pi * step / steps)) / 2
                contestants.set_lr(trainer, lr)
                clock.start()
                loss = trainer.forward(pixels, labels)
                clock.mark()
                trainer.backward(loss)
                clock.mark()
                trainer.update()
                clock.mark()
                forward, backward, update = clock.sections()
                record.losses[-1].append(loss.item())
                if step >= warmup:
                    record.forwards.append(forward)
                    record.backwards.append(backward)
                    record.updates.append(update)
            shown.update()
        for name, trainer in trainers.items():
            records[name].accuracies.append(accuracy(trainer, images, recipe.device))
            trainer.model.train()
            # The last rate of the schedule changes hardly any weight.
            contestants.set_lr(trainer, recipe.lr)
            records[name].check = train_check.check(trainer, recipe, pixels, labels)
    shown.close()
    return records, [section.device for section in loading]


def measure_memory(
    records: dict[str, Record],
    build_model: Callable[[], torch.nn.Module],
    recipe: Recipe,
    images: tuple[int, ...],
) -> None:
    """Writes the peak memory of every contestant into its record."""
    for name, record in progress.bar(records.items(), desc="peak memory"):
        training = functools.partial(
            contestants.train_from_scratch, name, build_model, recipe, images, MEMORY_STEPS
        )
        record.peak = memory.peak_bytes(training, recipe.device)


def summarise(records: dict[str, Record], batch_size: int) -> dict[str, dict[str, Any]]:
    """Returns the columns of the table for every contestant, as spreads, and the raw losses and accuracies."""
    summary = {}
    for name, record in records.items():
        accuracies = record.accuracies
        mean, deviation = mean_and_deviation(accuracies)
        summary[name] = {
            "images_per_second": asdict(Spread.of(batch_size / seconds for seconds in record.step_seconds)),
            "speed_over_baseline": asdict(ratios(records[BASELINE].step_seconds, record.step_seconds)),
            "time_over_ours": asdict(ratios(record.step_seconds, records[OURS].step_seconds)),
            "forward_ms": asdict(Spread.of(forward.device * 1e3 for forward in record.forwards)),
            "backward_ms": asdict(Spread.of(backward.device * 1e3 for backward in record.backwards)),
            "optimizer_ms": asdict(Spread.of(update.device * 1e3 for update in record.updates)),
            "optimizer_host_us": asdict(Spread.of(update.host * 1e6 for update in record.updates)),
            "peak_memory_mib": asdict(Spread.of([record.peak / 2**20])),
            "accuracy_mean": mean,
            "accuracy_std": deviation,
            "accuracies": accuracies,
            "losses": record.losses,
            "check": record.check.text if record.check else "not checked",
            "passed": record.check is not None and record.check.passed,
        }
    return summary


def main(arguments: Sequence[str]) -> None:
    """Trains and writes train.json, train.md and train.png."""
    options, images = parse(arguments)
    device = options.device
    gpu.use(device)
    dtype_name = options.dtype or ("float16" if device.type == "cuda" else "bfloat16")
    steps = options.steps or options.epochs * (len(images.train) // options.batch_size)  # type: ignore[arg-type]
    recipe = Recipe(
        device=device,
        dtype=getattr(torch, dtype_name),
        loss_scaling=options.loss_scale == "dynamic",
        lr=fused_tricks.scale_lr(0.1, batch_size=options.batch_size),
        compile_mode=options.compile,
        backend=options.backends[0],
        graph=options.graph,
        average=options.average,
        max_grad_norm=options.max_grad_norm,
    )
    build_model = functools.partial(torchvision.models.get_model, options.model, num_classes=images.classes)
    shape = (options.batch_size, 3, options.image_size, options.image_size)
    seeds, cut = options.seeds, ""
    if options.minutes:
        wanted = steps, seeds
        steps, seeds = within(options.minutes, seconds_a_step(build_model, recipe, shape), steps, seeds)
        if (steps, seeds) != wanted:
            cut = f" (cut to about {options.minutes} min)"
    recipe = replace(recipe, steps=steps)
    records, loading = train(images, build_model, recipe, options, steps, seeds)
    measure_memory(records, build_model, recipe, shape)
    result: dict[str, Any] = {
        "benchmark": "train",
        "machine": machine.describe("benchmarks.train", arguments, device),
        "setting": (
            f"{options.model} on {options.dataset} at {options.image_size} × {options.image_size}, batch "
            f"{options.batch_size}, {steps} steps, {seeds} seed{'s' * (seeds > 1)}{cut}, {dtype_name} on {device.type} "
            f"(backend {recipe.backend}), loss scale {options.loss_scale}"
            + (f", clipped to {options.max_grad_norm:g}" if options.max_grad_norm else "")
            + (f", torch.compile(mode={options.compile!r})" if options.compile else "")
        ),
        "data_ms": asdict(Spread.of(seconds * 1e3 for seconds in loading)),
        "baseline": BASELINE,
        "dtype": dtype_name,
        "contestants": summarise(records, options.batch_size),
    }
    report.write(options.output, result, page.markdown(result), page.picture)


if __name__ == "__main__":
    main(sys.argv[1:])
