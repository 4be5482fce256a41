"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from pathlib import Path

# Test processes share the cores, so a thread that waits must not spin. OpenMP reads this when torch loads it.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch

import support  # noqa: F401  # before the package: chooses how Triton runs
from fused_tricks.backends.triton import IS_INTERPRETED
from support import backends, sanitizers

sanitizers.install()

# Backends that run on a GPU; Triton's interpreter runs on the CPU.
GPU_BACKENDS = {"cuda"} if IS_INTERPRETED else {"cuda", "triton"}

collect_ignore_glob = [] if torch.distributed.is_available() else ["distributed/*"]


# Tests that train, start other processes or compile kernels, by their files.
SLOW = (
    "backends/test_cuda_compiled.py",
    "backends/test_triton_compiled.py",
    "benchmarks/",
    "cast/test_cast_models.py",
    "distributed/",
    "examples/",
    "fuzz/",
    "installation/",
    "zero_gamma/test_gamma_table.py",
    "zero_gamma/test_model_untouched.py",
    "zero_gamma/test_random_networks.py",
    "zero_gamma/test_timm_models.py",
    "zero_gamma/test_torchvision_models.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks the tests that need a GPU, those of other packages, and those that take long."""
    for item in items:
        file = item.path.relative_to(Path(__file__).parent).as_posix()
        callspec = getattr(item, "callspec", None)
        backend = "" if callspec is None else str(callspec.params.get("backend", ""))
        if file in ("backends/test_gpu.py", "backends/test_gpu_hazards.py") or backend in GPU_BACKENDS:
            item.add_marker("gpu")
        if file.startswith("integrations/"):
            item.add_marker("integration")
        if file.startswith(SLOW) or backends.is_slow(backend):
            item.add_marker("slow")


@pytest.fixture(params=backends.NAMES)
def backend(request: pytest.FixtureRequest) -> str:
    """The name of each backend that is usable here; the others are skipped with their reason."""
    reason = backends.unusable_because(request.param)
    if reason is not None:
        pytest.skip(f"backend {request.param}: {reason}")
    return request.param


@pytest.fixture
def device(backend: str) -> torch.device:
    """The device whose tensors `backend` updates."""
    return backends.device_of(backend)


@pytest.fixture
def long_run(backend: str) -> int:
    """How many steps a test takes that compares a long run."""
    if backends.is_slow(backend):
        return 3
    return 5 if backends.is_interpreted(backend) else 200


@pytest.fixture
def many_steps(backend: str) -> int:
    """How many steps a test takes that follows the loss scale over its ups and downs."""
    return 16 if backends.is_slow(backend) else 80
