"""Builds the extension into the source tree for the GPU of this machine, unless it exists.

`python -m benchmarks.gpu_report.build` requires no network and installs nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "fused_tricks"
MODULE = PACKAGE / f"_extension{sysconfig.get_config_var('EXT_SUFFIX')}"
INFO = PACKAGE / "_build_info.json"
SOURCES = ("LICENSE", "README.md", "MANIFEST.in", "pyproject.toml", "setup.py", "csrc", "fused_tricks")


def is_built(architecture: str | None) -> bool:
    """True if the tree has an extension with kernels for the architecture, and no source is newer.

    Args:
        architecture: Such as `9.0`. None accepts an extension of any age, without kernels.
    """
    if architecture is None or not MODULE.exists() or not INFO.exists():
        return MODULE.exists() and architecture is None
    newest = max(path.stat().st_mtime for path in (ROOT / "csrc").rglob("*") if path.is_file())
    if newest > MODULE.stat().st_mtime:
        return False
    cuda = json.loads(INFO.read_text(encoding="utf-8")).get("cuda")
    return cuda is not None and architecture in [each.removesuffix("+PTX") for each in cuda["architectures"]]


def build(architecture: str, folder: Path) -> int:
    """Builds a copy of the tree and copies the extension back.

    If the build fails, the tree keeps its present extension.

    Args:
        architecture: Such as `9.0`.
        folder: The folder of the copy. An existing copy makes the build faster.

    Returns:
        The exit status of setup.py.
    """
    for name in SOURCES:
        source, target = ROOT / name, folder / name
        if source.is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "*.so", INFO.name)
            shutil.copytree(source, target, dirs_exist_ok=True, ignore=ignored)
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target)
    environment = {**os.environ, "TORCH_CUDA_ARCH_LIST": architecture}
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    status = subprocess.run(command, cwd=folder, env=environment).returncode
    built = folder / PACKAGE.name
    if status != 0:
        return status
    info = json.loads((built / INFO.name).read_text(encoding="utf-8"))
    if info["extension_failure"]:
        print("error: the extension was not built:", info["extension_failure"])
        return 1
    MODULE.unlink(missing_ok=True)
    shutil.copy2(built / MODULE.name, MODULE)
    shutil.copy2(built / INFO.name, INFO)
    if info["cuda_failure"]:
        print("error: the CUDA kernels were not built:", info["cuda_failure"])
        return 1
    return 0


def main(arguments: Sequence[str]) -> int:
    """Builds the extension if necessary, and returns the exit status of the build."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_report.build", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--architecture", help="of the GPU, such as 9.0; without it the CPU's code is enough")
    parser.add_argument(
        "--folder", type=Path, default=Path("build/gpu_report/tree"), help="folder of the copy that is built"
    )
    options = parser.parse_args(arguments)
    if is_built(options.architecture):
        print(f"{MODULE.name} is built already")
        return 0
    if options.architecture is None:
        print("the extension is not built, and there is no GPU to build it for: make build")
        return 1
    status = build(options.architecture, options.folder.resolve())
    if status == 0:
        print(f"{MODULE.name} is built for {options.architecture}")
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
