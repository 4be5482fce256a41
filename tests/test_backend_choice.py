"""Which backend runs the steps, by the devices of the parameters."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch.nn import Parameter

from fused_tricks import FusedSGD
from fused_tricks.backends import BACKENDS, stepper_class

ROOT = Path(__file__).parent.parent


@pytest.fixture
def with_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine with a GPU."""
    usable = BACKENDS["cuda"]._replace(unavailable_because=lambda: None)
    monkeypatch.setitem(BACKENDS, "cuda", usable)


@pytest.mark.usefixtures("with_cuda")
def test_auto_takes_no_gpu_backend_for_cpu_parameters_without_gradients() -> None:
    optimizer = FusedSGD([Parameter(torch.zeros(3))], lr=0.1)
    optimizer.step()
    assert type(optimizer._stepper) is stepper_class("auto", [("p", torch.zeros(3))])
    assert optimizer.stats().applied_steps == 1


@pytest.mark.usefixtures("with_cuda")
def test_a_gpu_backend_refuses_cpu_parameters_without_gradients() -> None:
    optimizer = FusedSGD([Parameter(torch.zeros(3))], lr=0.1, backend="cuda")
    with pytest.raises(RuntimeError, match="these are on cpu"):
        optimizer.step()


@pytest.mark.usefixtures("with_cuda")
@pytest.mark.parametrize("name", ["auto", "cuda"])
def test_an_optimizer_without_parameters_counts_its_steps(name: str) -> None:
    optimizer = FusedSGD([{"params": []}], lr=0.1, backend=name)
    optimizer.step()
    assert optimizer.stats().applied_steps == 1


def test_auto_says_once_that_only_the_slow_backend_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, backend in list(BACKENDS.items()):
        if backend.device_type is not None:
            unusable = backend._replace(unavailable_because=lambda: "this is a test of warnings")
            monkeypatch.setitem(BACKENDS, name, unusable)
    for expected in (1, 0):
        param = Parameter(torch.zeros(3))
        param.grad = torch.ones(3)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            FusedSGD([param], lr=0.1).step()
        assert [str(w.message).count("this is a test of warnings") > 0 for w in caught] == [True] * expected


CHOICES = [
    ("cuda", ["cuda", "triton", "cpu", "reference"], "cuda"),
    ("cuda", ["triton", "cpu", "reference"], "triton"),
    ("cuda", ["cpu", "reference"], "reference"),
    ("cpu", ["cuda", "triton", "cpu", "reference"], "cpu"),
    ("cpu", ["triton", "reference"], "reference"),
]

# A parameter that only says where it is, so that no GPU is needed.
CHOOSE = """
import json, sys, types
import torch
from fused_tricks import backends

chosen = []
for device, usable in json.load(sys.stdin):
    param = types.SimpleNamespace(device=torch.device(device, 0), grad=None)
    changed = {
        name: backend._replace(unavailable_because=lambda name=name: None if name in usable else "not here")
        for name, backend in backends.BACKENDS.items()
    }
    backends.BACKENDS.update(changed)
    stepper = backends.stepper_class("auto", [("weight", param)])
    chosen.append(next(name for name, backend in changed.items() if backend.stepper is stepper))
print(json.dumps(chosen))
"""


@pytest.fixture(scope="module")
def chosen() -> dict[tuple[str, tuple[str, ...]], str]:
    """By another Python, in which Triton's kernels are not interpreted."""
    cases = [(device, usable) for device, usable, _ in CHOICES]
    result = subprocess.run(
        [sys.executable, "-c", CHOOSE],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "0"},
        input=json.dumps(cases),
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    names = json.loads(result.stdout)
    return {(device, tuple(usable)): name for (device, usable), name in zip(cases, names, strict=True)}


@pytest.mark.parametrize(("device", "usable", "expected"), CHOICES)
def test_auto_takes_the_fastest_backend_that_is_usable_where_the_parameters_are(
    chosen, device, usable, expected
) -> None:
    assert chosen[device, tuple(usable)] == expected
