"""The search for a CUDA toolkit that can compile, with a reason for every place that is passed over.

This file uses the standard library only: `setup.py` loads it by its path, in an environment without torch.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import site
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

# Turing to Blackwell, as in PyTorch's wheels for CUDA 13. Later GPUs run the PTX of the last architecture. GPUs of a
# major version without code, such as 11.0, run the PTX of the first.
DEFAULT_ARCHITECTURES = ("7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0")

_TARGETS = {"x86_64": ("x86_64-linux",), "aarch64": ("sbsa-linux", "aarch64-linux")}


@dataclass(frozen=True)
class CudaToolkit:
    """A toolkit with a working compiler, the headers of the runtime and its static library.

    Attributes:
        home: The folder that holds `bin/nvcc`.
        nvcc: The compiler.
        include_dirs: The folders with headers, among them `cuda_runtime.h`.
        library_dirs: The folders with libraries, among them `libcudart_static.a`.
        version: Major and minor version, such as `"13.0"`.
    """

    home: Path
    nvcc: Path
    include_dirs: tuple[Path, ...]
    library_dirs: tuple[Path, ...]
    version: str


@dataclass(frozen=True)
class Rejection:
    """A place that was searched, and the reason why it has no usable toolkit."""

    place: str
    reason: str

    def __str__(self) -> str:
        return f"{self.place}: {self.reason}"


@dataclass(frozen=True)
class ToolkitSearch:
    """The result of a search.

    Attributes:
        toolkit: The first usable toolkit, or None.
        place: The place of the toolkit, such as `"CUDA_HOME=/usr/local/cuda"`; empty without a toolkit.
        rejections: The places that were searched before, in order.
    """

    toolkit: CudaToolkit | None
    place: str
    rejections: tuple[Rejection, ...]


def find_toolkit(
    environ: Mapping[str, str] | None = None,
    *,
    local: Path = Path("/usr/local"),
    site_packages: Sequence[Path] | None = None,
) -> ToolkitSearch:
    """Searches for a toolkit: `CUDA_HOME`, `CUDA_PATH`, `nvcc` on `PATH`, /usr/local, pip's packages.

    A place is usable by its content. An incomplete place is passed over, with a reason.

    Args:
        environ: The environment variables; by default the process's.
        local: The folder with `cuda` and `cuda-*`.
        site_packages: The folders of pip's packages; by default this interpreter's.
    """
    environ = os.environ if environ is None else environ
    site_packages = _site_packages() if site_packages is None else site_packages
    rejections: list[Rejection] = []
    seen: set[Path] = set()
    for place, home in _places(environ, local, site_packages):
        if isinstance(home, str):
            rejections.append(Rejection(place, home))
            continue
        if home.resolve() in seen:
            continue
        seen.add(home.resolve())
        found = _inspect(home)
        if isinstance(found, CudaToolkit):
            return ToolkitSearch(found, place, tuple(rejections))
        rejections.append(Rejection(place, found))
    return ToolkitSearch(None, "", tuple(rejections))


def choose_architectures(known: Iterable[str], requested: str | None = None) -> tuple[str, ...]:
    """Returns the GPU architectures to compile for.

    Args:
        known: The architectures that the compiler knows, from `known_architectures`.
        requested: The value of `TORCH_CUDA_ARCH_LIST`: versions separated by semicolons or spaces, with `+PTX` for
            later GPUs, such as `"8.0;9.0+PTX"`. Without a value: the known ones of `DEFAULT_ARCHITECTURES`, the first
            and the last with `+PTX`.

    Raises:
        ValueError: An entry is malformed, or the compiler does not know the architecture.
    """
    known = set(known)
    entries = re.split(r"[;\s]+", requested.strip(" ;")) if requested and requested.strip(" ;") else []
    for entry in entries:
        match = re.fullmatch(r"(\d+\.\d)[af]?(\+PTX)?", entry)
        if match is None:
            raise ValueError(
                f"TORCH_CUDA_ARCH_LIST has {entry!r}; separate versions by semicolons, such as '8.0;9.0+PTX'"
            )
        if match[1] not in known:
            raise ValueError(f"TORCH_CUDA_ARCH_LIST has {entry!r}, which this nvcc does not support")
    if not entries:
        entries = [version for version in DEFAULT_ARCHITECTURES if version in known]
        if not entries:
            raise ValueError(f"this nvcc supports none of {', '.join(DEFAULT_ARCHITECTURES)}")
        entries = [entry + "+PTX" * (entry in (entries[0], entries[-1])) for entry in entries]
    return tuple(dict.fromkeys(entries))


def known_architectures(toolkit: CudaToolkit) -> tuple[str, ...]:
    """Returns the architectures that the toolkit's compiler supports, such as `("7.5", "8.0")`.

    Raises:
        ValueError: The compiler does not list them.
    """
    _, output = _run([str(toolkit.nvcc), "--list-gpu-arch"])
    numbers = re.findall(r"^compute_(\d+)(\d)$", output, re.MULTILINE)
    if not numbers:
        raise ValueError(f"{toolkit.nvcc} --list-gpu-arch names no architecture")
    return tuple(f"{major}.{minor}" for major, minor in numbers)


def architecture_flags(architectures: Iterable[str]) -> list[str]:
    """Returns the flags of nvcc for architectures in the form of `choose_architectures`."""
    flags = []
    for architecture in architectures:
        version, _, ptx = architecture.partition("+")
        number = version.replace(".", "")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if ptx:
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def _places(
    environ: Mapping[str, str], local: Path, site_packages: Sequence[Path]
) -> Iterator[tuple[str, Path | str]]:
    """Yields each place with its folder, or with the reason why it has none."""
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if environ.get(variable):
            yield f"{variable}={environ[variable]}", Path(environ[variable])

    nvcc = shutil.which("nvcc", path=environ.get("PATH", ""))
    if nvcc is None:
        yield "nvcc on PATH", "there is none"
    else:
        home = _home_behind(Path(nvcc), environ)
        yield f"nvcc on PATH ({nvcc}, part of {home})", home

    installed = [local / "cuda", *sorted(local.glob("cuda-*"), key=_version_in_name, reverse=True)]
    present = [home for home in installed if home.exists()]
    for home in present:
        yield str(home), home
    if not present:
        yield f"{local}/cuda and {local}/cuda-*", "there is none"

    packaged = sorted(
        home
        for folder in site_packages
        for home in folder.glob("nvidia/*")
        if (home / "bin/nvcc").exists() or (home / "include/cuda_runtime.h").exists()
    )
    for home in packaged:
        yield str(home), home
    if not packaged:
        yield "pip's packages", "nvidia-cuda-nvcc is not installed"


def _inspect(home: Path) -> CudaToolkit | str:
    """Returns the toolkit in a folder, or the reason why the folder is unusable."""
    if not home.is_dir():
        return "no such folder"
    nvcc = home / "bin/nvcc"
    if not nvcc.is_file():
        # torch depends on cuda-toolkit in its own CUDA version; the extras add the compiler of that version.
        return "it has no bin/nvcc" + (
            " (pip install 'cuda-toolkit[cccl,nvcc]' adds it)" if home.parent.name == "nvidia" else ""
        )
    targets = [home / "targets" / name for name in _TARGETS.get(platform.machine(), ())]
    include_dirs = _holding([home / "include", *(target / "include" for target in targets)])
    if not any((folder / "cuda_runtime.h").is_file() for folder in include_dirs):
        return "it has no include/cuda_runtime.h"
    library_dirs = _holding([home / "lib64", home / "lib", *(target / "lib" for target in targets)])
    if not any((folder / "libcudart_static.a").is_file() for folder in library_dirs):
        return "it has no libcudart_static.a"
    runs, output = _run([str(nvcc), "--version"])
    release = re.search(r"release (\d+\.\d+)", output)
    if not runs or release is None:
        return f"its bin/nvcc does not print its version ({output.strip() or 'no output'})"
    return CudaToolkit(home, nvcc, include_dirs, library_dirs, release[1])


def _home_behind(nvcc: Path, environ: Mapping[str, str]) -> Path:
    """Returns the toolkit of an `nvcc`, which may be a link or a script that calls another `nvcc`."""
    _, output = _run([str(nvcc), "--dryrun", "-c", "-x", "cu", os.devnull, "-o", os.devnull], environ)
    top = re.search(r"^#\$ TOP=(.+)$", output, re.MULTILINE)
    return Path(top[1].strip()).resolve() if top else nvcc.resolve().parent.parent


def _run(command: list[str], environ: Mapping[str, str] | None = None) -> tuple[bool, str]:
    """Returns whether a command succeeds, and its output or the reason why it does not run."""
    try:
        result = subprocess.run(
            command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=60
        )
    except (OSError, subprocess.SubprocessError) as error:
        return False, str(error)
    return result.returncode == 0, result.stdout


def _holding(folders: Iterable[Path]) -> tuple[Path, ...]:
    """Returns the folders that exist, each once."""
    return tuple({folder.resolve(): folder for folder in folders if folder.is_dir()}.values())


def _version_in_name(home: Path) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", home.name))


def _site_packages() -> list[Path]:
    # Under build isolation `sys.path` has the build's packages only; the environment's are added.
    folders = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *site.getsitepackages()]
    folders += [site.getusersitepackages(), *(entry for entry in sys.path if entry.endswith("-packages"))]
    return list(_holding(Path(folder) for folder in folders))
