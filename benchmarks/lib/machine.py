"""The record of a measurement: machine, versions, date and command."""

from __future__ import annotations

import datetime
import os
import platform
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy
import torch
import torchvision

import fused_tricks
from benchmarks.lib import gpu


def cpu_name() -> str:
    """Returns the name of the processor if the system has one, otherwise the architecture."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _command(module: str, arguments: Sequence[str]) -> str:
    """Returns the command line, after the number of threads that the environment sets."""
    threads = os.environ.get("OMP_NUM_THREADS")
    prefix = f"OMP_NUM_THREADS={shlex.quote(threads)} " if threads else ""
    return prefix + shlex.join(["python", "-m", module, *arguments])


def describe(
    module: str,
    arguments: Sequence[str],
    device: torch.device,
    versions: Mapping[str, str] = MappingProxyType({}),
) -> dict[str, object]:
    """Returns a JSON-able record of the machine, date and command of a benchmark.

    Args:
        module: The module of the benchmark, such as `benchmarks.step`.
        arguments: Its command line arguments.
        device: The device of the work.
        versions: The versions of further packages.
    """
    on_gpu = gpu.is_gpu(device)
    return {
        "command": _command(module, arguments),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "cpu": cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": gpu.describe(device) if on_gpu else None,
        "system": platform.platform(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
            "numpy": numpy.__version__,
            "fused_tricks": fused_tricks.__version__,
            **(gpu.versions() if on_gpu else {}),
            **versions,
        },
    }


def one_line(machine: dict[str, Any]) -> str:
    """Returns the record in one line, for the foot of a picture."""
    versions, device = machine["versions"], machine["gpu"]
    if device:
        where = f"{device['name']}, driver {device['driver']}, CUDA {versions['CUDA of torch']}"
    else:
        where = f"{machine['cpu']}, {threads_text(machine)}"
    return f"{where} · torch {versions['torch']} · {machine['date']}"


def threads_text(machine: Mapping[str, Any]) -> str:
    """Returns the numbers of cores and threads in a record, such as `2 cores, 1 thread`."""
    return ", ".join(
        f"{machine[what]} {what if machine[what] != 1 else what[:-1]}" for what in ("cores", "threads")
    )
