"""The parts of `python -m benchmarks.gpu_report`, the most important first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

TESTS = (
    "optimizer/test_exactness.py",
    "optimizer/test_overflow.py",
    "optimizer/test_loss_scale.py",
    "optimizer/test_clipping.py",
    "optimizer/test_amp_protocol.py",
    "optimizer/test_changes_between_steps.py",
    "optimizer/test_checkpoint.py",
    "optimizer/test_plan.py",
    "schedule/test_schedule_applied.py",
    "optimizer/test_weight_decay.py",
    "optimizer/test_layouts.py",
)
SANITIZERS = ("memcheck", "racecheck", "synccheck", "initcheck")
BILLION = "synthetic:1000:1000000"
OUTCOMES = r"^(FAILED|ERROR) |\b(passed|failed|skipped)\b"
"""The pattern of pytest's summary lines in a log."""


@dataclass(frozen=True)
class Part:
    """One part of the report, run in processes of its own.

    Attributes:
        name: The name of the part and of its log.
        seconds: The limit of the part, if the report has this time left.
        stages: Commands by the name of their log. Commands of a stage run at once, stages one after another.
        programs: Programs that must be on the PATH.
        modules: Python modules that must be installed.
        tables: Pages that go into the summary.
        pictures: Pictures that are copied beside the summary.
        shown: A regular expression for the lines of a log that go into the summary.
        environment: Environment variables of the commands.
    """

    name: str
    seconds: int
    stages: Sequence[dict[str, list[str]]]
    programs: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()
    tables: tuple[Path, ...] = ()
    pictures: tuple[Path, ...] = ()
    shown: str = ""
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Request:
    """The settings of the parts.

    Attributes:
        python: The command that runs Python.
        folder: The folder that the parts write to.
        device: `cuda`, or `cpu` to try the report itself.
        graphs: True if CUDA graphs can be captured on the device.
        backends: The backends of fused_tricks; empty for all usable ones.
        architecture: The architecture of the GPU, such as `9.0`; None without a GPU.
        tiny: True runs each part at the least size.
    """

    python: tuple[str, ...]
    folder: Path
    device: str
    graphs: bool
    backends: tuple[str, ...]
    architecture: str | None
    tiny: bool

    def module(self, name: str, *arguments: str) -> list[str]:
        """Returns the command that runs a module."""
        return [*self.python, "-m", name, *arguments]

    def benchmark(self, name: str, *arguments: str) -> list[str]:
        """Returns the command that runs a benchmark on the device, without its output folder."""
        chosen = [word for backend in self.backends for word in ("--backend", backend)]
        return self.module(f"benchmarks.{name}", *arguments, "--device", self.device, *chosen)


def parts(request: Request) -> list[Part]:
    """Returns the parts, the most important first."""
    architecture = ["--architecture", request.architecture] if request.architecture else []
    folder = ["--folder", str(request.folder / "tree")]
    build = request.module("benchmarks.gpu_report.build", *architecture, *folder)
    return [
        Part("build", 150, [{"build": build}], shown=r"error|is built|is older"),
        Part("backends", 40, [{"backends": request.module("fused_tricks")}], shown="."),
        _tests(request, "test_gpu", 80, ["backends/test_gpu.py"]),
        _of_benchmark(request, "bits", 60, "gpu_report.bits", _bits(request), result="gpu_bits"),
        _of_benchmark(request, "step", 100, "step", [*_step(request), "--no-compiled"], picture=True),
        _of_benchmark(request, "kernels", 60, "gpu_report.kernels", _kernels(request), result="gpu_kernels"),
        _of_benchmark(request, "sets", 110, "step.sizes", _sets(request), result="step_sizes"),
        _training(request, "train_resnet18", 70, "resnet18", 32, 128),
        _training(request, "train_resnet50", 110, "resnet50", 224, 64),
        _ncu(request),
        _sanitizers(request),
        _of_benchmark(request, "step_compiled", 150, "step", _step(request), modules=("triton",)),
        _tests(request, "tests", 200, TESTS[1:2] if request.tiny else TESTS, _test_backends(request)),
    ]


def _bits(request: Request) -> list[str]:
    return ["--parameters", "synthetic:3:1000", "--repeats", "2"] if request.tiny else []


def _step(request: Request) -> list[str]:
    tiny = "--parameters synthetic:2:300 --rounds 2 --host-rounds 1 --loop-mib 1"
    return (tiny if request.tiny else "--parameters resnet50 --rounds 40 --host-rounds 60").split()


def _kernels(request: Request) -> list[str]:
    return ["--sets", "synthetic:2:300", "--rounds", "2", "--loop-mib", "1"] if request.tiny else []


def _sets(request: Request) -> list[str]:
    tiny = "--models synthetic:2:300 --seconds 0.001 --most-rounds 1 --loop-mib 1"
    full = f"--models resnet18 resnet50 resnet152 vit_b_16 {BILLION} --seconds 2 --most-rounds 40"
    return [
        *(tiny if request.tiny else full).split(),
        *("--tensor-counts", "--element-counts", "--no-compiled"),
    ]


def _of_benchmark(
    request: Request,
    name: str,
    seconds: int,
    module: str,
    arguments: Sequence[str],
    *,
    result: str = "",
    picture: bool = False,
    modules: tuple[str, ...] = (),
) -> Part:
    folder, result = request.folder / name, result or module
    command = request.benchmark(module, *arguments, "--output", str(folder))
    pictures = (folder / f"{result}.png",) if picture else ()
    return Part(
        name,
        seconds,
        [{name: command}],
        modules=modules,
        tables=(folder / f"{result}.md",),
        pictures=pictures,
    )


def _training(request: Request, name: str, seconds: int, model: str, size: int, batch: int) -> Part:
    length = ["--steps", "3"] if request.tiny else ["--steps", "40"]
    if request.tiny:
        model, size, batch = "squeezenet1_1", 32, 2
    arguments = ["--model", model, "--image-size", str(size), "--batch-size", str(batch), "--seeds", "1"]
    graph = ["--graph"] if request.graphs else []
    dtype = ["--dtype", "float16"] if request.device == "cuda" else []
    return _of_benchmark(request, name, seconds, "train", [*arguments, *length, *dtype, *graph], picture=True)


def _tests(
    request: Request, name: str, seconds: int, files: Sequence[str], backends: Sequence[str] = ()
) -> Part:
    at_once = ["-n", "12"] if len(files) > 1 and find_spec("xdist") else []
    pick = [f"--backend={name}" for name in backends]
    paths = [f"tests/{file}" for file in files]
    options = ["-q", "-rs", "-p", "no:cacheprovider", "--maxfail=30", *at_once, *pick]
    return Part(
        name,
        seconds,
        [{name: request.module("pytest", *options, *paths)}],
        modules=("pytest",),
        shown=OUTCOMES,
    )


def _test_backends(request: Request) -> Sequence[str]:
    return ("cpu",) if request.tiny else ("cuda", "triton")


def _ncu(request: Request) -> Part:
    report = request.folder / "ncu"
    measure = [
        "ncu",
        "--clock-control",
        "none",
        "--set",
        "full",
        "--launch-skip",
        "6",
        "--launch-count",
        "4",
        "-f",
    ]
    measure += ["-k", "regex:(scan|update)_kernel", "-o", str(report)]
    show = ["ncu", "--import", f"{report}.ncu-rep", "--page", "details"]
    return Part(
        "ncu",
        70,
        [{"ncu_run": measure + request.benchmark("gpu_report.workload", "profiled")}, {"ncu": show}],
        programs=("ncu",),
        shown=r"_kernel|Duration|DRAM Throughput|Memory Throughput|Achieved Occ|L2 Hit Rate|Registers Per",
    )


def _sanitizers(request: Request) -> Part:
    workload = request.benchmark("gpu_report.workload", "sanitized")
    tool = ["compute-sanitizer", "--print-limit", "10", "--error-exitcode", "1", "--tool"]
    return Part(
        "sanitizer",
        90,
        [{f"sanitizer_{name}": [*tool, name, *workload] for name in SANITIZERS}],
        programs=("compute-sanitizer",),
        shown=r"ERROR SUMMARY|RACECHECK SUMMARY|steps done",
        environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
    )
