"""Fixtures shared by all tests."""

from __future__ import annotations

import os

# Test processes share the cores, so a thread that waits must not spin. OpenMP reads this when torch loads it.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch

import backends
import sanitizers

sanitizers.install()

collect_ignore_glob = [] if torch.distributed.is_available() else ["test_distributed_*.py"]


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
