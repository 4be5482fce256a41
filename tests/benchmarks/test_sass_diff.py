"""`make sass-diff`, without nvcc: the commands of the build are those of a repository made for the test."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

pytest.importorskip("torchvision", reason="the benchmarks import torchvision")

from benchmarks.resources import sass_diff
from fused_tricks.cuda_toolkit import Rejection, ToolkitSearch
from support.machine_code import kernel

pytestmark = pytest.mark.slow

# Its "module" is a listing: a copy of the source.
SETUP = """
import os, pathlib, shutil, sys
assert os.environ["FUSED_TRICKS_CUDA"] == "1"
if "broken" in pathlib.Path("csrc/cuda/launch.cu").read_text():
    sys.exit("launch.cu(7): error: broken")
with open("builds", "a") as file:
    file.write("built\\n")
shutil.copy("csrc/cuda/launch.cu", "fused_tricks/_extension.so")
"""
LOOP = "begin:\nLDG.E.128 R4, [R2.64]\nFADD R0, R4, R0\n@P0 BRA begin\nEXIT"


def git(folder: Path, *command: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    result = subprocess.run(
        ["git", *identity, *command], cwd=folder, check=True, capture_output=True, text=True
    )
    return result.stdout.strip()


def commit(folder: Path, path: str, text: str) -> str:
    """Writes a file, commits everything, and returns the commit."""
    (folder / path).parent.mkdir(parents=True, exist_ok=True)
    (folder / path).write_text(text)
    git(folder, "add", "--all")
    git(folder, "commit", "--message", path)
    return git(folder, "rev-parse", "HEAD")


@pytest.fixture
def repository(tmp_path, monkeypatch) -> Path:
    """Returns a repository of one kernel. `sass_diff` works on it, and reads the listing as the machine code."""
    git(tmp_path, "init", "--quiet")
    commit(tmp_path, ".gitignore", "build/\n*.so\nbuilds\n")
    commit(tmp_path, "fused_tricks/__init__.py", "")
    commit(tmp_path, "setup.py", SETUP)
    commit(tmp_path, "csrc/cuda/launch.cu", LOOP)
    monkeypatch.setattr(sass_diff, "ROOT", tmp_path)
    monkeypatch.setattr(sass_diff, "FOLDER", tmp_path / "build" / "sass_diff")
    monkeypatch.setattr(sass_diff, "kernels", lambda tool, module: [kernel(module.read_text())])
    monkeypatch.setattr(sass_diff, "cuobjdump", lambda: "cuobjdump")
    toolkit = ToolkitSearch(object(), "", ())  # type: ignore[arg-type]
    monkeypatch.setattr(sass_diff, "find_toolkit", lambda: toolkit)
    return tmp_path


def test_an_unchanged_working_tree_has_no_changed_kernel(repository, capsys) -> None:
    sass_diff.main(["HEAD"])
    assert capsys.readouterr().out == "Unchanged kernels: 1 of 1\n"


def test_a_change_that_is_not_committed_is_shown_and_written(repository, capsys) -> None:
    (repository / "csrc/cuda/launch.cu").write_text(LOOP.replace("FADD", "FMUL R0, R4, R4\nFADD"))
    sass_diff.main(["HEAD"])
    out = capsys.readouterr().out
    assert out.startswith("Unchanged kernels: 0 of 1\n")
    assert "| sm_90 | scan 256 | -0 +1 | 4 → 5 | 40 | 0 | 24 | FMUL +1 |" in out
    written = (repository / "build/sass_diff/sm_90.diff").read_text()
    assert "\n+00010       FMUL R0, R4, R4\n" in written
    assert written in out


def test_the_files_of_an_earlier_call_are_removed(repository) -> None:
    path = repository / "build/sass_diff/sm_90.diff"
    (repository / "csrc/cuda/launch.cu").write_text(LOOP.replace("FADD", "FMUL"))
    sass_diff.main(["HEAD"])
    assert path.exists()
    (repository / "csrc/cuda/launch.cu").write_text(LOOP)
    sass_diff.main(["HEAD"])
    assert not path.exists()


def test_a_base_is_the_commit_before_a_change(repository, capsys) -> None:
    commit(repository, "csrc/cuda/launch.cu", LOOP.replace("LDG.E.128", "LDG.E.64"))
    sass_diff.main(["HEAD~1"])
    assert "LDG.E.128 -1, LDG.E.64 +1" in capsys.readouterr().out


def test_commits_with_the_same_kernels_share_a_build(repository) -> None:
    first = git(repository, "rev-parse", "HEAD")
    commit(repository, "README.md", "another page")
    assert sass_diff.resolve("HEAD") == first
    changed = commit(repository, "csrc/core/group.h", "// another line")
    assert sass_diff.resolve("HEAD") == changed


def test_the_build_of_a_base_stays_for_later_calls(repository) -> None:
    base = sass_diff.checkout(sass_diff.resolve("HEAD"))
    assert (base / "csrc/cuda/launch.cu").read_text() == LOOP
    (base / "built").write_text("")
    assert (sass_diff.checkout(sass_diff.resolve("HEAD")) / "built").exists()


@pytest.mark.parametrize("base", ["no-such-branch", "", "--all", "HEAD:setup.py"])
def test_a_base_that_is_not_a_commit_is_refused(repository, base: str) -> None:
    with pytest.raises(SystemExit, match=f"BASE must be a commit.* got '{base}'"):
        sass_diff.main(["--", base])


def test_without_nvcc_the_searched_places_are_named(repository, monkeypatch) -> None:
    search = ToolkitSearch(None, "", (Rejection("nvcc on PATH", "there is none"),))
    monkeypatch.setattr(sass_diff, "find_toolkit", lambda: search)
    with pytest.raises(SystemExit, match="requires nvcc; nvcc on PATH: there is none"):
        sass_diff.main(["HEAD"])


def test_without_cuobjdump_its_packages_are_named(repository, monkeypatch) -> None:
    monkeypatch.setattr(sass_diff, "cuobjdump", lambda: None)
    with pytest.raises(SystemExit, match="requires cuobjdump"):
        sass_diff.main(["HEAD"])


def test_a_build_that_fails_shows_the_output_of_the_compiler_and_uses_no_earlier_build(repository) -> None:
    sass_diff.main(["HEAD"])
    (repository / "csrc/cuda/launch.cu").write_text("broken")
    with pytest.raises(SystemExit, match=r"launch\.cu\(7\): error: broken\nthe build of .* failed"):
        sass_diff.main(["HEAD"])


def test_kernels_with_the_same_changes_share_a_row() -> None:
    sizes = {"scan 256": "0x210", "scan 1024": "0x2b0"}
    old = [kernel(f"{LOOP}\nLDC R1, c[0x0][{at}]", name=name) for name, at in sizes.items()]
    new = [kernel(f"{LOOP}\nNOP\nLDC R1, c[0x0][{at}]", name=name) for name, at in sizes.items()]
    (change,) = sass_diff.changes(old, new)
    assert change.names == ("scan 256", "scan 1024")


def test_kernels_with_other_changes_have_their_own_rows() -> None:
    old = [kernel(LOOP, name=name) for name in ("scan 256", "update 256")]
    new = [
        kernel(f"{LOOP}\n{more}", name=name) for name, more in (("scan 256", "NOP"), ("update 256", "RET"))
    ]
    assert [change.names for change in sass_diff.changes(old, new)] == [("scan 256",), ("update 256",)]


def test_a_new_and_a_removed_kernel_are_changes() -> None:
    found = sass_diff.changes([kernel(LOOP, name="old")], [kernel(LOOP, name="new")])
    assert [(change.names, change.row()[3]) for change in found] == [
        (("old",), "4 → none"),
        (("new",), "none → 4"),
    ]


def test_a_kernel_that_differs_in_its_registers_only_is_a_change() -> None:
    (change,) = sass_diff.changes([kernel(LOOP)], [kernel(LOOP, registers=64)])
    assert change.row()[4] == "40 → 64"
    assert change.row()[6] == "24 → 16"
