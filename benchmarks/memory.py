"""Peak memory of one contestant: the most bytes that its tensors held at once."""

from __future__ import annotations

import gc
import itertools
import os
from collections.abc import Callable

import torch
from torch.autograd.profiler import profile

from benchmarks import train_contestants

STEPS = 4


def peak_bytes(
    name: str,
    build_model: Callable[[], torch.nn.Module],
    recipe: train_contestants.Recipe,
    images: tuple[int, ...],
) -> int:
    """Trains a few steps from scratch on random images and returns the peak memory in bytes.

    The count has the model, its gradients, optimizer state, activations and every temporary tensor in it, and is the
    same each time. On a GPU it is CUDA's own. On a CPU it is added up from the allocations that torch's profiler
    reports, because the resident set of the process also has in it what the C library keeps after a ``free``.

    Args:
        name: one of `train_contestants.NAMES`.
        build_model: makes the model.
        recipe: how to train.
        images: the shape of a batch, (n, 3, height, width).
    """
    gc.collect()
    if recipe.device.type == "cuda":
        before = torch.cuda.memory_allocated(recipe.device)
        torch.cuda.reset_peak_memory_stats(recipe.device)
        _train_a_little(name, build_model, recipe, images)
        return torch.cuda.max_memory_allocated(recipe.device) - before
    # The profiler's backend writes its log to stderr otherwise, in the midst of the progress bars.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    with profile(profile_memory=True) as profiled:
        _train_a_little(name, build_model, recipe, images)
    changes = [event for event in profiled.kineto_results.events() if event.name() == "[memory]"]
    changes.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate(event.nbytes() for event in changes))


def _train_a_little(
    name: str,
    build_model: Callable[[], torch.nn.Module],
    recipe: train_contestants.Recipe,
    images: tuple[int, ...],
) -> None:
    model = build_model().to(recipe.device).to(memory_format=torch.channels_last)
    trainer = train_contestants.build(name, model, recipe)
    batch = torch.randn(images).to(recipe.device, memory_format=torch.channels_last)
    labels = torch.zeros(images[0], dtype=torch.int64, device=recipe.device)
    for _ in range(STEPS):
        trainer.backward(trainer.forward(batch, labels))
        trainer.update()
