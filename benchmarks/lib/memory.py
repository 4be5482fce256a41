"""Free memory, and peak memory: the most bytes of all tensors at once."""

from __future__ import annotations

import gc
import itertools
import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch.autograd.profiler import profile

from benchmarks.lib import gpu

MEMINFO = Path("/proc/meminfo")


def free_bytes(device: torch.device) -> int | None:
    """Returns the bytes that new tensors on a device may take; None where the system does not report them."""
    gc.collect()
    if gpu.is_gpu(device):
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = MEMINFO.read_text().splitlines()
    except OSError:
        return None
    available = [int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    return 1024 * available[0] if available else None


def peak_bytes(work: Callable[[], object], device: torch.device) -> int:
    """Runs `work` and returns the most bytes of the tensors that it creates, at one time.

    The number is the same each time. On a GPU it is the maximum of CUDA's allocator. On a CPU it is the sum of the
    allocations that torch's profiler reports, because the resident set of the process also includes memory that the C
    library keeps after a `free`.
    """
    gc.collect()
    if gpu.is_gpu(device):
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    # The log of the profiler's backend on stderr would interrupt the progress bars.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    with profile(profile_memory=True) as profiled:
        work()
    changes = [event for event in profiled.kineto_results.events() if event.name() == "[memory]"]
    changes.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate(event.nbytes() for event in changes))
