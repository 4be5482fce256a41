"""Checks of a release: `python -m release.check` prints a table of the files, and fails with the problems found."""

from __future__ import annotations

import argparse
import json
import re
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from release.old_glibc import OLDEST
from release.pythons import MINORS

ROOT = Path(__file__).parents[1]
MEGABYTE = 10**6
LARGEST = 5 * MEGABYTE


def main() -> None:
    """Checks the files, and the tag if there is one.

    Raises:
        SystemExit: There are problems.
    """
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition(":")[0])
    parser.add_argument("--folder", type=Path, default=ROOT / "dist", help="the folder with the files")
    parser.add_argument("--cuda", help="the CUDA release of the kernels, such as 12.9")
    parser.add_argument("--tag", help="the tag of the release in git, such as v1.2.3")
    arguments = parser.parse_args()
    version = package_version()
    files = sorted([*arguments.folder.glob("*.whl"), *arguments.folder.glob("*.tar.gz")])
    problems = [] if files else [f"{arguments.folder} has no files; make wheels builds them"]
    if arguments.tag:
        problems += tag_problems(arguments.tag, version, (ROOT / "CHANGELOG.md").read_text())
        problems += missing_files([file.name for file in files])
        problems += readme_problems((ROOT / "README.md").read_text())
    for file in files:
        info = build_info(file)
        print(f"{file.name:<76} {file.stat().st_size / MEGABYTE:5.2f} MB  {described(info)}")
        problems += [
            f"{file.name}: {problem}" for problem in file_problems(file, info, version, arguments.cuda)
        ]
    if problems:
        raise SystemExit("\n".join(problems))


def package_version() -> str:
    """Returns the version of the package. No other place in the repository states it."""
    text = (ROOT / "fused_tricks" / "__init__.py").read_text()
    (version,) = re.findall(r'^__version__ = "(.+)"$', text, re.MULTILINE)
    return str(version)


def tag_problems(tag: str, version: str, changelog: str) -> Iterator[str]:
    """Yields the reasons why a tag cannot be released."""
    if tag != f"v{version}":
        yield f"the tag must be v{version}, the version of fused_tricks/__init__.py, got {tag}"
    if not re.search(rf"^## \[{re.escape(version)}\] - \d{{4}}-\d\d-\d\d$", changelog, re.MULTILINE):
        yield f"CHANGELOG.md must have a section '## [{version}] - YYYY-MM-DD'"


def readme_problems(text: str) -> Iterator[str]:
    """Yields the links and pictures of a README that are dead on PyPI, which has no other file of the repository."""
    for target in re.findall(r"\]\(([^()\s]+)\)", text):
        if not target.startswith(("https://", "#")):
            yield f"README.md links to {target}; PyPI requires an address with https://"


def missing_files(names: Sequence[str]) -> Iterator[str]:
    """Yields the files that a release requires and that are not among the names."""
    required = {f"the wheel for CPython 3.{minor}": f"-cp3{minor}-cp3{minor}-manylinux" for minor in MINORS}
    required |= {"the wheel without compiled code": "-py3-none-any.whl", "the sources": ".tar.gz"}
    for what, part in required.items():
        if not any(part in name for name in names):
            yield f"{what} is missing"


def build_info(file: Path) -> dict[str, Any] | None:
    """Returns the record of the build in a wheel; None for a source distribution."""
    if file.suffix != ".whl":
        return None
    with zipfile.ZipFile(file) as content:
        info: dict[str, Any] = json.loads(content.read("fused_tricks/_build_info.json"))
    return info


def described(info: dict[str, Any] | None) -> str:
    """Returns a short description of the compiled code, from the record of a build."""
    if info is None:
        return "the sources"
    if info["extension_failure"] is not None:
        return "no compiled code"
    cuda = info["cuda"]
    return f"CUDA {cuda['version']} for {' '.join(cuda['architectures'])}" if cuda else "no CUDA"


def file_problems(file: Path, info: dict[str, Any] | None, version: str, cuda: str | None) -> Iterator[str]:
    """Yields the reasons why a file cannot be released.

    Args:
        file: A wheel or a source distribution.
        info: The record of the build in the wheel.
        version: The version of the package.
        cuda: The CUDA release that the kernels must have; None for any, or no kernels.
    """
    if not file.name.startswith(f"fused_tricks-{version}{'.tar.gz' if info is None else '-'}"):
        yield f"it must have the version {version}"
    if file.stat().st_size > LARGEST:
        yield f"it must have at most {LARGEST / MEGABYTE:.0f} MB"
    if info is None:
        return
    with zipfile.ZipFile(file) as content:
        names = content.namelist()
    for name in ("py.typed", "LICENSE"):
        if not any(each.endswith(f"/{name}") for each in names):
            yield f"it must contain {name}"
    modules = [name for name in names if name.endswith(".so")]
    if info["extension_failure"] is not None:
        if modules or not file.name.endswith("-py3-none-any.whl"):
            yield "a wheel without the extension must have the tag py3-none-any"
        return
    if [Path(name).parent.name for name in modules] != ["fused_tricks"]:
        yield f"it must contain one shared library, the extension, got {', '.join(modules) or 'none'}"
    versions = [tuple(map(int, each)) for each in re.findall(r"manylinux_(\d+)_(\d+)", file.name)]
    if not versions or min(versions) > OLDEST:
        yield f"its tag must be manylinux_{OLDEST[0]}_{OLDEST[1]} or older"
    if cuda is not None and (info["cuda"] or {}).get("version") != cuda:
        yield f"its kernels must be compiled by CUDA {cuda}, got {described(info)}"


if __name__ == "__main__":
    main()
