"""The search for a CUDA toolkit, among fake ones."""

from __future__ import annotations

import platform
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from fused_tricks import cuda_toolkit
from fused_tricks.cuda_toolkit import (
    CudaToolkit,
    ToolkitSearch,
    architecture_flags,
    choose_architectures,
    find_toolkit,
    known_architectures,
)

pytestmark = pytest.mark.slow

KNOWN = ("7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0")


@pytest.fixture
def machine(tmp_path):
    """Returns a machine without a toolkit."""
    return Machine(tmp_path)


class Machine:
    """The folders that a search reads."""

    def __init__(self, root: Path) -> None:
        self.local = root / "local"
        self.bin = root / "bin"
        self.site_packages = root / "site-packages"
        for folder in (self.local, self.bin, self.site_packages):
            folder.mkdir()

    def search(self, **variables: object) -> ToolkitSearch:
        environ = {"PATH": f"{self.bin}:/usr/bin:/bin"} | {
            name: str(value) for name, value in variables.items()
        }
        return find_toolkit(environ, local=self.local, site_packages=[self.site_packages])

    def reasons(self, **variables: object) -> dict[str, str]:
        return {rejection.place: rejection.reason for rejection in self.search(**variables).rejections}


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def toolkit(home: Path, release: str = "13.0", libraries: str = "lib64") -> Path:
    """Makes a folder with the files of a toolkit, and an nvcc with the outputs that the search reads."""
    script(
        home / "bin/nvcc",
        f"""case "$1" in
--version) echo "Cuda compilation tools, release {release}, V{release}.88" ;;
--list-gpu-arch) printf 'compute_75\\ncompute_90\\ncompute_100\\n' ;;
--dryrun) echo '#$ _HERE_={home}/bin' >&2; echo '#$ TOP={home}/bin/..' >&2 ;;
esac""",
    )
    for file in (home / "include/cuda_runtime.h", home / libraries / "libcudart_static.a"):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    return home


def test_where_there_is_none_every_place_gives_its_reason(machine):
    search = machine.search()
    assert search.toolkit is None
    assert [str(rejection) for rejection in search.rejections] == [
        "nvcc on PATH: there is none",
        f"{machine.local}/cuda and {machine.local}/cuda-*: there is none",
        "pip's packages: nvidia-cuda-nvcc is not installed",
    ]


def test_cuda_home_comes_before_all_others(machine, tmp_path):
    toolkit(machine.local / "cuda")
    chosen = toolkit(tmp_path / "chosen", "12.8")
    search = machine.search(CUDA_HOME=chosen)
    assert search.toolkit == CudaToolkit(
        home=chosen,
        nvcc=chosen / "bin/nvcc",
        include_dirs=(chosen / "include",),
        library_dirs=(chosen / "lib64",),
        version="12.8",
    )
    assert search.place == f"CUDA_HOME={chosen}"
    assert search.rejections == ()


def test_cuda_path_is_read_where_cuda_home_is_not_set(machine, tmp_path):
    chosen = toolkit(tmp_path / "chosen")
    assert machine.search(CUDA_PATH=chosen, CUDA_HOME="").place == f"CUDA_PATH={chosen}"


def test_an_unusable_cuda_home_is_reported_and_the_next_place_is_taken(machine, tmp_path):
    home = toolkit(machine.local / "cuda")
    search = machine.search(CUDA_HOME=tmp_path / "gone")
    assert search.toolkit is not None and search.toolkit.home == home
    assert str(search.rejections[0]) == f"CUDA_HOME={tmp_path / 'gone'}: no such folder"


@pytest.mark.parametrize(
    ("missing", "reason"),
    [
        ("bin/nvcc", "it has no bin/nvcc"),
        ("include/cuda_runtime.h", "it has no include/cuda_runtime.h"),
        ("lib64/libcudart_static.a", "it has no libcudart_static.a"),
    ],
)
def test_a_folder_without_all_of_a_toolkit_is_passed_over(machine, missing, reason):
    home = toolkit(machine.local / "cuda")
    (home / missing).unlink()
    assert machine.search().toolkit is None
    assert machine.reasons()[str(home)] == reason


def test_a_compiler_that_does_not_run_is_passed_over_with_its_words(machine):
    home = toolkit(machine.local / "cuda")
    script(home / "bin/nvcc", "echo 'wrong machine'; exit 1")
    assert machine.reasons()[str(home)] == "its bin/nvcc does not print its version (wrong machine)"


def test_a_compiler_that_is_no_program_is_passed_over(machine):
    home = toolkit(machine.local / "cuda")
    (home / "bin/nvcc").chmod(0o644)
    assert "Permission denied" in machine.reasons()[str(home)]


def test_behind_a_script_on_path_lies_the_toolkit_that_it_calls(machine, tmp_path):
    home = toolkit(tmp_path / "elsewhere")
    wrapper = script(machine.bin / "nvcc", f'exec {home}/bin/nvcc "$@"')
    search = machine.search()
    assert search.toolkit is not None and search.toolkit.home == home
    assert search.place == f"nvcc on PATH ({wrapper}, part of {home})"


def test_behind_a_link_on_path_lies_the_toolkit_that_it_points_to(machine, tmp_path):
    home = toolkit(tmp_path / "elsewhere")
    script(home / "bin/nvcc", 'test "$1" = --version && echo release 13.0')
    (machine.bin / "nvcc").symlink_to(home / "bin/nvcc")
    search = machine.search()
    assert search.toolkit is not None and search.toolkit.home == home


def test_an_nvcc_on_path_without_a_toolkit_is_reported(machine):
    script(machine.bin / "nvcc", "exit 1")
    assert machine.reasons()[f"nvcc on PATH ({machine.bin}/nvcc, part of {machine.bin.parent})"] == (
        "it has no include/cuda_runtime.h"
    )


def test_of_the_versions_in_usr_local_the_newest_is_taken(machine):
    for release in ("9.2", "12.4", "13.0"):
        toolkit(machine.local / f"cuda-{release}", release)
    search = machine.search()
    assert search.toolkit is not None and search.toolkit.version == "13.0"


def test_a_toolkit_that_two_places_name_is_looked_at_once(machine):
    home = toolkit(machine.local / "cuda-13.0")
    (home / "include/cuda_runtime.h").unlink()
    (machine.local / "cuda").symlink_to(home)
    rejected = [rejection.place for rejection in machine.search(CUDA_HOME=home).rejections]
    assert rejected == [f"CUDA_HOME={home}", "nvcc on PATH", "pip's packages"]


def test_pip_packages_make_a_toolkit(machine):
    home = toolkit(machine.site_packages / "nvidia/cu13", libraries="lib")
    search = machine.search()
    assert search.toolkit is not None
    assert search.toolkit.home == home
    assert search.toolkit.library_dirs == (home / "lib",)


def test_pip_packages_of_torch_lack_the_compiler_and_the_reason_says_what_adds_it(machine):
    home = toolkit(machine.site_packages / "nvidia/cu13", libraries="lib")
    (home / "bin/nvcc").unlink()
    assert (
        machine.reasons()[str(home)] == "it has no bin/nvcc (pip install 'cuda-toolkit[cccl,nvcc]' adds it)"
    )


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the folder is named after the machine")
def test_headers_and_libraries_may_lie_in_the_folder_of_the_target(machine):
    home = toolkit(machine.local / "cuda")
    target = home / "targets/x86_64-linux"
    target.mkdir(parents=True)
    (home / "include").rename(target / "include")
    (home / "lib64").rename(target / "lib")
    search = machine.search()
    assert search.toolkit is not None
    assert search.toolkit.include_dirs == (target / "include",)
    assert search.toolkit.library_dirs == (target / "lib",)


def test_the_compiler_names_the_architectures_that_it_knows(machine):
    search = machine.search(CUDA_HOME=toolkit(machine.local / "cuda"))
    assert search.toolkit is not None
    assert known_architectures(search.toolkit) == ("7.5", "9.0", "10.0")


def test_a_compiler_that_names_no_architecture_is_an_error(machine):
    search = machine.search(CUDA_HOME=toolkit(machine.local / "cuda"))
    assert search.toolkit is not None
    script(search.toolkit.nvcc, "exit 1")
    with pytest.raises(ValueError, match="names no architecture"):
        known_architectures(search.toolkit)


@pytest.mark.parametrize(
    ("known", "requested", "expected"),
    [
        (KNOWN, None, ("7.5+PTX", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0+PTX")),
        (KNOWN, " ", ("7.5+PTX", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0+PTX")),
        (("7.0", "8.0", "9.0"), None, ("8.0+PTX", "9.0+PTX")),
        (("7.0", "9.0"), None, ("9.0+PTX",)),
        (KNOWN, "8.0;9.0+PTX", ("8.0", "9.0+PTX")),
        (KNOWN, "8.0 9.0a", ("8.0", "9.0a")),
        (KNOWN, "8.0;8.0;", ("8.0",)),
    ],
)
def test_architectures_are_those_asked_for_or_all_that_are_known(known, requested, expected):
    assert choose_architectures(known, requested) == expected


@pytest.mark.parametrize(
    ("known", "requested", "message"),
    [
        (KNOWN, "Ampere", "TORCH_CUDA_ARCH_LIST has 'Ampere'; separate versions"),
        (KNOWN, "8.0;7.0", "'7.0', which this nvcc does not support"),
        (("3.5",), None, "this nvcc supports none of 7.5"),
    ],
)
def test_architectures_that_cannot_be_compiled_are_an_error(known, requested, message):
    with pytest.raises(ValueError, match=message):
        choose_architectures(known, requested)


def test_only_an_architecture_with_ptx_gets_code_for_later_gpus():
    assert architecture_flags(["8.0", "12.0+PTX"]) == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_120,code=sm_120",
        "-gencode=arch=compute_120,code=compute_120",
    ]


def test_the_module_needs_nothing_but_the_standard_library():
    # -I -S: no site-packages, no current folder.
    command = "import runpy, sys; runpy.run_path(sys.argv[1])"
    subprocess.run([sys.executable, "-I", "-S", "-c", command, cuda_toolkit.__file__], check=True)
