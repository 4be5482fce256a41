"""Fixtures shared by all tests."""

from __future__ import annotations

import gc
import os
import zlib
from collections import defaultdict
from collections.abc import Iterator

# Test processes share the cores, so a waiting thread must not spin. OpenMP reads the variable when torch loads OpenMP.
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


# The most instances of a test on Triton's interpreter, where a step takes 50 ms: with the plan guard of the extension,
# and with the plan guard in Python.
INTERPRETED = {"triton": 2, backends.WITHOUT_EXTENSION: 1}


def spread(items: list[pytest.Item], count: int) -> list[pytest.Item]:
    """Returns at most `count` items, drawn by their names, because neighbours often differ little."""
    return sorted(items, key=lambda item: zlib.crc32(item.nodeid.encode()))[:count]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--backend",
        action="append",
        default=[],
        choices=backends.NAMES,
        help="leave out the tests of other backends; can be repeated",
    )


def pytest_report_header() -> list[str]:
    """Names each backend whose tests are left out, with the reason."""
    reasons = {name: backends.left_out_because(name) for name in backends.NAMES}
    lines = [f"no tests of backend {name}: {reason}" for name, reason in reasons.items() if reason]
    if backends.is_slow("triton"):
        lines.append(
            f"backend triton: {INTERPRETED['triton']} instances of a test; --backend=triton runs all"
        )
    return lines


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Runs tests with the marker `both_watches` on one more backend."""
    test = metafunc.definition
    chosen = any("backend" in mark.args[0] for mark in test.iter_markers("parametrize"))
    if "backend" in metafunc.fixturenames and test.get_closest_marker("both_watches") and not chosen:
        every = [*backends.NAMES, backends.WITHOUT_EXTENSION]
        test.add_marker(pytest.mark.parametrize("backend", every, indirect=True))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out the tests of unusable backends and those not in `--backend`, and marks the tests of slow backends."""
    asked = config.getoption("backend")
    kept, left_out = [], []
    interpreted: dict[tuple[str, str], list[pytest.Item]] = defaultdict(list)
    for item in items:
        callspec = getattr(item, "callspec", None)
        given = "" if callspec is None else str(callspec.params.get("backend", ""))
        name = backends.base(given)
        if name in backends.NAMES and ((asked and name not in asked) or backends.left_out_because(name)):
            left_out.append(item)
            continue
        kept.append(item)
        if backends.is_slow(name) and not asked and not item.get_closest_marker("every_case"):
            interpreted[item.nodeid.partition("[")[0], given].append(item)
        if name in GPU_BACKENDS:
            item.add_marker("gpu")
        if backends.is_slow(name):
            item.add_marker("slow")
    few = {
        item
        for (_, given), instances in interpreted.items()
        for item in spread(instances, INTERPRETED[given])
    }
    many = {item for instances in interpreted.values() for item in instances} - few
    items[:] = [item for item in kept if item not in many]
    left_out += many
    if left_out:
        config.hook.pytest_deselected(items=left_out)


def pytest_collection_finish() -> None:
    """Exempts modules and tests from garbage collection, which benchmarks run again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(params=backends.NAMES)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Yields the name of each usable backend in turn."""
    reason = backends.unusable_because(backends.base(request.param))
    if reason is not None:
        pytest.skip(f"backend {request.param}: {reason}")
    with backends.prepared(request.param) as name:
        yield name


@pytest.fixture
def device(backend: str) -> torch.device:
    """Returns the device whose tensors `backend` updates."""
    return backends.device_of(backend)


@pytest.fixture
def long_run(backend: str) -> int:
    """Returns the number of steps of a test that compares a long run."""
    if backends.is_slow(backend):
        return 3
    return 5 if backends.is_interpreted(backend) else 60


@pytest.fixture
def many_steps(backend: str) -> int:
    """Returns the number of steps of a test that follows the loss scale up and down."""
    return 16 if backends.is_slow(backend) else 80
