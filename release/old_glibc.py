"""Linker flags for an extension that runs with an older glibc than the one of this machine.

The compiled code stays the same. The flags choose older versions of glibc's symbols, and link libstdc++ statically.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

# The glibc of manylinux_2_28.
OLDEST = (2, 28)
# glibc 2.34 moved these functions to libc under a new version. The dynamic linker still serves the former version.
FORMER_LIBRARIES = {
    "libpthread.so.0": ("pthread_", "sem_"),
    "libdl.so.2": ("dl",),
    "librt.so.1": ("shm_",),
}
# Read by the reference counts of libstdc++ since glibc 2.32. Zero means that several threads may run.
SINGLE_THREADED = '__attribute__((visibility("hidden"))) char __libc_single_threaded = 0;\n'


def linker_flags(folder: Path) -> list[str]:
    """Writes stand-ins of glibc's libraries to a folder, and returns the flags that link with them.

    Raises:
        subprocess.CalledProcessError: gcc or nm failed.
    """
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    versions = former_versions(_output("nm", "-D", "--with-symbol-versions", _path_of("libc.so.6")))
    for library, prefixes in FORMER_LIBRARIES.items():
        moved = {name: version for name, version in versions.items() if name.startswith(prefixes)}
        write_stand_in(folder / library, moved)
    (folder / "single_threaded.c").write_text(SINGLE_THREADED)
    single_threaded = folder / "single_threaded.o"
    _output("gcc", "-fPIC", "-c", str(folder / "single_threaded.c"), "-o", str(single_threaded))
    # libstdc++, linked later, is the first to refer to some of the functions.
    stand_ins = [
        "-Wl,--push-state,--no-as-needed",
        *(f"-l:{each}" for each in FORMER_LIBRARIES),
        "-Wl,--pop-state",
    ]
    # Without unused sections, which refer to newer functions. exclude-libs hides libstdc++ from other modules.
    static = ["-static-libstdc++", "-Wl,--gc-sections", "-Wl,--exclude-libs,ALL"]
    return [str(single_threaded), f"-L{folder}", *stand_ins, *static]


def former_versions(symbols: str) -> dict[str, str]:
    """Returns the functions of libc that moved, each with the version to link with, such as `"GLIBC_2.2.5"`.

    Args:
        symbols: The output of `nm -D --with-symbol-versions` for libc.
    """
    versions: dict[str, list[str]] = {}
    newer = set()
    for name, mark, version in re.findall(r" (\w+)(@@?)(GLIBC_[\d.]+)$", symbols, re.MULTILINE):
        if _numbers(version) <= OLDEST:
            versions.setdefault(name, []).append(version)
        elif mark == "@@":
            newer.add(name)
    return {name: max(versions[name], key=_numbers) for name in sorted(newer & versions.keys())}


def write_stand_in(path: Path, functions: dict[str, str]) -> None:
    """Writes a shared library with empty functions, each under its version."""
    source, script = path.with_suffix(".c"), path.with_suffix(".map")
    source.write_text("".join(f"void {name}(void) {{}}\n" for name in functions))
    script.write_text("".join(_version_script(functions)))
    flags = ["-shared", "-fPIC", "-w", "-fno-builtin", "-nostdlib", f"-Wl,-soname,{path.name}"]
    _output("gcc", *flags, f"-Wl,--version-script,{script}", str(source), "-o", str(path))


def _version_script(functions: dict[str, str]) -> Iterator[str]:
    for version in sorted(set(functions.values()), key=_numbers):
        names = "; ".join(name for name in functions if functions[name] == version)
        yield f"{version} {{ global: {names}; }};\n"
    yield "LOCAL { local: *; };\n"


def _path_of(library: str) -> str:
    return _output("gcc", f"-print-file-name={library}").strip()


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version)))


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
