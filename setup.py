"""Builds the package, and the extension module if a C++ compiler exists. The build does not require torch.

Environment variables:
    FUSED_TRICKS_EXTENSION          0: a pure-Python build, without the extension
    FUSED_TRICKS_REQUIRE_EXTENSION  1: the build fails if the extension cannot be built
    FUSED_TRICKS_CUDA               0: no CUDA kernels; 1: the build fails without them; unset: if a toolkit is found
    TORCH_CUDA_ARCH_LIST            GPU architectures, such as "8.0;9.0+PTX"
    CUDA_HOME, CUDA_PATH            the CUDA toolkit; fused_tricks/cuda_toolkit.py lists the other places
    CXX, CXXFLAGS, LDFLAGS          the C++ compiler, and additional flags
    MAX_JOBS                        the number of concurrent compilers
"""

from __future__ import annotations

import filecmp
import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent.resolve()
PACKAGE = "fused_tricks"
BUILD_INFO = "_build_info.json"
MODULE = f"_extension{sysconfig.get_config_var('EXT_SUFFIX')}"

CXX_FLAGS = ["-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-Wall", "-Wextra"]
AVX2_FLAGS = ["-mavx2", "-mfma", "-mf16c"]
X86_FLAGS = {
    "kernels_avx2.cpp": AVX2_FLAGS,
    "kernels_avx512.cpp": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", *AVX2_FLAGS],
}
# As -ffp-contract=off: a product and a sum are contracted to fma only where the source calls fma.
NVCC_FLAGS = ["-std=c++17", "-O3", "--fmad=false", f"-Xcompiler={','.join(CXX_FLAGS[1:])}"]

# A test program for the toolkit. Toolkits of mixed releases and incomplete toolkits fail to compile it.
PROBE = """\
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>
__global__ void probe(float* x) { *x = 1.0f; }
"""


class BuildFailure(Exception):
    """The reason why something cannot be built, in one line, with the output of the compilers."""

    def __init__(self, reason: str, log: str = "") -> None:
        super().__init__(reason)
        self.log = log[-8000:]


class MissingTool(BuildFailure):
    """A build tool of pyproject.toml is missing, which happens only without build isolation."""


class Package(build_py):
    """The Python files, the only content of a pure build."""

    def run(self) -> None:
        """Copies the files, and in a pure build writes the record of the build."""
        if not self.editable_mode:
            # The folder survives builds, and the wheel contains all of its files.
            shutil.rmtree(Path(self.build_lib) / PACKAGE, ignore_errors=True)
        super().run()
        if not self.distribution.has_ext_modules():
            folder = ROOT / PACKAGE if self.editable_mode else Path(self.build_lib) / PACKAGE
            (folder / MODULE).unlink(missing_ok=True)
            info = new_info(self.distribution.get_version())
            write_info(folder, info | {"extension_failure": "FUSED_TRICKS_EXTENSION=0 was set"})


class NinjaExtension(build_ext):
    """The extension, compiled by ninja in a persistent folder, so that only changed files are compiled again."""

    def build_extension(self, ext: Extension) -> None:
        """Writes the module to `build_lib` if it can be built, and in every case the record of the build."""
        version = self.distribution.get_version()
        info = new_info(version)
        target = ROOT / self.build_lib / PACKAGE / MODULE
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        folder = Path("build", f"extension.{self.plat_name}")
        try:
            shutil.copy2(build_module(folder, version, info), target)
        except BuildFailure as failure:
            if is_required():
                raise SystemExit(f"{PACKAGE}: the extension cannot be built: {failure}") from None
            if isinstance(failure, MissingTool):
                raise SystemExit(
                    f"{PACKAGE}: {failure}, or install without --no-build-isolation; FUSED_TRICKS_EXTENSION=0 leaves "
                    "the extension out"
                ) from None
            info.update(extension_failure=str(failure), extension_log=failure.log)
            print(f"\n{PACKAGE}: {what_is_lost(failure)}\n", file=sys.stderr, flush=True)
            self._make_wheel_pure()
        write_info(target.parent, info)

    def _make_wheel_pure(self) -> None:
        """Gives a wheel without the extension the tag of every platform."""
        wheel: Any = self.distribution.get_command_obj("bdist_wheel", create=False)
        if wheel is not None and not self.editable_mode:
            self.distribution.ext_modules = []
            wheel.root_is_pure = True

    def copy_extensions_to_source(self) -> None:
        """Copies the build to the source tree for an editable install, and removes an older build there."""
        built, source = ROOT / self.build_lib / PACKAGE, ROOT / PACKAGE
        module = source / MODULE
        if not (
            (built / MODULE).exists()
            and module.exists()
            and filecmp.cmp(built / MODULE, module, shallow=False)
        ):
            # A running process may have the file mapped, so it is removed and not overwritten.
            module.unlink(missing_ok=True)
            if (built / MODULE).exists():
                shutil.copy2(built / MODULE, module)
        shutil.copy2(built / BUILD_INFO, source / BUILD_INFO)


@dataclass(frozen=True)
class Compiler:
    """The C++ compiler: its command, the first line of `--version`, and whether its target is x86-64."""

    command: list[str]
    version: str
    is_x86: bool


@dataclass(frozen=True)
class Cuda:
    """The `CudaToolkit` that compiles the kernels, the architectures, and the command."""

    toolkit: Any
    architectures: tuple[str, ...]
    command: list[str]


class Ninja:
    """A `build.ninja` file: collects rules and targets, writes the file, runs ninja."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lines = ["ninja_required_version = 1.5", f"builddir = {folder}"]

    def rule(self, name: str, command: Sequence[str], rest: str) -> None:
        """Adds a rule: its command, and the rest of the command line with ninja's variables."""
        self._lines += [
            f"rule {name}",
            f"  command = {_quoted(command)} {rest}",
            f"  description = {name} $out",
        ]
        if "$out.d" in rest:
            self._lines += ["  depfile = $out.d", "  deps = gcc"]

    def make(self, target: str, rule: str, sources: Sequence[Path], flags: Sequence[str] = ()) -> Path:
        """Adds a file to build, named `target` in the folder, and returns its path."""
        path = self._folder / target
        self._lines += [f"build {path}: {rule} {' '.join(map(str, sources))}", f"  flags = {_quoted(flags)}"]
        return path

    def run(self) -> None:
        """Builds the files that are missing or older than their sources.

        Raises:
            BuildFailure: ninja is missing, or a command failed.
        """
        try:
            import ninja

            executable: str | None = str(Path(ninja.BIN_DIR) / "ninja")
        except ImportError:
            executable = shutil.which("ninja")
        if executable is None:
            raise MissingTool("ninja is missing: pip install ninja")
        path = ROOT / self._folder / "build.ninja"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join([*self._lines, ""]))
        jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        output = _output([executable, "-f", str(path), *jobs])
        print(output, flush=True)


def build_module(folder: Path, version: str, info: dict[str, Any]) -> Path:
    """Compiles the extension, with CUDA if possible, and records compilers and flags in `info`.

    Raises:
        BuildFailure: The extension cannot be compiled, or CUDA is required and cannot be compiled.
    """
    compiler = find_compiler()
    info.update(compiler=shlex.join(compiler.command), compiler_version=compiler.version)
    try:
        cuda = find_cuda(compiler, folder / "probe")
    except BuildFailure as failure:
        if switch("FUSED_TRICKS_CUDA"):
            raise
        info.update(cuda_failure=str(failure), cuda_log=failure.log)
        return link(folder, compiler, None, version, info)
    try:
        module = link(folder, compiler, cuda, version, info)
    except BuildFailure as failure:
        if is_required():
            raise
        info.update(cuda_failure=f"its kernels do not compile: {failure}", cuda_log=failure.log)
        return link(folder, compiler, None, version, info)
    info["cuda"] = {
        "home": str(cuda.toolkit.home),
        "version": cuda.toolkit.version,
        "architectures": list(cuda.architectures),
    }
    return module


def link(folder: Path, compiler: Compiler, cuda: Cuda | None, version: str, info: dict[str, Any]) -> Path:
    """Compiles all sources and links them.

    Raises:
        BuildFailure: A compiler failed, or a build tool is missing.
    """
    flags = ["-std=c++17", *CXX_FLAGS, f'-DFUSED_TRICKS_VERSION="{version}"']
    flags += ["-DFUSED_TRICKS_X86=1"] if compiler.is_x86 else []
    flags += ["-DFUSED_TRICKS_CUDA=1"] if cuda else []
    flags += shlex.split(os.environ.get("CXXFLAGS", ""))
    python_flags = python_includes()
    info["compiler_flags"] = shlex.join(flags)

    ninja = Ninja(folder)
    compile_rest = "$flags -MD -MF $out.d -c $in -o $out"
    ninja.rule("cxx", [*compiler.command, *flags], compile_rest)
    objects, libraries = [], []
    if cuda:
        # First, since they take the longest.
        ninja.rule("nvcc", cuda.command, compile_rest)
        objects = [ninja.make(f"{source}.o", "nvcc", [source]) for source in cuda_sources()]
        libraries = [f"-L{each}" for each in cuda.toolkit.library_dirs]
        libraries += ["-lcudart_static", "-ldl", "-lrt", "-pthread"]
    folders = ["csrc/cpu", *(["csrc/cuda"] if cuda else [])]
    sources = sorted(source for each in folders for source in Path(each).glob("*.cpp"))
    objects += [
        ninja.make(f"{source}.o", "cxx", [source], X86_FLAGS.get(source.name, ()))
        for source in sources
        if compiler.is_x86 or source.name not in X86_FLAGS
    ]
    # Only these objects depend on the Python. Builds for several Pythons share all others.
    objects += [
        ninja.make(f"{sys.implementation.cache_tag}/{source}.o", "cxx", [source], python_flags)
        for source in sorted(Path("csrc/python").glob("*.cpp"))
    ]
    libraries += shlex.split(os.environ.get("LDFLAGS", ""))
    kind = ["-bundle", "-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-shared"]
    ninja.rule("link", [*compiler.command, *kind], f"$in -o $out {_quoted(libraries)}")
    module = ninja.make(MODULE, "link", objects)
    ninja.run()
    return ROOT / module


def find_compiler() -> Compiler:
    """Returns the C++ compiler of `CXX`; by default the first of c++, g++ and clang++.

    Raises:
        BuildFailure: No compiler runs.
    """
    chosen = shlex.split(os.environ.get("CXX", ""))
    command = next(
        (each for each in ([chosen] if chosen else [["c++"], ["g++"], ["clang++"]]) if shutil.which(each[0])),
        None,
    )
    if command is None:
        tried = f"CXX={chosen[0]} is not a program" if chosen else "none of c++, g++ and clang++ is on PATH"
        raise BuildFailure(f"no C++ compiler: {tried}")
    machine = _output([*command, "-dumpmachine"])
    version = _output([*command, "--version"]).partition("\n")[0]
    return Compiler(command, version, machine.startswith(("x86_64", "amd64")))


def find_cuda(compiler: Compiler, folder: Path) -> Cuda:
    """Returns the toolkit that `cuda_toolkit` finds, after a test program was compiled in `folder`.

    Raises:
        BuildFailure: CUDA is switched off, no toolkit was found, or the test program did not compile.
    """
    if switch("FUSED_TRICKS_CUDA") is False:
        raise BuildFailure("FUSED_TRICKS_CUDA=0 was set")
    finder = _load("cuda_toolkit")
    search = finder.find_toolkit()
    toolkit = search.toolkit
    if toolkit is None:
        raise BuildFailure(f"no CUDA toolkit was found ({'; '.join(map(str, search.rejections))})")
    try:
        known = finder.known_architectures(toolkit)
        architectures = finder.choose_architectures(known, os.environ.get("TORCH_CUDA_ARCH_LIST"))
    except ValueError as error:
        raise BuildFailure(str(error)) from None
    # nvcc takes a compiler and nothing that launches one.
    host = compiler.command[1 if Path(compiler.command[0]).name in ("ccache", "sccache") else 0]
    threads = min(4, int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1))
    command = [str(toolkit.nvcc), "-ccbin", host, *NVCC_FLAGS, f"--threads={threads}"]
    command += finder.architecture_flags(architectures)

    source = ROOT / folder / "probe.cu"
    source.parent.mkdir(parents=True, exist_ok=True)
    if not source.exists() or source.read_text() != PROBE:
        source.write_text(PROBE)
    ninja = Ninja(folder)
    ninja.rule("nvcc", command, "-c $in -o $out")
    ninja.make("probe.o", "nvcc", [folder / "probe.cu"])
    try:
        ninja.run()
    except BuildFailure as failure:
        raise BuildFailure(
            f"the CUDA toolkit in {toolkit.home} does not compile: {failure}", failure.log
        ) from None
    return Cuda(toolkit, architectures, command)


def cuda_sources() -> list[Path]:
    """Returns the sources for nvcc."""
    return sorted(Path("csrc/cuda").glob("*.cu"))


def python_includes() -> list[str]:
    """Returns the flags for the headers of Python and pybind11.

    Raises:
        BuildFailure: The headers are not installed.
    """
    try:
        import pybind11
    except ImportError:
        raise MissingTool("pybind11 is missing: pip install pybind11") from None
    include = sysconfig.get_path("include")
    if not Path(include, "Python.h").exists():
        raise BuildFailure(
            f"{include} has no Python.h; install Python's headers (python3-dev or python3-devel)"
        )
    return ["-isystem", include, "-isystem", pybind11.get_include()]


def new_info(version: str) -> dict[str, Any]:
    """Returns a new record for `python -m fused_tricks`."""
    return {
        "version": version,
        "python": platform.python_version(),
        "platform": sysconfig.get_platform(),
        "extension_failure": None,
        "cuda": None,
        "cuda_failure": None,
    }


def write_info(folder: Path, info: dict[str, Any]) -> None:
    """Writes the record into the package's folder."""
    (folder / BUILD_INFO).write_text(json.dumps(info, indent=2) + "\n")


def what_is_lost(failure: BuildFailure) -> str:
    """Returns the message for an installation without the extension."""
    return (
        f"installed without the compiled extension: {failure}.\n"
        "The backends 'cpu' and 'cuda' are missing; the others work, and are slower.\n"
        "To have them, install a C++17 compiler (such as g++ or clang++) and install fused_tricks again. "
        "`python -m fused_tricks` shows this reason. FUSED_TRICKS_REQUIRE_EXTENSION=1 makes it an error."
    )


def switch(name: str) -> bool | None:
    """Returns an environment variable as True or False; None if it is not set."""
    value = os.environ.get(name, "")
    if value not in ("", "0", "1"):
        raise SystemExit(f"{PACKAGE}: {name} must be 0, 1 or unset; it is {value!r}")
    return None if value == "" else value == "1"


def check_wheels() -> None:
    """Exits if setuptools cannot make wheels, in place of its "invalid command 'bdist_wheel'"."""
    makes_wheels = {"bdist_wheel", "dist_info", "editable_wheel"} & {*sys.argv}
    if makes_wheels and not any(map(_can_import, ("setuptools.command.bdist_wheel", "wheel"))):
        raise SystemExit(
            f"{PACKAGE}: setuptools {setuptools.__version__} needs another package to make wheels: pip install wheel"
        )


def _can_import(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def is_required() -> bool:
    """Returns True if the build must fail without the extension."""
    return bool(switch("FUSED_TRICKS_REQUIRE_EXTENSION") or switch("FUSED_TRICKS_CUDA"))


def _load(name: str) -> Any:
    """Loads a module of the package by its file, because an import of the package requires torch."""
    spec = importlib.util.spec_from_file_location(name, ROOT / PACKAGE / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _output(command: Sequence[str]) -> str:
    """Returns the output of a command. Raises BuildFailure with the first error of a failed command."""
    try:
        result = subprocess.run(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
    except OSError as error:
        raise BuildFailure(f"{command[0]} does not run: {error}") from None
    if result.returncode != 0:
        print(result.stdout, flush=True)
        lines = [line.strip() for line in result.stdout.splitlines() if line.strip()] or ["no output"]
        errors = [line for line in lines if re.search(r"\b(error|fatal)\b", line, re.IGNORECASE)]
        raise BuildFailure([*errors, lines[-1]][0], result.stdout)
    return result.stdout


def _quoted(arguments: Sequence[str]) -> str:
    """Returns a command quoted for the shell in a ninja file."""
    return shlex.join(arguments).replace("$", "$$")


check_wheels()
extension = Extension("fused_tricks._extension", [str(path) for path in sorted(Path("csrc").rglob("*.cpp"))])
setup(
    # Setuptools 77 introduced the field of PEP 639.
    **{"license_expression" if int(setuptools.__version__.partition(".")[0]) >= 77 else "license": "MIT"},
    ext_modules=[] if switch("FUSED_TRICKS_EXTENSION") is False else [extension],
    cmdclass={"build_ext": NinjaExtension, "build_py": Package},
)
