"""The command line options of the ablation and of the losslessness check: images, network, device."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch

from benchmarks.lib import backend_choice, command_line, data, gpu, report
from benchmarks.lib.command_line import positive, positive_number


def add_to(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    data.add_dataset_to(parser)
    parser.add_argument(
        "--image-size", type=positive, default=16, help="images are resized to this many pixels"
    )
    parser.add_argument(
        "--blocks", type=positive, default=2, help="residual blocks in each of the network's three stages"
    )
    parser.add_argument("--lr", type=positive_number, default=0.4, help="learning rate for a batch of 256")
    command_line.add_device_to(parser)
    parser.add_argument(
        "--dtype",
        choices=("float16", "bfloat16"),
        help="the low precision; by default float16 on a GPU and bfloat16 on a CPU",
    )
    backend_choice.add_to(parser)
    report.add_output_to(parser)


def load_images(
    parser: argparse.ArgumentParser, options: argparse.Namespace, batches: Sequence[str]
) -> data.Images:
    """Loads the images of the options.

    Ends the program if a batch is larger than the set, or if no fast backend is usable.
    """
    options.backends, _ = backend_choice.choose(parser, options.backend, options.device)
    try:
        images = data.load(options.dataset, options.data, options.image_size)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    options.dataset = images.name
    count = len(images.train)  # type: ignore[arg-type]
    for name in batches:
        size = getattr(options, name.removeprefix("--").replace("-", "_"))
        if size > count:
            parser.error(f"{name} {size}: {options.dataset} has only {count} images to train on")
    return images


def device_and_dtype(options: argparse.Namespace) -> tuple[torch.device, torch.dtype]:
    """Returns the device and the low precision."""
    dtype_name = options.dtype or ("float16" if gpu.is_gpu(options.device) else "bfloat16")
    return options.device, getattr(torch, dtype_name)


def describe(options: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> str:
    """Returns the options as a sentence, for the head of a page."""
    return (
        f"{6 * options.blocks + 2}-layer residual network on {options.dataset} at {options.image_size} × "
        f"{options.image_size} on {device.type}, low precision is {str(dtype).removeprefix('torch.')}"
    )
