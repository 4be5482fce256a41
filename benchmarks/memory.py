"""Peak memory of one contestant, measured in a process of its own."""

from __future__ import annotations

import multiprocessing
import resource
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor

import torch

from benchmarks import train_contestants

STEPS = 4


def _highest_resident_bytes() -> int:
    # Linux counts in KiB, macOS in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _train_a_little(
    name: str,
    build_model: Callable[[], torch.nn.Module],
    recipe: train_contestants.Recipe,
    images: tuple[int, ...],
) -> int:
    before = _highest_resident_bytes()
    model = build_model().to(recipe.device).to(memory_format=torch.channels_last)
    trainer = train_contestants.build(name, model, recipe)
    batch = torch.randn(images).to(recipe.device, memory_format=torch.channels_last)
    labels = torch.zeros(images[0], dtype=torch.int64, device=recipe.device)
    for _ in range(STEPS):
        trainer.forward_backward(batch, labels)
        trainer.update()
    if recipe.device.type == "cuda":
        return torch.cuda.max_memory_allocated(recipe.device)
    return _highest_resident_bytes() - before


def peak_bytes(
    name: str,
    build_model: Callable[[], torch.nn.Module],
    recipe: train_contestants.Recipe,
    images: tuple[int, ...],
) -> int:
    """Trains a few steps on random images in a fresh process and returns its peak memory in bytes.

    On a GPU that is what CUDA tensors held at most. On a CPU it is the high-water mark of the resident set above
    what the imports take: model, gradients, optimizer state, activations, buffers of the kernels, and what the
    memory allocator keeps.

    Args:
        name: one of `train_contestants.NAMES`.
        build_model: a picklable function that makes the model.
        recipe: how to train.
        images: the shape of a batch, (n, 3, height, width).
    """
    context = multiprocessing.get_context("forkserver")
    # The server imports once; the processes forked from it start with a high-water mark of their own.
    context.set_forkserver_preload([__name__, "torchvision"])
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        return pool.submit(_train_a_little, name, build_model, recipe, images).result()
