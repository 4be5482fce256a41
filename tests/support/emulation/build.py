"""Compiles the emulation if a source has changed. Run as a program, this file shows the compiler's errors."""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pybind11

_HERE = Path(__file__).parent
_ROOT = _HERE.parents[2]
_CSRC = _ROOT / "csrc"
# Kernels that require the flags of an instruction set are left out.
_SOURCES = [
    *(path for path in sorted(_CSRC.rglob("*.cpp")) if not path.stem.startswith("kernels_avx")),
    _HERE / "launch.cpp",
]
_FLAGS = [
    "-std=c++17",
    "-O1",
    "-g1",
    "-fPIC",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-DFUSED_TRICKS_MODULE=fused_tricks_emulation",
    "-DFUSED_TRICKS_CUDA=1",
    "-DFUSED_TRICKS_EMULATION=1",
    *(f"-I{folder}" for folder in (_CSRC, _CSRC / "cuda", _HERE)),
]


def build(sanitize: bool = False) -> Path:
    """Returns the path of the compiled module.

    Args:
        sanitize: True adds AddressSanitizer and UndefinedBehaviorSanitizer. Python must be started with their runtimes.

    Raises:
        FileNotFoundError: If there is no compiler.
        RuntimeError: If the compiler fails. The message contains the compiler's output.
    """
    compiler = shlex.split(os.environ.get("CXX", "")) or [
        shutil.which("g++") or shutil.which("clang++") or ""
    ]
    if not shutil.which(compiler[0]):
        raise FileNotFoundError("the emulation of the CUDA kernels needs a C++ compiler")
    includes = [f"-isystem{pybind11.get_include()}", f"-isystem{sysconfig.get_path('include')}"]
    sanitizers = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"] if sanitize else []
    flags = [*_FLAGS, *sanitizers, *includes]
    folder = _ROOT / "build" / "emulation" / _digest([*compiler, *flags, sys.version])
    module = folder / "fused_tricks_emulation.so"
    if module.exists():
        return module
    folder.mkdir(parents=True, exist_ok=True)
    suffix = f".{os.getpid()}"
    objects = [folder / f"{source.parent.name}_{source.stem}{suffix}.o" for source in _SOURCES]
    commands = [
        [*compiler, *flags, "-c", str(s), "-o", str(o)] for s, o in zip(_SOURCES, objects, strict=True)
    ]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(_run, commands))
    # Several test processes may build at once, so an incomplete module has another name.
    unfinished = module.with_suffix(suffix)
    _run([*compiler, *sanitizers, "-shared", *map(str, objects), "-o", str(unfinished)])
    for path in objects:
        path.unlink()
    unfinished.rename(module)
    return module


def _digest(arguments: list[str]) -> str:
    digest = hashlib.sha256("\0".join(arguments).encode())
    for folder in (_CSRC, _HERE):
        for path in sorted(p for p in folder.rglob("*") if p.suffix in (".h", ".cuh", ".cpp")):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _run(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"{shlex.join(command)}\n{result.stdout}{result.stderr}")


if __name__ == "__main__":
    print(build())
