"""The compiled Triton kernels, for four architectures. No GPU is required."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.resources.in_flight import InFlight
from benchmarks.resources.sass import cuobjdump

pytest.importorskip("triton")

from benchmarks.resources import triton as triton_resources
from benchmarks.resources.triton import Kernel

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def compiled() -> tuple[str, list[Kernel]]:
    """Returns Triton's version and every kernel, from a Python process in which Triton compiles its kernels."""
    if cuobjdump() is None:
        pytest.skip("there is no cuobjdump to read cubins with")
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks.resources.triton", "--json"],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    found = json.loads(result.stdout)
    kernels = [Kernel(**kernel) for kernel in found["kernels"]]
    return found["triton"], [
        kernel._replace(in_flight=kernel.in_flight and InFlight(*kernel.in_flight)) for kernel in kernels
    ]


@pytest.fixture
def kernels(compiled) -> list[Kernel]:
    return [kernel for kernel in compiled[1] if kernel.name not in ("decide", "write")]


def test_every_architecture_has_every_kernel(compiled) -> None:
    names = {name for name, _ in triton_resources.sources()}
    found = {(kernel.architecture, kernel.name) for kernel in compiled[1]}
    assert found == {(f"sm_{number}", name) for number in (80, 90, 100, 120) for name in names}


def test_no_kernel_spills_or_uses_local_memory(compiled) -> None:
    assert [kernel for kernel in compiled[1] if kernel.stack != 0] == []


def test_no_kernel_needs_more_than_64_registers(compiled) -> None:
    assert [kernel for kernel in compiled[1] if kernel.registers > 64] == []


def test_every_main_loop_has_16_byte_accesses_and_no_others(kernels) -> None:
    assert [kernel for kernel in kernels if kernel.wide_loads == 0 or kernel.narrow != 0] == []
    assert [kernel for kernel in kernels if "update" in kernel.name and kernel.wide_stores == 0] == []


def test_every_access_takes_whole_sectors(kernels) -> None:
    assert [kernel for kernel in kernels if kernel.strided != 0] == []


# KiB in flight on a multiprocessor with which a GPU reaches its memory bandwidth, by CUB's tuning.
@pytest.mark.parametrize(("architecture", "kib"), [("sm_80", 16), ("sm_90", 32)], ids=["A100", "H100"])
def test_every_scan_and_update_has_enough_bytes_in_flight(kernels, architecture: str, kib: int) -> None:
    found = [kernel for kernel in kernels if kernel.architecture == architecture]
    assert found
    assert [kernel for kernel in found if (kernel.in_flight or (0, 0))[0] < 1024 * kib] == []


def test_the_table_in_the_repository_is_that_of_this_triton(compiled) -> None:
    version, found = compiled
    text = triton_resources.PATH.read_text()
    if f"triton {version}\n" not in text:
        pytest.skip(f"the table was made by another triton than this one ({version})")
    rows = set(triton_resources.as_markdown(found).splitlines())
    assert rows <= set(text.splitlines()), (
        "run python -m benchmarks.resources.triton --output benchmarks/results"
    )
