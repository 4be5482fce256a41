"""The linear scaling rule: the learning rate grows with the global batch size."""

import math

import torch.distributed

from .validation import integer, real


def scale_lr(base_lr: float, batch_size: int, base_batch_size: int = 256) -> float:
    """Returns the learning rate for another batch size: `base_lr * batch_size / base_batch_size`.

    A batch that is k times as large has a gradient with less noise, and an epoch has k times fewer updates. A learning
    rate that is k times as large compensates for both. A large learning rate requires a warm-up.

    Args:
        base_lr: The learning rate at `base_batch_size`; finite, zero or more. Zero stays zero.
        batch_size: Samples that one update averages over, on all devices together: see `global_batch_size`.
        base_batch_size: Samples per update at `base_lr`.

    Returns:
        The scaled learning rate; exactly `base_lr` for equal batch sizes.

    Raises:
        TypeError: `base_lr` is not a real number, or a batch size is not an integer.
        ValueError: `base_lr` is negative, infinite or NaN, a batch size is below 1, or the scaled learning rate
            overflows.

    Source: "Bag of Tricks for Image Classification with CNNs" (arXiv 1812.01187), section 3.1; the rule is from
    "Accurate, Large Minibatch SGD" (arXiv 1706.02677), section 2.1.

    Example:
        ```python
        import fused_tricks as ft

        assert ft.scale_lr(0.1, batch_size=1024) == 0.4
        ```
    """
    batch_size = integer("batch_size", batch_size, least=1)
    base_batch_size = integer("base_batch_size", base_batch_size, least=1)
    try:
        scaled = real("base_lr", base_lr, least=0) * (batch_size / base_batch_size)
    except OverflowError:
        scaled = math.inf
    if scaled == math.inf:
        raise ValueError(
            f"base_lr * batch_size / base_batch_size overflows: base_lr={base_lr}, batch_size={batch_size}, "
            f"base_batch_size={base_batch_size}"
        )
    return scaled


def global_batch_size(
    per_device_batch_size: int, accumulation_steps: int = 1, world_size: int | None = None
) -> int:
    """Returns the number of samples that one update averages over: the product of the arguments.

    Args:
        per_device_batch_size: Samples in one forward pass of one process.
        accumulation_steps: Backward passes between two updates.
        world_size: Processes that average their gradients. None is the size of the default group of
            `torch.distributed` if it is initialised, otherwise 1.

    Raises:
        TypeError: An argument is not an integer.
        ValueError: An argument is below 1.

    Example:
        ```python
        import fused_tricks as ft

        assert ft.global_batch_size(32, accumulation_steps=4, world_size=8) == 1024
        ```
    """
    if world_size is None:
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        world_size = torch.distributed.get_world_size() if distributed else 1
    return (
        integer("per_device_batch_size", per_device_batch_size, least=1)
        * integer("accumulation_steps", accumulation_steps, least=1)
        * integer("world_size", world_size, least=1)
    )
