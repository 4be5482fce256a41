"""The wheels in new environments: `python -m release.smoke --torch 2.10.0 2.14.1` runs tests/smoke with each.

A version with a label, such as `2.14.1+cpu`, comes from PyTorch's index for that label.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from release.check import package_version
from release.pythons import Python, find_pythons

ROOT = Path(__file__).parents[1]
TORCH_INDEX = "https://download.pytorch.org/whl"


def main() -> None:
    """Tests the wheels, and prints a table.

    Raises:
        SystemExit: A test failed.
    """
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition(":")[0])
    parser.add_argument("pythons", nargs="*", help="interpreters; by default one of each supported release")
    parser.add_argument("--torch", nargs="+", required=True, metavar="VERSION", help="releases of torch")
    parser.add_argument("--folder", type=Path, default=ROOT / "dist", help="the folder with the wheels")
    arguments = parser.parse_args()
    wheels = arguments.folder.resolve()
    results = {
        (python.tag, torch): test(python, torch, wheels)
        for python in find_pythons(arguments.pythons)
        for torch in arguments.torch
    }
    for (tag, torch), result in results.items():
        print(f"{tag}  torch {torch:<14}  {result}")
    if any(result.startswith("failed") for result in results.values()):
        raise SystemExit(1)


def test(python: Python, torch: str, wheels: Path) -> str:
    """Tests the wheel for an interpreter with a release of torch in a new environment, and returns the result."""
    folder = ROOT / "build" / "smoke" / f"{python.tag}-torch-{torch}"
    shutil.rmtree(folder, ignore_errors=True)
    print(f"\n{folder.relative_to(ROOT)}", flush=True)
    try:
        return _test(python, torch, wheels, folder)
    except subprocess.CalledProcessError as error:
        return f"failed: {' '.join(map(str, error.cmd))[:200]}"
    finally:
        # An environment with torch takes several gigabytes.
        shutil.rmtree(folder, ignore_errors=True)


def _test(python: Python, torch: str, wheels: Path, folder: Path) -> str:
    _run([python.path, "-m", "venv", str(folder / "venv")], ROOT)
    executable = str(folder / "venv" / "bin" / "python")
    install = [executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    requirement, label = f"torch=={torch}", torch.partition("+")[2]
    if label:
        # Everything else comes from the default index.
        _run([*install, "--no-deps", "--extra-index-url", f"{TORCH_INDEX}/{label}", requirement], folder)
    _run([*install, requirement, "pytest"], folder)
    package = f"fused_tricks=={package_version()}"
    _run([*install, "--no-index", "--find-links", str(wheels), package], folder)
    report = json.loads(_run([executable, "-m", "fused_tricks", "--json"], folder))
    versions, build = report["versions"], report["extension"]["build"]
    # pytest would find the configuration of the checkout, which puts the source tree on the path.
    (folder / "pytest.ini").write_text("[pytest]\n")
    shutil.copytree(ROOT / "tests" / "smoke", folder / "smoke")
    output = _run([executable, "-m", "pytest", "-p", "no:cacheprovider", "-rs", "smoke"], folder)
    print(output, flush=True)
    if not versions["folder"].startswith(str(folder)) or f" in {versions['folder']}\n" not in output:
        return f"failed: the tests import another fused_tricks than {versions['folder']}"
    cuda = build["cuda"] and build["cuda"]["version"]
    return f"passed: CUDA {versions['torch_cuda']} in torch, CUDA {cuda} in the wheel"


def _run(command: list[str], folder: Path) -> str:
    """Returns the output of a command. Errors of the command go to the terminal."""
    folder.mkdir(parents=True, exist_ok=True)
    # `PYTHONPATH` could hide the installed package.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True)
    if result.returncode != 0:
        print(result.stdout, file=sys.stderr, flush=True)
    result.check_returncode()
    return result.stdout


if __name__ == "__main__":
    main()
