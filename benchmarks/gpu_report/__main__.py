"""Builds, tests, times, profiles and sanitizes fused_tricks on the GPU of this machine, within a limit of time.

`python -m benchmarks.gpu_report` (or `make gpu-report`) requires torch and no network. Nothing is installed, and a part
without its tools is reported as skipped. The results are saved after each part, in one folder. benchmarks/README.md
lists the files.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.metadata
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

from benchmarks.gpu_report.parts import Part, Request, parts
from benchmarks.lib import report

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = (
    "torch",
    "triton",
    "numpy",
    "setuptools",
    "pybind11",
    "ninja",
    "pytest",
    "pytest-xdist",
    "expecttest",
    "torchvision",
    "matplotlib",
    "tqdm",
    "scikit-learn",
    "mlxtend",
    "timm",
    "apex",
    "transformer_engine",
    "flashoptim",
)
PROGRAMS = ("nvidia-smi", "nvcc", "g++", "ninja", "ncu", "compute-sanitizer")
LEAST_SECONDS = 10
"""The least remaining seconds at which a part begins."""
LINES_SHOWN = 40


@dataclass(frozen=True)
class Outcome:
    """The outcome of a part: `ok`, `failed`, `stopped` or `skipped`, the reason, and the seconds."""

    part: str
    ended: str
    why: str
    seconds: float


def add_tools_to_path() -> None:
    """Appends the usual folders of NVIDIA's tools to the PATH."""
    folders = [Path("/usr/local/cuda/bin"), *sorted(Path("/opt/nvidia/nsight-compute").glob("*"))[-1:]]
    os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", ""), *map(str, folders)])


def answer(*command: str) -> str:
    """Returns the first line of a program's output, or the empty string."""
    program = shutil.which(command[0])
    if program is None:
        return ""
    result = subprocess.run([program, *command[1:]], capture_output=True, text=True)
    return (result.stdout.strip().splitlines() or [""])[0] if result.returncode == 0 else ""


def describe_gpu() -> tuple[str, str | None, list[str]]:
    """Returns the GPU's name, its architecture such as `9.0`, and lines about machine and versions."""
    fields = ("name", "compute_cap", "driver_version", "memory.total", "clocks.max.sm", "clocks.max.mem")
    found = answer("nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader").split(", ")
    known = dict(zip(fields, found)) if len(found) == len(fields) else {}
    versions = [f"{name} {_version(name)}" for name in PACKAGES if _version(name)]
    programs = [name for name in PROGRAMS if shutil.which(name)]
    missing = [name for name in PACKAGES if not _version(name)]
    missing += [name for name in PROGRAMS if name not in programs]
    lines = [
        f"- GPU: {', '.join(f'{key} {value}' for key, value in known.items()) or 'nvidia-smi finds none'}",
        f"- Python {sys.version.split()[0]}, {', '.join(versions)}",
        f"- Programs: {', '.join(programs) or 'none'}; {_nvcc()}",
        f"- Not here: {', '.join(missing) or 'nothing'}",
        f"- Date: {datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d %H:%M} UTC; commit {_commit()}",
    ]
    return known.get("name", "no GPU"), known.get("compute_cap"), lines


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _nvcc() -> str:
    program = shutil.which("nvcc")
    text = subprocess.run([program, "--version"], capture_output=True, text=True).stdout if program else ""
    found = re.search(r"release [\d.]+", text)
    return f"nvcc {found[0]}" if found else "no nvcc on the PATH"


def _commit() -> str:
    return answer("git", "-C", str(ROOT), "rev-parse", "--short", "HEAD") or "unknown"


def _text_of(page: Path) -> str:
    """Returns a page as far as it was written. A stopped part may leave an incomplete character."""
    return page.read_text(encoding="utf-8", errors="replace") if page.exists() else ""


class Report:
    """The folder of the results, and the remaining time.

    Args:
        request: The request of the parts.
        output: The folder.
        seconds: The limit for all parts.
        head: Lines about the machine.
    """

    def __init__(self, request: Request, output: Path, seconds: float, head: Sequence[str]) -> None:
        self._request, self._output, self._seconds, self._head = request, output, seconds, head
        self._began = time.monotonic()
        self.outcomes: list[Outcome] = []
        self._sections: list[str] = []

    def run(self, part: Part) -> None:
        """Runs a part, or records the reason for skipping it, and saves all results."""
        print(f"{part.name} ...", flush=True)
        began = time.monotonic()
        ended, why = self._ended(part)
        self.outcomes.append(Outcome(part.name, ended, why, round(time.monotonic() - began, 1)))
        print(f"{part.name}: {ended}{f' ({why})' if why else ''}", flush=True)
        self._sections.append(self._section(part))
        self.save(part)

    def _left(self) -> float:
        return self._seconds - (time.monotonic() - self._began)

    def _ended(self, part: Part) -> tuple[str, str]:
        missing = [name for name in part.programs if shutil.which(name) is None]
        missing += [name for name in part.modules if find_spec(name) is None]
        if missing:
            return "skipped", f"not here: {', '.join(missing)}"
        if self._left() < LEAST_SECONDS:
            return "skipped", "no time is left"
        limit = min(part.seconds, self._left() - LEAST_SECONDS / 2)
        end = time.monotonic() + limit
        for stage in part.stages:
            codes = self._run_stage(stage, part, end)
            if None in codes.values():
                return "stopped", f"after {limit:.0f} s, its limit"
            failed = [f"{name}: exit status {code}" for name, code in codes.items() if code]
            if failed:
                return "failed", "; ".join(failed)
        if any("check failed" in _text_of(page) for page in part.tables):
            return "failed", "a check failed, as its page says"
        return "ok", ""

    def _run_stage(self, stage: dict[str, list[str]], part: Part, end: float) -> dict[str, int | None]:
        """Returns the exit statuses by log; None for a stopped command."""
        environment = {
            **os.environ,
            **part.environment,
            "MPLBACKEND": "Agg",
            "MPLCONFIGDIR": str(self._request.folder / "matplotlib"),
            "PYTHONUNBUFFERED": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
            "TORCHINDUCTOR_CACHE_DIR": str(self._request.folder / "inductor"),
            "TQDM_DISABLE": "1",
            "TRITON_CACHE_DIR": str(self._request.folder / "triton"),
        }
        codes: dict[str, int | None] = {}
        with contextlib.ExitStack() as stack:
            running = {}
            for name, command in stage.items():
                log = stack.enter_context(open(self._log(name), "w", encoding="utf-8"))
                try:
                    running[name] = subprocess.Popen(
                        command,
                        cwd=ROOT,
                        env=environment,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,
                    )
                except OSError as error:
                    print(error, file=log)
                    codes[name] = 127
            try:
                for name, process in running.items():
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        codes[name] = process.wait(max(0.1, end - time.monotonic()))
            finally:
                for name, process in running.items():
                    if process.poll() is None:
                        codes[name] = None
                        # The processes that the command has started end with it.
                        os.killpg(process.pid, signal.SIGKILL)
                        process.wait()
        return codes

    def _log(self, name: str) -> Path:
        return self._request.folder / f"{name}.log"

    def _section(self, part: Part) -> str:
        """Returns the part's tables and the matching lines of its logs."""
        outcome = self.outcomes[-1]
        text = [f"## {part.name}: {outcome.ended}{f' ({outcome.why})' if outcome.why else ''}"]
        if outcome.ended == "skipped":
            return text[0]
        text += [_demoted(_text_of(page)) for page in part.tables if page.exists()]
        lines: list[str] = []
        for name in (name for stage in part.stages for name in stage):
            if self._log(name).exists():
                log = self._log(name).read_text(encoding="utf-8", errors="replace").splitlines()
                matching = [line for line in log if part.shown and re.search(part.shown, line)]
                lines += matching[-LINES_SHOWN:]
                if outcome.ended != "ok":
                    lines += [f"--- the end of {name}.log", *[line for line in log if line.strip()][-8:]]
        if lines:
            text.append("\n".join(["```text", *(line[:200] for line in lines), "```"]))
        return "\n\n".join(text)

    def save(self, part: Part | None = None) -> None:
        """Writes the results so far: summary.md, numbers.jsonl, the pictures, and logs.tar.gz with all files."""
        rows = [
            f"| {outcome.part} | {outcome.ended} | {outcome.why or ' '} | {outcome.seconds:.0f} |"
            for outcome in self.outcomes
        ]
        table = "\n".join(["| part | ended | why | seconds |", "| --- | --- | --- | ---: |", *rows])
        summary = ["# fused_tricks on a GPU", "\n".join(self._head), table, *self._sections]
        (self._output / "summary.md").write_text("\n\n".join(summary) + "\n", encoding="utf-8")
        folder = self._request.folder
        with open(self._output / "numbers.jsonl", "w", encoding="utf-8") as lines:
            for outcome in self.outcomes:
                results = []
                for path in sorted((folder / outcome.part).glob("*.json")):
                    # A stopped part may leave an incomplete file.
                    with contextlib.suppress(ValueError):
                        results.append(json.loads(path.read_text(encoding="utf-8")))
                print(json.dumps({**asdict(outcome), "results": results}), file=lines)
        for picture in part.pictures if part else ():
            if picture.exists():
                shutil.copy2(picture, self._output / f"{picture.parent.name}.png")
        kept = [
            *folder.glob("*.log"),
            *folder.glob("*.ncu-rep"),
            *folder.glob("*/*.json"),
            *folder.glob("*/*.md"),
        ]
        with tarfile.open(self._output / "logs.tar.gz", "w:gz") as archive:
            for path in sorted(kept):
                archive.add(path, arcname=str(path.relative_to(folder)))


def _demoted(page: str) -> str:
    """Returns a page for use inside another page: headings two levels down, no link to its picture."""
    page = re.sub(r"^(#+) ", r"##\1 ", page, flags=re.MULTILINE)
    return re.sub(r"!\[[^\]]*\]\([^)]*\)\n*", "", page).strip()


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_report", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument(
        "--seconds", type=float, default=530, help="limit for all parts; skipped parts are listed"
    )
    parser.add_argument(
        "--output",
        type=report.output_folder,
        metavar="DIR",
        help="build/gpu_report/NAME-OF-THE-GPU by default",
    )
    parser.add_argument("--parts", nargs="+", metavar="PART", help="only these, in their usual order")
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="cpu tries the report itself"
    )
    parser.add_argument(
        "--backend", action="append", default=[], help="a backend of fused_tricks; all usable ones by default"
    )
    parser.add_argument(
        "--tiny", action="store_true", help="each part at the least size, to try the report itself"
    )
    return parser.parse_args(arguments)


def main(
    arguments: Sequence[str], python: Sequence[str] = (sys.executable,), graphs: bool | None = None
) -> int:
    """Runs the parts. Returns 1 if a part failed or was stopped.

    Args:
        arguments: The command line.
        python: The command that runs Python in the parts.
        graphs: True if CUDA graphs can be captured; by default True on a GPU.
    """
    options = parse(arguments)
    add_tools_to_path()
    name, architecture, head = describe_gpu()
    if options.device == "cpu":
        name, architecture = "cpu", None
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    output = options.output or ROOT / "build" / "gpu_report" / slug
    folder = ROOT / "build" / "gpu_report_parts"
    if output.resolve() == folder:
        sys.exit(f"--output: {output} is where the parts write; choose another folder")
    request = Request(
        python=tuple(python),
        folder=folder,
        device=options.device,
        graphs=options.device == "cuda" if graphs is None else graphs,
        backends=tuple(options.backend),
        architecture=architecture,
        tiny=options.tiny,
    )
    every = parts(request)
    unknown = set(options.parts or ()) - {part.name for part in every}
    if unknown:
        sys.exit(
            f"--parts: no {', '.join(sorted(unknown))}; choose from {', '.join(part.name for part in every)}"
        )
    shutil.rmtree(folder, ignore_errors=True)
    for each in (output, folder):
        each.mkdir(parents=True, exist_ok=True)
    print("\n".join(head), flush=True)
    results = Report(request, output, options.seconds, head)
    results.save()
    for part in every:
        if not options.parts or part.name in options.parts:
            results.run(part)
    print(f"{output / 'summary.md'} has the results")
    return int(any(outcome.ended in ("failed", "stopped") for outcome in results.outcomes))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
