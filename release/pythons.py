"""The search for the interpreters to build wheels for."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

# The classifiers and the list of cibuildwheel in pyproject.toml name the same releases.
MINORS = range(10, 15)
_DESCRIBE = (
    "import sys, sysconfig; "
    "print(sys.implementation.name, bool(sysconfig.get_config_var('Py_GIL_DISABLED')), *sys.version_info[:2])"
)


class Python(NamedTuple):
    """An interpreter: its file, and its tag in the name of a wheel, such as `"cp311"`."""

    path: str
    tag: str


def find_pythons(names: Sequence[str] = (), home: Path | None = None) -> list[Python]:
    """Returns the interpreters with the given names; by default one of each supported release of CPython.

    Args:
        names: Releases such as `"python3.11"`, names on `PATH`, or files.
        home: The folder with `.pyenv`; by default the user's.

    Raises:
        SystemExit: A name is not a supported interpreter, or none was found.
    """
    if names:
        found = [_named(name, home or Path.home()) for name in names]
        for name, python in zip(names, found):
            if python is None:
                raise SystemExit(f"{name} is not a CPython from 3.{MINORS[0]} to 3.{MINORS[-1]} with a GIL")
    else:
        found = [_first(minor, home or Path.home()) for minor in MINORS]
    pythons = [python for python in found if python is not None]
    if not pythons:
        raise SystemExit(f"no python3.{MINORS[0]} to python3.{MINORS[-1]} on PATH; name them: PYTHONS='...'")
    return pythons


def _named(name: str, home: Path) -> Python | None:
    release = re.fullmatch(r"python3\.(\d+)", name)
    return _first(int(release[1]), home) if release else _inspect(name)


def _first(minor: int, home: Path) -> Python | None:
    """Returns the first interpreter of a release on `PATH` or among pyenv's that works."""
    inspected = (_inspect(name) for name in _candidates(minor, home))
    return next((python for python in inspected if python and python.tag == f"cp3{minor}"), None)


def _candidates(minor: int, home: Path) -> Iterator[str]:
    yield f"python3.{minor}"
    # pyenv's names on PATH fail for a release that is not selected.
    yield from map(str, sorted(home.glob(f".pyenv/versions/3.{minor}.*/bin/python")))


def _inspect(name: str) -> Python | None:
    """Returns a supported interpreter; None if the name is none."""
    path = shutil.which(name)
    if path is None:
        return None
    result = subprocess.run([path, "-c", _DESCRIBE], capture_output=True, text=True)
    words = result.stdout.split()
    supported = result.returncode == 0 and words[:3] == ["cpython", "False", "3"] and int(words[3]) in MINORS
    return Python(path, f"cp3{words[3]}") if supported else None
