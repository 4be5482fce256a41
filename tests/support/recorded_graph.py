"""CUDA graphs on CPU tensors: a capture records torch's operations and our launches, a replay runs them again."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from support import emulation

from .fake_cuda import FakeCuda


class RecordedGraph:
    """A stand-in for `torch.cuda.CUDAGraph`.

    A replay reads and writes the memory of the capture, and no Python of the step runs.

    Our launches come after all operations of torch, as in a training step. Only one graph can have such launches.
    """

    def __init__(self) -> None:
        self._operations: list[tuple[Any, Any, Any, Any]] = []
        self._launches = emulation.Graph()

    def replay(self) -> None:
        with torch.no_grad():
            for operation, args, kwargs, result in self._operations:
                again = operation(*args, **kwargs)
                if operation.is_view or any(out.alias_info for out in operation._schema.returns):
                    continue
                for kept, new in zip(tree_flatten(result)[0], tree_flatten(again)[0], strict=True):
                    if isinstance(kept, Tensor):
                        kept.copy_(new)
        self._launches.replay()

    @contextlib.contextmanager
    def capture(self) -> Iterator[None]:
        recorder = _Recorder(self._operations)
        with torch.random.fork_rng([]), self._launches.capture(), recorder:
            yield
        recorder.undo()


class _Recorder(TorchDispatchMode):
    """Records operations. What they wrote to older memory is put back: a capture runs no kernel."""

    def __init__(self, operations: list[tuple[Any, Any, Any, Any]]) -> None:
        super().__init__()
        self._operations = operations
        self._before: dict[int, tuple[Tensor, Tensor]] = {}
        self._made: set[int] = set()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if operation is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        kwargs = kwargs or {}
        for tensor in tree_flatten((args, kwargs))[0]:
            if isinstance(tensor, Tensor):
                place = tensor.untyped_storage().data_ptr()
                if place not in self._made:
                    self._before.setdefault(id(tensor), (tensor, tensor.detach().clone()))
        result = operation(*args, **kwargs)
        for tensor in tree_flatten(result)[0]:
            if isinstance(tensor, Tensor):
                self._made.add(tensor.untyped_storage().data_ptr())
        self._operations.append((operation, args, kwargs, result))
        return result

    @torch.no_grad()
    def undo(self) -> None:
        for tensor, before in self._before.values():
            if not torch.equal(tensor, before):
                tensor.copy_(before)


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes `torch.cuda` work on CPU tensors, with graphs that are recorded."""
    FakeCuda(monkeypatch, replays=False)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", RecordedGraph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: graph.capture())
