"""The command line options of the ablation and of the losslessness check: images, network, device."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch

from benchmarks.ablation import network
from benchmarks.lib import backend_choice, command_line, data, gpu, report
from benchmarks.lib.command_line import positive, positive_number


def add_to(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    data.add_dataset_to(parser)
    parser.add_argument(
        "--image-size", type=positive, default=16, help="images are resized to this many pixels"
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


def depth(text: str) -> int:
    """Returns a number of layers that the residual network can have."""
    value = int(text)
    try:
        network.blocks(value)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("depth ")) from error
    return value


def add_depth_to(parser: argparse.ArgumentParser) -> None:
    """Adds `--depth`."""
    parser.add_argument("--depth", type=depth, default=14, help="layers of the residual network, 6 · n + 2")


def add_batches_to(parser: argparse.ArgumentParser) -> None:
    """Adds the batch sizes and the number of epochs of the ablation and its pilot."""
    parser.add_argument("--small-batch", type=positive, default=16)
    parser.add_argument("--large-batch", type=positive, default=64)
    parser.add_argument("--epochs", type=positive, default=8)


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
    """Returns images, device and low precision as a phrase, to follow the network in the head of a page."""
    return (
        f"on {options.dataset} at {options.image_size} × {options.image_size} on {device.type}, "
        f"low precision is {str(dtype).removeprefix('torch.')}"
    )
