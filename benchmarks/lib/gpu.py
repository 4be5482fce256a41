"""Access to a GPU beside tensors: events, a head start for the host, graphs, and its description."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import torch

import fused_tricks

HEAD_START_CYCLES = 20_000_000
"""Cycles of work before a timed section: 10 ms at 2 GHz, longer than the calls of any contestant."""

CAPTURE_WARMUP = 3
"""Steps before the capture of a CUDA graph."""


def is_gpu(device: torch.device) -> bool:
    """True if work on the device is asynchronous and timed with CUDA events."""
    return device.type == "cuda"


def use(device: torch.device, *, deterministic: bool = False) -> None:
    """Makes a device current. All other functions use its current stream.

    Args:
        device: The device.
        deterministic: True restricts cuDNN to algorithms that give the same numbers each time.
    """
    if is_gpu(device):
        if deterministic:
            torch.backends.cudnn.deterministic = True
        if device.index is not None:
            torch.cuda.set_device(device)


def give_head_start() -> None:
    """Launches a spinning kernel, so that the host can issue its calls before the first of them runs."""
    torch.cuda._sleep(HEAD_START_CYCLES)


def recorded_event() -> torch.cuda.Event:
    """Returns an event that records the time at which the GPU reaches this point."""
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def capture(
    step: Callable[[], object],
    warmup: int = CAPTURE_WARMUP,
    prepare: Callable[[], object] = lambda: None,
) -> Callable[[], object]:
    """Captures a step in a CUDA graph and returns a function that replays the graph.

    Args:
        step: The step. Its tensors must keep their addresses.
        warmup: The number of steps before the capture, on a stream of their own, so that nothing is initialised during
            the capture.
        prepare: Runs before each step of the warm-up.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(warmup):
            prepare()
            step()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def cache_size(device: torch.device) -> int:
    """Returns the bytes of the L2 cache."""
    return torch.cuda.get_device_properties(device).L2_cache_size


def describe(device: torch.device) -> dict[str, object]:
    """Returns the GPU and its driver as JSON-able values."""
    properties = torch.cuda.get_device_properties(device)
    return {
        "name": properties.name,
        "architecture": f"{properties.major}.{properties.minor}",
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "l2_mib": round(properties.L2_cache_size / 2**20, 1),
        "multiprocessors": properties.multi_processor_count,
        "driver": _driver(),
    }


def versions() -> dict[str, str]:
    """Returns the CUDA versions of torch and of the extension, and the packages that require a GPU."""
    found = {"CUDA of torch": torch.version.cuda or "none", "CUDA of fused_tricks": _cuda_of_the_extension()}
    for package in ("triton", "apex", "transformer_engine", "flashoptim"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def _driver() -> str:
    program = shutil.which("nvidia-smi")
    if program is None:
        return "unknown (no nvidia-smi)"
    command = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    answer = subprocess.run(command, capture_output=True, text=True)
    if answer.returncode != 0 or not answer.stdout.strip():
        return "unknown (nvidia-smi failed)"
    return answer.stdout.split()[0]


def _cuda_of_the_extension() -> str:
    record = Path(fused_tricks.__file__).with_name("_build_info.json")
    if not record.exists():
        return "none"
    cuda = json.loads(record.read_text(encoding="utf-8")).get("cuda")
    return cuda["version"] if cuda else "none"
