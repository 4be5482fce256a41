"""Contexts in which new tensors are ordinary memory, whatever modes surround the call."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from .._torch import without_modes


@contextmanager
def outside_inference_mode() -> Iterator[None]:
    """Makes tensors that may be written later, outside `torch.inference_mode`. Autograd records nothing."""
    # Leaving inference mode would turn autograd on.
    with torch.inference_mode(False), torch.no_grad():
        yield


@contextmanager
def outside_all_modes() -> Iterator[None]:
    """Makes tensors that have memory even under a `FakeTensorMode`, and may be written later."""
    with without_modes(), outside_inference_mode():
        yield
