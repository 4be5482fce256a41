"""The choice of the backend from the devices of the parameters."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch.nn import Parameter

from fused_tricks import FusedSGD
from fused_tricks.backends import BACKENDS, availability, choose_backend
from fused_tricks.extension import load_extension, missing_because

ROOT = Path(__file__).parents[2]


@pytest.fixture
def with_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the backend `cuda` usable, as on a machine with a GPU."""
    usable = BACKENDS["cuda"]._replace(unavailable_because=lambda: None)
    monkeypatch.setitem(BACKENDS, "cuda", usable)


@pytest.mark.usefixtures("with_cuda")
def test_auto_takes_no_gpu_backend_for_cpu_parameters_without_gradients() -> None:
    optimizer = FusedSGD([Parameter(torch.zeros(3))], lr=0.1)
    optimizer.step()
    assert optimizer.backend == choose_backend("auto", [("p", torch.zeros(3))])
    assert optimizer.stats().applied_steps == 1


@pytest.mark.usefixtures("with_cuda")
def test_a_gpu_backend_refuses_cpu_parameters_without_gradients() -> None:
    optimizer = FusedSGD([Parameter(torch.zeros(3))], lr=0.1, backend="cuda")
    with pytest.raises(RuntimeError, match="the parameters are on cpu"):
        optimizer.step()


@pytest.mark.usefixtures("with_cuda")
@pytest.mark.parametrize("name", ["auto", "cuda"])
def test_an_optimizer_without_parameters_counts_its_steps(name: str) -> None:
    optimizer = FusedSGD([{"params": []}], lr=0.1, backend=name)
    optimizer.step()
    assert optimizer.stats().applied_steps == 1


def test_auto_says_once_at_the_users_line_that_only_the_slow_backend_is_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
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
        assert all(warning.filename == __file__ for warning in caught)


# The device of the parameters, the usable backends, the backends that refuse the device, and the choice.
CHOICES = [
    ("cuda", ["cuda", "triton", "cpu", "reference"], [], "cuda"),
    ("cuda", ["triton", "cpu", "reference"], [], "triton"),
    ("cuda", ["cuda", "triton", "cpu", "reference"], ["cuda"], "triton"),
    ("cuda", ["cpu", "reference"], [], "reference"),
    ("cuda", ["cuda", "triton", "cpu", "reference"], ["cuda", "triton"], "reference"),
    ("cpu", ["cuda", "triton", "cpu", "reference"], [], "cpu"),
    ("cpu", ["triton", "reference"], [], "reference"),
]

# The parameter has a device and no memory, so that no GPU is required.
CHOOSE = """
import json, sys, types
import torch
from fused_tricks import backends

chosen = []
for device, usable, refusing in json.load(sys.stdin):
    param = types.SimpleNamespace(device=torch.device(device, 0), grad=None)
    changed = {
        name: backend._replace(
            unavailable_because=lambda name=name: None if name in usable else "not here",
            unusable_on=lambda device, name=name: "not on this GPU" if name in refusing else None,
        )
        for name, backend in backends.BACKENDS.items()
    }
    backends.BACKENDS.update(changed)
    chosen.append(backends.choose_backend("auto", [("weight", param)]))
print(json.dumps(chosen))
"""


@pytest.fixture(scope="module")
def chosen() -> list[str]:
    """Returns the choices of another Python process, in which Triton compiles its kernels."""
    cases = [case for *case, _ in CHOICES]
    result = subprocess.run(
        [sys.executable, "-c", CHOOSE],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "0"},
        input=json.dumps(cases),
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    names: list[str] = json.loads(result.stdout)
    return names


@pytest.mark.parametrize("case", range(len(CHOICES)), ids=[f"{c[0]}-{c[1][0]}-{c[-1]}" for c in CHOICES])
def test_auto_takes_the_fastest_backend_that_is_usable_where_the_parameters_are(chosen, case) -> None:
    assert chosen[case] == CHOICES[case][-1]


def test_a_backend_that_cannot_serve_the_device_is_refused_with_its_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    refusing = BACKENDS["cpu"]._replace(unusable_on=lambda device: f"{device} is too old")
    monkeypatch.setitem(BACKENDS, "cpu", refusing)
    param = Parameter(torch.zeros(3))
    param.grad = torch.ones(3)
    optimizer = FusedSGD([param], lr=0.1, backend="cpu")
    with pytest.raises(RuntimeError, match="backend='cpu' is not usable on cpu: cpu is too old"):
        optimizer.step()
    assert param.tolist() == [0, 0, 0] and optimizer.stats().applied_steps == 0


# The functions of a driver that the CUDA runtime calls before it compares the versions.
OLD_DRIVER = """
#include <string.h>
static int refuse(void) { return 100; }
int cuInit(unsigned flags) { return 0; }
int cuDriverGetVersion(int* version) { *version = 11080; return 0; }
int cuGetProcAddress(const char* name, void** function, int version, unsigned long long flags) {
  *function = (void*)refuse;
  if (!strcmp(name, "cuInit")) *function = (void*)cuInit;
  if (!strcmp(name, "cuDriverGetVersion")) *function = (void*)cuDriverGetVersion;
  if (!strcmp(name, "cuGetProcAddress")) *function = (void*)cuGetProcAddress;
  return 0;
}
int cuGetProcAddress_v2(const char* name, void** function, int version, unsigned long long flags, int* status) {
  if (status) *status = 0;
  return cuGetProcAddress(name, function, version, flags);
}
"""


@pytest.mark.slow
def test_a_driver_older_than_the_build_is_named_as_the_reason(tmp_path: Path) -> None:
    if missing_because() is not None or not hasattr(load_extension(), "CudaStep"):
        pytest.skip("the extension was built without CUDA")
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None or torch.cuda.is_available():
        pytest.skip("this needs a C compiler, and no driver of a GPU")
    (tmp_path / "driver.c").write_text(OLD_DRIVER)
    library = str(tmp_path / "libcuda.so.1")
    subprocess.run([compiler, "-shared", "-fPIC", str(tmp_path / "driver.c"), "-o", library], check=True)
    code = "from fused_tricks.extension import load_extension as load; print(load().cuda_unusable_because(0))"
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "LD_LIBRARY_PATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert "the driver supports CUDA 11.8 and the extension was built with CUDA" in result.stdout, (
        result.stderr
    )


def test_a_gpu_that_torch_cannot_use_is_a_reason_and_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def busy() -> int:
        raise RuntimeError("CUDA error: all CUDA-capable devices are busy or unavailable\nmore lines")

    usable = BACKENDS["cuda"]._replace(unavailable_because=lambda: None)
    monkeypatch.setitem(BACKENDS, "cuda", usable)
    monkeypatch.setattr(torch.cuda, "current_device", busy)
    reason = availability()["cuda"]
    assert reason == "torch cannot use the GPU (CUDA error: all CUDA-capable devices are busy or unavailable)"


def test_the_extension_says_why_its_kernels_cannot_run_on_a_gpu() -> None:
    if missing_because() is not None or not hasattr(load_extension(), "CudaStep"):
        pytest.skip("the extension was built without CUDA")
    reason = load_extension().cuda_unusable_because(0)
    assert (reason == "") if torch.cuda.is_available() else "driver" in reason
