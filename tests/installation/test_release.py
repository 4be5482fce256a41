"""The files of a release: interpreters, linking with an older glibc, checks, versions, workflows."""

from __future__ import annotations

import ctypes
import json
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import fused_tricks
from fused_tricks.cuda_toolkit import DEFAULT_ARCHITECTURES
from release import check
from release.check import (
    build_info,
    described,
    file_problems,
    missing_files,
    package_version,
    readme_problems,
    tag_problems,
)
from release.old_glibc import OLDEST, former_versions, linker_flags
from release.pythons import MINORS, find_pythons

ROOT = Path(__file__).parents[2]
VERSION = fused_tricks.__version__
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
CUDA = {"version": "12.9", "home": "/usr/local/cuda", "architectures": [*DEFAULT_ARCHITECTURES]}
PLATFORM = f"fused_tricks-{VERSION}-cp311-cp311-manylinux_2_27_x86_64.manylinux_2_28_x86_64.whl"
PURE = f"fused_tricks-{VERSION}-py3-none-any.whl"


def wheel(folder, name, *, failure=None, cuda=CUDA, without=(), extra=()) -> Path:
    """Writes a wheel with empty files and a record of its build."""
    info = {"extension_failure": failure, "cuda": None if failure else cuda}
    names = ["fused_tricks/py.typed", "fused_tricks.dist-info/licenses/LICENSE", *extra]
    if failure is None:
        names.append("fused_tricks/_extension.cpython-311-x86_64-linux-gnu.so")
    with zipfile.ZipFile(folder / name, "w") as file:
        file.writestr("fused_tricks/_build_info.json", json.dumps(info))
        for each in names:
            if Path(each).name not in without:
                file.writestr(each, "")
    return folder / name


def problems(file: Path, cuda=None) -> list[str]:
    return list(file_problems(file, build_info(file), VERSION, cuda))


def test_wheels_and_sources_of_a_release_have_no_problems(tmp_path):
    source = tmp_path / f"fused_tricks-{VERSION}.tar.gz"
    source.touch()
    assert problems(wheel(tmp_path, PLATFORM), "12.9") == []
    assert problems(wheel(tmp_path, PURE, failure="FUSED_TRICKS_EXTENSION=0 was set"), "12.9") == []
    assert problems(source, "12.9") == []


@pytest.mark.parametrize(
    ("name", "options", "problem"),
    [
        (PLATFORM.replace(VERSION, "0.0.9"), {}, "it must have the version"),
        (PLATFORM, {"without": ["py.typed"]}, "it must contain py.typed"),
        (PLATFORM, {"without": ["LICENSE"]}, "it must contain LICENSE"),
        (PLATFORM, {"cuda": None}, "must be compiled by CUDA 12.9, got no CUDA"),
        (PLATFORM, {"cuda": {**CUDA, "version": "13.0"}}, "must be compiled by CUDA 12.9, got CUDA 13.0"),
        (PLATFORM, {"extra": ["fused_tricks.libs/libstdc++.so"]}, "one shared library, the extension"),
        (f"fused_tricks-{VERSION}-cp311-cp311-linux_x86_64.whl", {}, "its tag must be manylinux_2_28"),
        (f"fused_tricks-{VERSION}-cp311-cp311-manylinux_2_34_x86_64.whl", {}, "manylinux_2_28 or older"),
        (PLATFORM, {"failure": "no C++ compiler"}, "must have the tag py3-none-any"),
        (PURE, {}, "its tag must be manylinux_2_28 or older"),
    ],
)
def test_a_file_that_must_not_be_released_is_refused(tmp_path, name, options, problem):
    (found,) = problems(wheel(tmp_path, name, **options), "12.9")
    assert problem in found


def test_a_file_that_is_too_large_is_refused(tmp_path, monkeypatch):
    file = wheel(tmp_path, PLATFORM)
    monkeypatch.setattr(check, "LARGEST", file.stat().st_size)
    assert problems(file) == []
    monkeypatch.setattr(check, "LARGEST", file.stat().st_size - 1)
    (found,) = problems(file)
    assert "it must have at most" in found


def test_the_table_states_the_cuda_release_and_the_architectures(tmp_path):
    info = build_info(wheel(tmp_path, PLATFORM))
    assert described(info) == f"CUDA 12.9 for {' '.join(DEFAULT_ARCHITECTURES)}"


def test_a_tag_is_the_version_and_has_its_section_in_the_changelog():
    changelog = "# Changelog\n\n## [Unreleased]\n\n## [1.2.3] - 2026-01-31\n\n### Added\n"
    assert list(tag_problems("v1.2.3", "1.2.3", changelog)) == []
    (wrong_tag,) = tag_problems("v1.2.4", "1.2.3", changelog)
    assert "the tag must be v1.2.3" in wrong_tag and "got v1.2.4" in wrong_tag
    (no_section,) = tag_problems("v1.2.30", "1.2.30", changelog)
    assert "## [1.2.30] - YYYY-MM-DD" in no_section


def test_a_readme_whose_links_are_dead_on_pypi_cannot_be_released():
    text = "![a](https://a.b/c.png) [d](docs/d.md) [e](#e) [![f](f.png)](https://f)"
    assert [problem.split()[3] for problem in readme_problems(text)] == ["docs/d.md;", "f.png;"]


def test_a_release_has_a_wheel_for_every_python_the_pure_one_and_the_sources():
    wheels = [f"fused_tricks-1.0-cp3{minor}-cp3{minor}-manylinux_2_28_x86_64.whl" for minor in range(10, 15)]
    files = [*wheels, "fused_tricks-1.0-py3-none-any.whl", "fused_tricks-1.0.tar.gz"]
    assert list(missing_files(files)) == []
    for file in files:
        (missing,) = missing_files([name for name in files if name != file])
        assert missing.endswith("is missing")


def test_the_version_stands_in_one_place():
    assert package_version() == VERSION
    tomllib = pytest.importorskip("tomllib", reason="tomllib came with Python 3.11")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert "version" not in project and "version" in project["dynamic"]
    assert not re.search(r"^version:", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)


def test_classifiers_and_containers_are_for_the_same_pythons_as_the_wheels():
    text = (ROOT / "pyproject.toml").read_text()
    assert re.findall(r"Python :: 3\.(\d+)", text) == [str(minor) for minor in MINORS]
    assert re.findall(r'"cp3(\d+)-\*"', text) == [str(minor) for minor in MINORS]
    assert f'requires-python = ">=3.{MINORS[0]}"' in text


def test_interpreters_are_found_by_name_and_among_pyenvs(tmp_path, monkeypatch):
    if sys.version_info[1] not in MINORS:
        pytest.skip("this Python gets no wheel")
    tag = f"cp3{sys.version_info[1]}"
    assert [python.tag for python in find_pythons([sys.executable])] == [tag]
    monkeypatch.setenv("PATH", "/nonexistent")
    installed = tmp_path / ".pyenv" / "versions" / f"3.{sys.version_info[1]}.99" / "bin" / "python"
    installed.parent.mkdir(parents=True)
    installed.symlink_to(sys.executable)
    assert find_pythons(home=tmp_path) == [(str(installed), tag)]
    assert find_pythons([f"python3.{sys.version_info[1]}"], tmp_path) == [(str(installed), tag)]


def test_a_name_that_is_not_a_supported_interpreter_is_refused(tmp_path):
    old = tmp_path / "python3.9"
    old.write_text("#!/bin/sh\necho cpython False 3 9\n")
    old.chmod(0o755)
    for name in (str(old), "/nonexistent/python"):
        with pytest.raises(SystemExit, match=f"{name} is not a CPython from 3.10"):
            find_pythons([name])


def test_without_an_interpreter_the_error_says_how_to_name_one(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(SystemExit, match="PYTHONS="):
        find_pythons(home=tmp_path)


def test_moved_functions_get_the_newest_version_that_is_old_enough():
    symbols = (
        "0001 T pthread_create@@GLIBC_2.34\n0001 T pthread_create@GLIBC_2.2.5\n"
        "0002 T dlvsym@GLIBC_2.2.5\n0002 T dlvsym@GLIBC_2.4\n0002 T dlvsym@@GLIBC_2.34\n"
        "0003 T memcpy@@GLIBC_2.14\n0003 T memcpy@GLIBC_2.2.5\n0004 T arc4random@@GLIBC_2.36\n"
    )
    assert former_versions(symbols) == {"dlvsym": "GLIBC_2.4", "pthread_create": "GLIBC_2.2.5"}


LIBRARY = """
#include <dlfcn.h>
#include <memory>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>
extern "C" int run(int count) {
    auto sum = std::make_shared<int>(0);
    std::thread([sum, count] { for (int each : std::vector<int>(count, 2)) *sum += each; }).join();
    try { throw std::runtime_error(std::to_string(*sum)); }
    catch (std::exception const& error) { return dlsym(RTLD_DEFAULT, "no_such") ? 0 : std::stoi(error.what()); }
}
"""


def has_static_libstdcxx() -> bool:
    if sys.platform != "linux" or shutil.which("g++") is None:
        return False
    command = ["g++", "-print-file-name=libstdc++.a"]
    return Path(
        subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    ).is_absolute()


@pytest.mark.skipif(not has_static_libstdcxx(), reason="needs g++ and libstdc++.a on Linux")
def test_a_library_linked_with_the_flags_runs_and_requires_an_old_glibc(tmp_path):
    source, library = tmp_path / "library.cpp", tmp_path / "library.so"
    source.write_text(LIBRARY)
    command = ["g++", "-std=c++17", "-shared", "-fPIC", str(source), "-o", str(library), "-pthread"]
    subprocess.run([*command, *linker_flags(tmp_path / "stand_ins")], check=True)
    symbols = subprocess.run(["nm", "-D", str(library)], check=True, capture_output=True, text=True).stdout
    versions = {tuple(map(int, each.split("."))) for each in re.findall(r"@GLIBC_([\d.]+)", symbols)}
    assert versions and max(versions) <= OLDEST
    assert "GLIBCXX" not in symbols
    assert ctypes.CDLL(str(library)).run(21) == 42


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_the_steps_of_a_workflow_are_targets_of_the_makefile(workflow):
    text = workflow.read_text()
    phony = re.search(r"^\.PHONY: ((?:.*\\\n)*.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert phony is not None
    targets = phony[1].replace("\\\n", " ").split()
    for step in re.findall(r"^\s*(?:- )?run: (.*)$", text, re.MULTILINE):
        words = step.split()
        assert words[0] == "make", f"{workflow.name} has a step that nobody can run elsewhere: {step}"
        chosen = re.findall(r"command: \[(.*)\]", text) if "matrix.command" in step else [" ".join(words[1:])]
        for command in ", ".join(chosen).split(", "):
            assert command.split()[0] in targets, f"{workflow.name} runs make {command}"


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_may_read_only_unless_a_job_states_more(workflow):
    assert "\npermissions:\n  contents: read\n\n" in workflow.read_text()


def test_there_are_workflows():
    assert {path.stem for path in WORKFLOWS} >= {"docs", "lint", "release", "test", "wheels"}
