"""The emulated CUDA kernels, their host side and the plan under AddressSanitizer and UndefinedBehaviorSanitizer."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import emulation

TESTS = Path(__file__).parent


def runtime(name: str) -> str | None:
    """The path of a sanitizer's runtime, which must be loaded before Python."""
    path = subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
    return path if os.path.isabs(path) else None


@pytest.mark.skipif(
    emulation.unusable_because() is not None, reason=f"no emulation of CUDA: {emulation.unusable_because()}"
)
def test_optimizer_tests_pass_under_the_sanitizers() -> None:
    asan, standard_library = runtime("libasan.so"), runtime("libstdc++.so")
    if asan is None or standard_library is None:
        pytest.skip("g++ has no AddressSanitizer runtime here")
    environment = {
        **os.environ,
        "FUSED_TRICKS_SANITIZE": "1",
        # Without the second the sanitizer does not find the exceptions that it watches.
        "LD_PRELOAD": f"{asan} {standard_library}",
        # Python and torch keep memory until the end; fibers' stacks are not the system's.
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    environment.pop("PYTEST_XDIST_WORKER", None)
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", "-k"]
    # A choice that reaches every path of the kernels: every kind of launch, odd sizes, unaligned and strided tensors.
    command += ["(cuda_emulated and not 10000 and not 31) or (emulated and (beside or wide or first_step))"]
    files = ["test_cuda_emulated.py", "test_layouts.py", "test_overflow.py", "test_exactness.py"]
    result = subprocess.run(
        [*command, *files], cwd=TESTS, env=environment, capture_output=True, text=True, timeout=900
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    assert " passed" in result.stdout
