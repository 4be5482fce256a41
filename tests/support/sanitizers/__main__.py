"""`python tests/support/sanitizers address|thread`: builds a copy of the package with a sanitizer and tests it.

`address` is AddressSanitizer with UndefinedBehaviorSanitizer, over the extension and the emulated CUDA kernels;
`thread` is ThreadSanitizer, over the extension's threads. Further arguments go to pytest.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]
COPIED = (
    "benchmarks",
    "csrc",
    "examples",
    "fused_tricks",
    "tests",
    "README.md",
    "LICENSE",
    "pyproject.toml",
    "setup.py",
)

FLAGS = {
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g1", "-O1"],
    "thread": ["-fsanitize=thread", "-g1", "-O1"],
}
RUNTIMES = {"address": ["libasan.so", "libubsan.so"], "thread": ["libtsan.so"]}
# Every kind of step over odd sizes, unaligned and strided tensors, changed plans and loaded state. Tests of Python code
# alone would only add time.
TESTS = {
    "address": [
        "backends/test_cuda_emulated.py",
        "backends/test_gpu_hazards.py",
        "optimizer/test_layouts.py",
        "optimizer/test_overflow.py",
        "optimizer/test_changes_between_steps.py",
        "optimizer/test_plan.py",
        "optimizer/test_checkpoint.py",
        "backends/test_instruction_sets.py",
        "--backend=cpu",
        "--backend=emulated_cuda",
    ],
    "thread": [
        "optimizer/test_threads.py",
        "optimizer/test_parallel_steps.py",
        "backends/test_instruction_sets.py",
        "--backend=cpu",
    ],
}


def main(kind: str, arguments: list[str]) -> int:
    """Builds the copy, runs the tests, and returns pytest's exit code."""
    tree = copied_tree(kind)
    flags = " ".join(FLAGS[kind])
    environment = {
        **os.environ,
        "CXX": os.environ.get("CXX", "g++"),
        "CXXFLAGS": flags,
        "LDFLAGS": flags,
        "FUSED_TRICKS_CUDA": "0",
        "FUSED_TRICKS_REQUIRE_EXTENSION": "1",
        "PYTHONPATH": str(tree),
    }
    build = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    subprocess.run(build, cwd=tree, env=environment, check=True)
    environment["FUSED_TRICKS_SANITIZE"] = kind
    if kind == "thread":
        threads = tree / "build" / "threads.so"
        source = tree / "tests" / "support" / "sanitizers" / "threads.cpp"
        compiler = environment["CXX"].split()
        shared = ["-std=c++17", "-fPIC", "-shared", *FLAGS[kind], str(source), "-o", str(threads)]
        subprocess.run([*compiler, *shared], check=True)
        environment["FUSED_TRICKS_SANITIZE_THREADS"] = str(threads)
    runtimes = [runtime(environment["CXX"], name) for name in (*RUNTIMES[kind], "libstdc++.so")]
    # Without libstdc++, a sanitizer does not find the functions of exceptions that it intercepts.
    environment["LD_PRELOAD"] = " ".join(runtimes)
    # Python and torch keep memory until the end, and fibers have stacks of their own.
    environment["ASAN_OPTIONS"] = "detect_leaks=0:detect_stack_use_after_return=0"
    environment["UBSAN_OPTIONS"] = "print_stacktrace=1"
    # Torch's own threads are not instrumented.
    environment["TSAN_OPTIONS"] = "halt_on_error=1:ignore_noninstrumented_modules=1:report_signal_unsafe=0"
    pytest = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist"]
    # ThreadSanitizer requires fixed addresses, which random address layouts may occupy.
    fixed = ["setarch", platform.machine(), "-R"] if kind == "thread" else []
    return subprocess.run(
        [*fixed, *pytest, *TESTS[kind], *arguments], cwd=tree / "tests", env=environment
    ).returncode


def copied_tree(kind: str) -> Path:
    """Copies the checkout, and returns the copy. Files keep their times, so that little is compiled again."""
    tree = ROOT / "build" / "sanitizers" / kind
    for name in COPIED:
        source, copy = ROOT / name, tree / name
        if source.is_dir():
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(
                source, copy, ignore=shutil.ignore_patterns("*.so", "__pycache__", "_build_info.json")
            )
        else:
            tree.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, copy)
    return tree


def runtime(compiler: str, name: str) -> str:
    """Returns the path of a library that must be loaded before Python."""
    command = [*compiler.split(), f"-print-file-name={name}"]
    path = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    if not os.path.isabs(path):
        raise SystemExit(f"{compiler} has no {name} here; install the sanitizers' runtimes that belong to it")
    return path


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in FLAGS:
        raise SystemExit(__doc__)
    raise SystemExit(main(sys.argv[1], sys.argv[2:]))
