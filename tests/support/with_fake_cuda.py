"""Runs a module as `python -m` does, with a fake `torch.cuda` and the emulated CUDA kernels as a backend.

usage: python tests/support/with_fake_cuda.py -m MODULE ARGUMENTS
"""

from __future__ import annotations

import gc
import runpy
import sys
from pathlib import Path

import pytest

if __name__ == "__main__":
    tests = Path(__file__).parents[1]
    sys.path[:1] = [str(tests.parent), str(tests)]
    sys.argv = sys.argv[2:]
    if sys.argv[0] != "pytest":
        from support import emulation  # noqa: F401  # adds a backend
        from support.fake_cuda import FakeCuda

        FakeCuda(pytest.MonkeyPatch())
    # Benchmarks collect garbage again and again, and modules stay alive.
    gc.collect()
    gc.freeze()
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
