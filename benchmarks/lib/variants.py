"""Variants of the extension for the CPU: compiled from copies of `csrc/` with replaced texts, and loaded beside it."""

from __future__ import annotations

import functools
import hashlib
import importlib.machinery
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from unittest import mock

from fused_tricks import extension

ROOT = Path(__file__).parents[2]
BUILT = ROOT / "build" / "variants"


@dataclass(frozen=True)
class Edit:
    """A replacement of text in a file of `csrc/`."""

    file: str
    old: str
    new: str

    def apply(self, source: Path) -> None:
        """Edits the copy of the file in the folder `source`.

        Raises:
            ValueError: The file does not contain the old text.
        """
        path = source / self.file
        text = path.read_text()
        if self.old not in text:
            raise ValueError(f"csrc/{self.file} no longer has {self.old!r}: mend the Edit of this benchmark")
        path.write_text(text.replace(self.old, self.new))


def build(edits: Sequence[Edit], base: Sequence[Edit] = ()) -> Path:
    """Returns the path of the extension with the edits, after compiling it if it does not exist.

    Args:
        edits: The edits of this variant.
        base: The edits of all variants. The compiled tree with these edits alone is copied, so that ninja compiles only
            the files again that `edits` change.

    Raises:
        ValueError: An edit does not fit the source.
        RuntimeError: The compiler failed; the message has its output.
    """
    sources = sorted(path for path in (ROOT / "csrc").rglob("*") if path.is_file())
    compiler = [os.environ.get(name) for name in ("CXX", "CXXFLAGS", "LDFLAGS")]
    digest = hashlib.sha256(repr((tuple(base), tuple(edits), compiler)).encode())
    for path in (*sources, ROOT / "setup.py"):
        digest.update(path.read_bytes())
    tree = BUILT / digest.hexdigest()[:16]
    module = tree / "fused_tricks" / f"_extension{importlib.machinery.EXTENSION_SUFFIXES[0]}"
    if module.exists():
        return module
    shutil.rmtree(tree, ignore_errors=True)
    if edits:
        shutil.copytree(build((), base).parents[1], tree, ignore=shutil.ignore_patterns("*.so"))
    else:
        for name in ("csrc", "fused_tricks"):
            shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        for name in ("README.md", "LICENSE", "pyproject.toml", "setup.py"):
            shutil.copy2(ROOT / name, tree / name)
    for edit in edits or base:
        edit.apply(tree / "csrc")
    environment = {**os.environ, "FUSED_TRICKS_CUDA": "0", "FUSED_TRICKS_REQUIRE_EXTENSION": "1"}
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        changed = ", ".join(edit.new for edit in edits) or "no edit"
        raise RuntimeError(f"the extension with {changed} cannot be built:\n{done.stdout}{done.stderr}")
    return module


def load(path: Path, without: Sequence[str] = ()) -> ModuleType:
    """Returns the extension at a path, connected to torch, as a module of its own.

    Args:
        path: The extension.
        without: Functions of torch that the extension does not receive.
    """
    if without:
        # Another path, as a module of the same path would share torch's functions.
        path = Path(shutil.copy2(path, path.parent / f"fewer{len(without)}{path.name}"))
    module = _module(path)
    found = extension._stable_functions()
    kept = {name: address for name, address in found.items() if name not in without}
    with mock.patch.object(extension, "_stable_functions", lambda: kept):
        extension.connect(module)
    return module


@functools.cache
def _module(path: Path) -> ModuleType:
    # A full name of its own: pybind11 returns the former module of the same name.
    spec = importlib.util.spec_from_file_location(f"variant{hash(path)}._extension", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
