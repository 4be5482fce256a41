"""A fake of the functions of `torch.cuda` that the benchmarks call, so that their GPU mode runs on CPU tensors."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch

from benchmarks.lib import gpu


class FakeCuda:
    """A fake `torch.cuda`, which records calls in `log`. `gpu.is_gpu` is True for every device.

    Work runs at once, so an event has always happened.

    Args:
        monkeypatch: Restores everything at the end.
        replays: True if the result of `gpu.capture` runs the step again. With False, `gpu.capture` uses a fake of
            torch's graph, whose replay does nothing.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, replays: bool = True) -> None:
        self.log: list[str] = []
        log = self.log

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                log.append("event")
                self._time = time.perf_counter()

            def query(self) -> bool:
                return True

            def elapsed_time(self, other: Event) -> float:
                return (other._time - self._time) * 1e3

        class CUDAGraph:
            def replay(self) -> None:
                log.append("replay")

        @contextlib.contextmanager
        def captured(graph: CUDAGraph) -> Iterator[None]:
            log.append("capture")
            yield

        stream = SimpleNamespace(wait_stream=lambda other: None)
        properties = SimpleNamespace(
            name="Fake GPU",
            major=9,
            minor=0,
            total_memory=2**34,
            L2_cache_size=2**25,
            multi_processor_count=4,
        )
        for name, value in {
            "Event": Event,
            "CUDAGraph": CUDAGraph,
            "graph": captured,
            "synchronize": lambda: log.append("synchronize"),
            "_sleep": lambda cycles: log.append("sleep"),
            "Stream": lambda: stream,
            "current_stream": lambda: stream,
            "stream": lambda stream: contextlib.nullcontext(),
            "get_device_properties": lambda device: properties,
            "mem_get_info": lambda device: (2**34, 2**34),
            "memory_allocated": lambda device: 0,
            "max_memory_allocated": lambda device: 2**30,
            "reset_peak_memory_stats": lambda device: None,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(gpu, "is_gpu", lambda device: True)
        if replays:
            monkeypatch.setattr(gpu, "capture", self._capture)

    def _capture(
        self,
        step: Callable[[], object],
        warmup: int = gpu.CAPTURE_WARMUP,
        prepare: Callable[[], object] = lambda: None,
    ) -> Callable[[], object]:
        for _ in range(warmup):
            prepare()
            step()
        self.log.append("capture")
        return step
