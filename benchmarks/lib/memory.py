"""Peak memory: the most bytes that tensors held at once."""

from __future__ import annotations

import gc
import itertools
import os
from collections.abc import Callable

import torch
from torch.autograd.profiler import profile

from benchmarks.lib import gpu


def peak_bytes(work: Callable[[], object], device: torch.device) -> int:
    """Runs `work` and returns the most bytes that the tensors made in it held at once.

    The number is the same each time. On a GPU it is CUDA's own. On a CPU it is added up from the allocations that
    torch's profiler reports, because the resident set of the process also has in it what the C library keeps after a
    `free`.
    """
    gc.collect()
    if gpu.is_gpu(device):
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    # The profiler's backend writes its log to stderr otherwise, in the midst of the progress bars.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    with profile(profile_memory=True) as profiled:
        work()
    changes = [event for event in profiled.kineto_results.events() if event.name() == "[memory]"]
    changes.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate(event.nbytes() for event in changes))
