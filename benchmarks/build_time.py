"""The time of an installation from the sources, and the size of its wheel, with and without compiled code.

`python -m benchmarks.build_time` builds the wheel three times in copies of the checkout, without isolation (requires
the packages of `pip install --group build`). A build that the machine cannot make is listed with its reason.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.lib import machine, report

ROOT = Path(__file__).parents[1]
SOURCES = ("csrc", "fused_tricks", "LICENSE", "README.md", "pyproject.toml", "setup.py")
BUILDS = {
    "pure Python": {"FUSED_TRICKS_EXTENSION": "0"},
    "CPU kernels": {"FUSED_TRICKS_CUDA": "0", "FUSED_TRICKS_REQUIRE_EXTENSION": "1"},
    "CPU and CUDA kernels": {"FUSED_TRICKS_CUDA": "1"},
}
"""The environment of each build."""


def measure(environment: dict[str, str]) -> dict[str, Any]:
    """Returns seconds, processor seconds and bytes of a build of the wheel, or the last line of its output."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "source"
        ignored = shutil.ignore_patterns("*.so", "*.pyd", "__pycache__", "_build_info.json")
        for name in SOURCES:
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, tree / name, ignore=ignored)
            else:
                tree.mkdir(exist_ok=True)
                shutil.copy2(ROOT / name, tree)
        command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps"]
        before, began = _processor_seconds(), time.perf_counter()
        done = subprocess.run(
            [*command, "--no-cache-dir", "--wheel-dir", folder, str(tree)],
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
        )
        seconds, processor_seconds = time.perf_counter() - began, _processor_seconds() - before
        if done.returncode != 0:
            return {"failure": (done.stderr or done.stdout).strip().splitlines()[-1]}
        (wheel,) = Path(folder).glob("*.whl")
        return {
            "seconds": seconds,
            "processor_seconds": processor_seconds,
            "wheel_bytes": wheel.stat().st_size,
        }


def _processor_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def markdown(result: dict[str, Any]) -> str:
    """Returns the page of the result."""
    rows = [
        [
            name,
            f"{found['seconds']:.0f}",
            f"{found['processor_seconds']:.0f}",
            f"{found['wheel_bytes'] / 1e6:.2f}",
        ]
        if "failure" not in found
        else [name, f"not built: {found['failure']}", "–", "–"]
        for name, found in result["builds"].items()
    ]
    parts = [
        "# The time of a build",
        "One build of the wheel each, from a copy of the sources and without isolation. *Processor s* is the time of "
        "all compilers together; they run in parallel.",
        report.table(["installation", "s", "processor s", "wheel, MB"], rows),
        report.machine_note(result["machine"]),
    ]
    return "\n\n".join(parts) + "\n"


def main(arguments: Sequence[str]) -> None:
    """Builds the wheels and writes build_time.json and build_time.md."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.build_time", description="Times the builds of the wheel."
    )
    parser.add_argument("--builds", nargs="+", choices=tuple(BUILDS), default=tuple(BUILDS), metavar="NAME")
    report.add_output_to(parser)
    options = parser.parse_args(arguments)
    result = {
        "benchmark": "build_time",
        "machine": machine.describe("benchmarks.build_time", arguments, torch.device("cpu")),
        "builds": {name: measure(BUILDS[name]) for name in options.builds},
    }
    report.write(options.output, result, markdown(result))


if __name__ == "__main__":
    main(sys.argv[1:])
