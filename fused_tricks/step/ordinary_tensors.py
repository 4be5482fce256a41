"""Contexts in which new tensors have ordinary memory, whatever modes are active around the call."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from .._torch import without_modes


@contextmanager
def outside_inference_mode() -> Iterator[None]:
    """Leaves `torch.inference_mode`, so that new tensors can be written later. Autograd records nothing."""
    # torch.inference_mode(False) turns autograd on.
    with torch.inference_mode(False), torch.no_grad():
        yield


@contextmanager
def outside_all_modes() -> Iterator[None]:
    """Leaves every mode, so that new tensors have memory and can be written later, even under a `FakeTensorMode`."""
    with without_modes(), outside_inference_mode():
        yield
