"""Networks without memory for their weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


@contextmanager
def weightless() -> Iterator[None]:
    """Puts the weights of layers that are created inside on the `meta` device, without values.

    Vectors, such as the weights of norms and all biases, have memory, so their initial values can be read.
    """
    empty = torch.empty

    def empty_on_meta(*size: Any, device: Any = None, **options: Any) -> Tensor:
        shape = size[0] if size and isinstance(size[0], Sequence) else size
        if device is None and len(shape) > 1:
            device = "meta"
        return empty(*size, device=device, **options)

    torch.empty = empty_on_meta
    try:
        yield
    finally:
        torch.empty = empty
