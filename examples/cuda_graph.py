"""A whole training step as one CUDA graph: forward pass, backward pass and update in one launch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

WARMUP = 3
"""Steps before the capture. They load kernels, choose algorithms and make the optimizer's state."""


class NotCapturable(Exception):
    """A step that a CUDA graph cannot capture, with the reason."""


class CapturedStep:
    """A training step that is captured by its fourth call and replayed by all later ones.

    The first calls run on a side stream, as https://docs.pytorch.org/docs/stable/notes/cuda.html advises. They train as
    any other step, so the results are those of a training without a graph.

    Args:
        step: Takes the tensors of a batch, and returns the loss. It must not read a number on the host, and gradients
            must be None before and after it, so that the backward pass writes them into the memory of the graph.

    Example:
        ```python
        step = CapturedStep(forward_backward_and_update)
        for images, labels in loader:
            loss = step(images.cuda(), labels.cuda())
        ```
    """

    def __init__(self, step: Callable[..., Tensor]) -> None:
        self._step = step
        self._stream = torch.cuda.Stream()
        self._calls = 0
        self._graph = torch.cuda.CUDAGraph()

    def __call__(self, *batch: Tensor) -> Tensor:
        """Takes a step and returns its loss. All batches must have the shapes of the first.

        Raises:
            NotCapturable: The step cannot be captured, or a tensor has another shape than at the capture.
        """
        self._calls += 1
        if self._calls <= WARMUP:
            return self._warm_up(batch)
        if self._calls == WARMUP + 1:
            self._capture(batch)
        for place, new in zip(self._batch, batch, strict=True):
            if place.shape != new.shape:  # copy_ would broadcast
                raise NotCapturable(
                    f"a batch has the shape {[*new.shape]}, and the graph has {[*place.shape]}"
                )
            place.copy_(new)
        self._graph.replay()
        return self._loss.clone()

    def _warm_up(self, batch: tuple[Tensor, ...]) -> Tensor:
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            loss = self._step(*batch)
        current.wait_stream(self._stream)
        return loss

    def _capture(self, batch: tuple[Tensor, ...]) -> None:
        # A graph reads its inputs at these addresses.
        self._batch = [tensor.clone() for tensor in batch]
        try:
            with torch.cuda.graph(self._graph):
                self._loss = self._step(*self._batch)
        except RuntimeError as error:
            # An error in the step also ends the capture with an error, which does not name the reason.
            reason = str(error.__context__ or error).partition("\n")[0]
            raise NotCapturable(reason) from error
