"""Which backend `"auto"` takes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

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
