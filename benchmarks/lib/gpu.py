"""What the benchmarks ask of a GPU beside tensors: events, a head start for the host, graphs, and what it is."""

from __future__ import annotations

import gc
import importlib.metadata
import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import torch

import fused_tricks

HEAD_START_CYCLES = 20_000_000
"""How long the GPU is kept busy before a timed section: 10 ms at 2 GHz, longer than any contestant's calls take."""

CAPTURE_WARMUP = 3
"""Steps that run before the capture of a CUDA graph."""


def is_gpu(device: torch.device) -> bool:
    """Whether work on the device is asynchronous and timed with CUDA events."""
    return device.type == "cuda"


def use(device: torch.device, *, deterministic: bool = False) -> None:
    """Makes the device the current one, on whose current stream everything below happens.

    Args:
        device: the device.
        deterministic: have cuDNN take only algorithms that give the same numbers each time.
    """
    if is_gpu(device):
        if deterministic:
            torch.backends.cudnn.deterministic = True
        if device.index is not None:
            torch.cuda.set_device(device)


def give_head_start() -> None:
    """Keeps the GPU busy, so that the host can issue its calls before the first of them runs."""
    torch.cuda._sleep(HEAD_START_CYCLES)


def recorded_event() -> torch.cuda.Event:
    """An event that notes when the GPU gets to this point."""
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def capture(
    step: Callable[[], object],
    warmup: int = CAPTURE_WARMUP,
    prepare: Callable[[], object] = lambda: None,
) -> Callable[[], object]:
    """Captures a step in a CUDA graph and returns what replays it.

    Args:
        step: what to capture; the tensors it works on must stay where they are.
        warmup: how often it runs first, on a stream of its own, so that nothing is made lazily during the capture.
        prepare: runs before each of these.
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


def free_memory(device: torch.device) -> int:
    """Bytes that tensors can still be given, when what nobody uses any more is returned."""
    gc.collect()
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)[0]


def cache_size(device: torch.device) -> int:
    """Bytes of the L2 cache."""
    return torch.cuda.get_device_properties(device).L2_cache_size


def describe(device: torch.device) -> dict[str, object]:
    """The GPU and its driver, as JSON-able values."""
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
    """The CUDA that torch and the extension were built with, and the packages that only run on a GPU."""
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
