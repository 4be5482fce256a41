"""Machine code before and after a change: every CUDA kernel of a commit and of the working tree, for each architecture.

`make sass-diff BASE=HEAD~1` builds both and shows the kernels that differ: instructions, registers, bytes in flight,
and the changed lines. It requires nvcc and `cuobjdump`, and no GPU. The build of a commit stays in build/sass_diff.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.lib.report import table
from benchmarks.resources.comparison import Line, changed_operations, compare, hunks
from benchmarks.resources.in_flight import in_flight
from benchmarks.resources.sass import Kernel, cuobjdump, kernels
from fused_tricks.cuda_toolkit import find_toolkit

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "build" / "sass_diff"
# The files that decide about the machine code: commits with the same files share a build.
SOURCES = ("csrc", "setup.py", "fused_tricks/cuda_toolkit.py")
_ARGUMENT = re.compile(r"c\[0x0\]\[[^\]]*\]")
SHOWN_LINES = 100
SHOWN_OPERATIONS = 4


class Change(NamedTuple):
    """A kernel that differs, and other kernels of the architecture with the same changed lines.

    Attributes:
        architecture: Such as `sm_90`.
        names: The kernels.
        old: The first of the kernels before; None for a new kernel.
        new: The same kernel after; None for a removed kernel.
        lines: The lines of both, aligned.
    """

    architecture: str
    names: tuple[str, ...]
    old: Kernel | None
    new: Kernel | None
    lines: Sequence[Line]

    def row(self) -> list[str]:
        """Returns the row of the summary."""
        before, after = (kernel.code if kernel else () for kernel in (self.old, self.new))
        operations = [f"{opcode} {more:+d}" for opcode, more in changed_operations(before, after).items()]
        if len(operations) > SHOWN_OPERATIONS:
            operations[SHOWN_OPERATIONS:] = ["…"]
        removed = sum(line.new is None for line in self.lines)
        added = sum(line.old is None for line in self.lines)
        return [
            self.architecture,
            ", ".join(self.names),
            f"-{removed} +{added}",
            self._before_after(lambda kernel: len(kernel.code)),
            self._before_after(lambda kernel: kernel.registers),
            self._before_after(lambda kernel: kernel.stack),
            self._before_after(lambda kernel: in_flight(kernel) or "–"),
            ", ".join(operations) or "–",
        ]

    def _before_after(self, value: Callable[[Kernel], object]) -> str:
        before, after = (str(value(kernel)) if kernel else "none" for kernel in (self.old, self.new))
        return before if before == after else f"{before} → {after}"

    def text(self) -> list[str]:
        """Returns the changed lines, with addresses of the kernel after the change; of a removed line, before."""
        shown = [f"{self.architecture} {', '.join(self.names)}"]
        for hunk in hunks(self.lines):
            shown += ["@@", *map(str, hunk)]
        return shown


def changes(old: Sequence[Kernel], new: Sequence[Kernel]) -> list[Change]:
    """Returns the kernels that differ."""
    before, after = ({(kernel.architecture, kernel.name): kernel for kernel in each} for each in (old, new))
    found: dict[tuple[str, ...], Change] = {}
    for key in dict.fromkeys([*before, *after]):
        first, second = before.get(key), after.get(key)
        if first == second:
            continue
        architecture, name = key
        lines = compare(*(kernel.code if kernel else () for kernel in (first, second)))
        change = Change(architecture, (name,), first, second, lines)
        # Kernels of several sizes of the argument differ in its addresses only.
        lines_of_all = (_ARGUMENT.sub("c[]", line[6:]) for line in change.text()[1:])
        same = (architecture, *change.row()[2:], *lines_of_all)
        earlier = found.get(same)
        found[same] = earlier._replace(names=(*earlier.names, name)) if earlier else change
    return list(found.values())


def summary(found: Sequence[Change], count: int) -> str:
    """Returns the number of unchanged kernels among `count`, and the table of the changed ones."""
    unchanged = f"Unchanged kernels: {count - sum(len(change.names) for change in found)} of {count}"
    if not found:
        return unchanged
    header = [
        "architecture",
        "kernel",
        "lines",
        "instructions",
        "registers",
        "spill bytes",
        "KiB in flight an SM",
    ]
    rows = [change.row() for change in found]
    return f"{unchanged}\n\n{table([*header, 'operations'], rows)}"


def resolve(base: str) -> str:
    """Returns the last commit up to `base` that changed a file that decides about the machine code."""
    try:
        commit = _git("rev-parse", "--verify", "--quiet", "--end-of-options", f"{base}^{{commit}}")
    except subprocess.CalledProcessError:
        raise SystemExit(
            f"BASE must be a commit, a branch or a tag of this repository, got {base!r}"
        ) from None
    return _git("log", "-1", "--format=%H", commit, "--", *SOURCES) or commit


def checkout(commit: str) -> Path:
    """Returns a folder with the files of a commit, from an earlier call if there was one."""
    folder = FOLDER / commit[:12]
    if not folder.exists():
        FOLDER.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=FOLDER) as scratch:
            archive = Path(scratch, "files.tar")
            _git("archive", f"--output={archive}", commit)
            shutil.unpack_archive(archive, Path(scratch, "files"))
            Path(scratch, "files").rename(folder)
    return folder


def build(folder: Path) -> Path:
    """Builds the extension in a folder, where only changed files are compiled, and returns the module."""
    print(f"Building {folder}; a first build takes minutes.", file=sys.stderr, flush=True)
    result = subprocess.run(
        [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"],
        cwd=folder,
        env={**os.environ, "FUSED_TRICKS_CUDA": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    modules = [*folder.glob("fused_tricks/_extension*.so")]
    if result.returncode != 0 or not modules:
        raise SystemExit(f"{result.stdout[-4000:].rstrip()}\nthe build of {folder} failed")
    return modules[0]


def main(arguments: Sequence[str]) -> None:
    """Builds both, prints the summary and the changed lines of one architecture, and writes all changed lines."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.resources.sass_diff", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("base", help="the commit to compare with")
    options = parser.parse_args(arguments)
    commit = resolve(options.base)
    search, tool = find_toolkit(), cuobjdump()
    if search.toolkit is None:
        raise SystemExit(f"requires nvcc; {'; '.join(map(str, search.rejections))}")
    if tool is None:
        raise SystemExit("requires cuobjdump, which is part of the CUDA toolkit and of the package triton")
    old, new = (kernels(tool, build(folder)) for folder in (checkout(commit), ROOT))

    found = changes(old, new)
    print(summary(found, len({(kernel.architecture, kernel.name) for kernel in [*old, *new]})))
    for path in write(found):
        print(f"{path} has the changed lines", file=sys.stderr)
    if found:
        architectures = [change.architecture for change in found]
        shown = "sm_90" if "sm_90" in architectures else architectures[-1]
        text = [line for change in found if change.architecture == shown for line in ["", *change.text()]]
        print("\n".join(text[:SHOWN_LINES]))
        if len(text) > SHOWN_LINES:
            print(f"… and {len(text) - SHOWN_LINES} more lines in {FOLDER / shown}.diff")


def write(found: Sequence[Change]) -> Iterator[Path]:
    """Writes a file for each architecture with changes, removes the files of an earlier call, and yields the paths."""
    for path in FOLDER.glob("*.diff"):
        path.unlink()
    for architecture in dict.fromkeys(change.architecture for change in found):
        path = FOLDER / f"{architecture}.diff"
        text = [line for change in found if change.architecture == architecture for line in change.text()]
        path.write_text("\n".join(text) + "\n")
        yield path


def _git(*command: str) -> str:
    result = subprocess.run(["git", *command], cwd=ROOT, check=True, capture_output=True, text=True)
    return result.stdout.strip()


if __name__ == "__main__":
    main(sys.argv[1:])
