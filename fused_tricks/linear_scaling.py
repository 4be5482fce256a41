"""The linear scaling rule: a learning rate that grows with the global batch."""

import math

import torch.distributed

from .validation import integer, real


def scale_lr(base_lr: float, batch_size: int, base_batch_size: int = 256) -> float:
    """Returns the learning rate for a batch of another size: `base_lr * batch_size / base_batch_size`.

    A batch k times as large has a gradient with less noise, and an epoch of it has k times fewer updates;
    a rate k times as large makes up for both. Large rates need a warm-up.

    Args:
        base_lr: the rate that is right for `base_batch_size`; finite, zero or more (as `torch.optim.SGD`
            takes it: zero stays zero).
        batch_size: samples that one update averages over, on all devices together: see
            `global_batch_size`.
        base_batch_size: samples an update at `base_lr`.

    Returns:
        The scaled rate; exactly `base_lr` where the two batch sizes are equal.

    Raises:
        TypeError: `base_lr` is not a real number, or a batch size is not an integer.
        ValueError: `base_lr` is negative, infinite or NaN, a batch size is below 1, or the scaled rate is no
            finite number.

    Source: "Bag of Tricks for Image Classification with CNNs" (arXiv 1812.01187), section 3.1; the rule is
    from "Accurate, Large Minibatch SGD" (arXiv 1706.02677), section 2.1.
    """
    batch_size = integer("batch_size", batch_size, least=1)
    base_batch_size = integer("base_batch_size", base_batch_size, least=1)
    try:
        scaled = real("base_lr", base_lr, least=0) * (batch_size / base_batch_size)
    except OverflowError:
        scaled = math.inf
    if scaled == math.inf:
        raise ValueError(
            f"batch_size={batch_size} is too many times base_batch_size={base_batch_size} for base_lr={base_lr}"
        )
    return scaled


def global_batch_size(
    per_device_batch_size: int, accumulation_steps: int = 1, world_size: int | None = None
) -> int:
    """Returns how many samples one update averages over: the product of the three.

    Args:
        per_device_batch_size: samples in one forward pass of one process.
        accumulation_steps: backward passes between two updates.
        world_size: processes that average their gradients; `None`: the size of `torch.distributed`'s
            default group where one is initialised, else 1.

    Raises:
        TypeError: an argument is not an integer.
        ValueError: an argument is below 1.
    """
    if world_size is None:
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        world_size = torch.distributed.get_world_size() if distributed else 1
    return (
        integer("per_device_batch_size", per_device_batch_size, least=1)
        * integer("accumulation_steps", accumulation_steps, least=1)
        * integer("world_size", world_size, least=1)
    )
