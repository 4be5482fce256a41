"""The compiled CUDA kernels, for every architecture in the build. No GPU is required."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from benchmarks.resources import cuda as cuda_resources
from fused_tricks.extension import load_extension

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def compiled() -> list[cuda_resources.Row]:
    """Returns every kernel in the extension."""
    tool = cuda_resources.cuobjdump()
    if not cuda_resources.build_info().get("cuda"):
        pytest.skip("the extension was built without CUDA")
    if tool is None:
        pytest.skip("there is no cuobjdump to read cubins with")
    return cuda_resources.rows(cuda_resources.kernels(tool, Path(str(load_extension().__file__))))


def test_every_architecture_of_the_build_has_every_kernel(compiled) -> None:
    architectures = cuda_resources.build_info()["cuda"]["architectures"]
    expected = {"sm_" + name.removesuffix("+PTX").replace(".", "") for name in architectures}
    assert {kernel.architecture for kernel in compiled} == expected
    names = {f"{name} {size}" for name in ("scan", "update") for size in (256, 1024, 3584)}
    names |= {"decide", "write"}
    assert {(k.architecture, k.name) for k in compiled} == set(itertools.product(expected, names))


def test_no_kernel_spills_or_uses_local_memory(compiled) -> None:
    assert [kernel for kernel in compiled if kernel.stack != 0] == []


def test_no_kernel_needs_more_than_64_registers(compiled) -> None:
    assert [kernel for kernel in compiled if kernel.registers > 64] == []


def test_every_kernel_moves_elements_in_16_byte_accesses(compiled) -> None:
    assert [
        kernel for kernel in compiled if kernel.name not in ("decide", "write") and kernel.wide_loads == 0
    ] == []
    assert [kernel for kernel in compiled if "update" in kernel.name and kernel.wide_stores == 0] == []


# KiB in flight on a multiprocessor with which a GPU reaches its memory bandwidth, by CUB's tuning.
@pytest.mark.parametrize(
    ("architecture", "kib"), [("sm_80", 16), ("sm_90", 48)], ids=["A100", "H100 (32) and H200"]
)
def test_scan_and_update_have_enough_bytes_in_flight(compiled, architecture: str, kib: int) -> None:
    found = {kernel.name: kernel.in_flight for kernel in compiled if kernel.architecture == architecture}
    if not found:
        pytest.skip(f"the extension was built without {architecture}")
    sizes = [name for name in found if name not in ("decide", "write")]
    assert [(name, found[name]) for name in sizes if (found[name] or (0, 0))[0] < 1024 * kib] == []


def test_the_second_number_of_an_update_adds_the_loads_of_momentum_and_average(compiled) -> None:
    updates = [kernel.in_flight for kernel in compiled if "update" in kernel.name and kernel.in_flight]
    assert {found.most / found.least for found in updates} == {(16 + 3 * 32) / (16 + 32)}


def test_the_table_in_the_repository_is_that_of_the_build(compiled) -> None:
    cuda = cuda_resources.build_info()["cuda"]
    table = cuda_resources.PATH.read_text()
    if f"nvcc {cuda['version']}\n" not in table:
        pytest.skip(f"the table was made by another nvcc than this one ({cuda['version']})")
    rows = set(cuda_resources.as_markdown(compiled, cuda["version"]).splitlines())
    assert rows <= set(table.splitlines()), (
        "run python -m benchmarks.resources.cuda --output benchmarks/results"
    )
