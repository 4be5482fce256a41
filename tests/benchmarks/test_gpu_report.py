"""The report on a GPU: its parts keep their limits, say why they are missing, and run to the end without a GPU."""

from __future__ import annotations

import json
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu_report import __main__ as gpu_report
from benchmarks.gpu_report import build as gpu_build
from benchmarks.gpu_report.__main__ import ROOT, Report
from benchmarks.gpu_report.parts import Part, Request, parts
from support import emulation

pytestmark = pytest.mark.slow

TESTS = Path(__file__).parents[1]
EVERY_PART = (
    "build",
    "backends",
    "test_gpu",
    "bits",
    "step",
    "kernels",
    "sets",
    "train_resnet18",
    "train_resnet50",
    "ncu",
    "sanitizer",
    "step_compiled",
    "tests",
)


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def request_for(folder: Path, **options: Any) -> Request:
    given = {"device": "cuda", "graphs": True, "backends": (), "architecture": "9.0", "tiny": False}
    return Request(python=(sys.executable,), folder=folder, **{**given, **options})


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., tuple[str, str]]:
    """Runs parts in a report and returns how the last one ended, and the summary."""
    folder, output = tmp_path / "parts", tmp_path / "output"
    folder.mkdir()
    output.mkdir()

    def run(*of: Part, seconds: float = 1000) -> tuple[str, str]:
        report = Report(request_for(folder), output, seconds, ["- a machine"])
        for part in of:
            report.run(part)
        last = report.outcomes[-1]
        return f"{last.ended} {last.why}".strip(), (output / "summary.md").read_text(encoding="utf-8")

    return run


def test_a_part_that_ends_well_shows_its_table_and_its_lines(run, tmp_path: Path) -> None:
    page, picture = tmp_path / "parts" / "page.md", tmp_path / "parts" / "a.png"
    code = f"open({str(page)!r}, 'w').write('# A page\\n\\nwords'); open({str(picture)!r}, 'w'); print('3 passed')"
    part = Part("a", 60, [{"a": python(code)}], tables=(page,), pictures=(picture,), shown="passed")
    ended, summary = run(part)
    assert ended == "ok" and "### A page\n\nwords" in summary and "```text\n3 passed\n```" in summary
    assert summary.startswith("# fused_tricks on a GPU\n\n- a machine\n")
    assert (tmp_path / "output" / "parts.png").exists()


def test_a_part_that_fails_shows_the_end_of_its_log(run) -> None:
    ended, summary = run(Part("a", 60, [{"a": python("print('why'); raise SystemExit(3)")}]))
    assert ended == "failed a: exit status 3" and "--- the end of a.log\nwhy\n" in summary


def test_a_part_is_stopped_at_its_limit_with_what_it_started_and_the_next_runs(run) -> None:
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(3600)'])"
    ended, summary = run(Part("a", 1, [{"a": python(code)}]), Part("b", 60, [{"b": python("")}]))
    assert ended == "ok" and "| a | stopped | after 1 s, its limit |" in summary


def test_a_part_without_time_left_is_named_as_skipped(run) -> None:
    ended, summary = run(Part("a", 60, [{"a": python("")}]), seconds=0)
    assert ended == "skipped no time is left" and "| a | skipped | no time is left | 0 |" in summary


def test_a_part_without_its_tools_is_named_as_skipped(run) -> None:
    part = Part("a", 60, [{"a": python("")}], programs=("no_such_program",), modules=("no_such_module",))
    assert run(part)[0] == "skipped not here: no_such_program, no_such_module"


def test_a_part_whose_page_has_a_check_that_failed_is_no_success(run, tmp_path: Path) -> None:
    page = tmp_path / "parts" / "page.md"
    code = f"open({str(page)!r}, 'w').write('check failed: 7 elements differ')"
    assert run(Part("a", 60, [{"a": python(code)}], tables=(page,)))[0].startswith("failed a check failed")


def test_half_a_file_of_a_part_that_was_stopped_does_not_end_the_report(run, tmp_path: Path) -> None:
    page, numbers = tmp_path / "parts" / "page.md", tmp_path / "parts" / "a" / "a.json"
    numbers.parent.mkdir(parents=True)
    code = f"open({str(page)!r}, 'wb').write(b'words \\xc2'); open({str(numbers)!r}, 'w').write('[1, ')"
    ended, summary = run(Part("a", 60, [{"a": python(code)}], tables=(page,)))
    assert ended == "ok" and "words" in summary


def test_a_program_that_cannot_be_started_fails_its_part_alone(run, tmp_path: Path) -> None:
    ended, summary = run(
        Part("a", 60, [{"a": [str(tmp_path / "nothing")]}]), Part("b", 60, [{"b": python("")}])
    )
    assert ended == "ok" and "| a | failed | a: exit status 127 |" in summary


@pytest.mark.parametrize("output", ["/dev/null/x", str(ROOT / "build" / "gpu_report_parts")])
def test_an_output_that_cannot_be_used_is_refused_before_any_work(output: str) -> None:
    with pytest.raises(SystemExit) as refused:
        gpu_report.main(["--output", output])
    assert refused.value.code not in (0, None)


def test_a_stage_begins_when_the_commands_of_the_stage_before_have_ended(run, tmp_path: Path) -> None:
    note = tmp_path / "note"
    first = python(f"open({str(note)!r}, 'w').write('x')")
    second = python(f"assert open({str(note)!r}).read() == 'x'")
    assert run(Part("a", 60, [{"first": first}, {"second": second, "third": second}]))[0] == "ok"


def test_a_stage_is_left_out_after_one_that_failed(run, tmp_path: Path) -> None:
    ended, _ = run(Part("a", 60, [{"first": python("raise SystemExit(1)")}, {"second": python("")}]))
    assert ended == "failed first: exit status 1" and not (tmp_path / "parts" / "second.log").exists()


def test_every_part_runs_without_network_and_within_the_limit_by_priority(tmp_path: Path) -> None:
    assert tuple(part.name for part in parts(request_for(tmp_path))) == EVERY_PART


def test_tests_run_at_once_where_xdist_is_installed_and_one_by_one_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def options() -> list[str]:
        return parts(request_for(tmp_path))[-1].stages[0]["tests"]

    monkeypatch.setitem(sys.modules, "xdist", None)
    assert "-n" not in options()


def test_a_part_that_is_no_part_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="--parts: no dance; choose from build, backends"):
        gpu_report.main(["--parts", "dance", "--output", str(tmp_path / "output")])


@pytest.mark.parametrize(
    ("architecture", "cuda", "expected"),
    [
        (None, None, True),
        ("9.0", None, False),
        ("9.0", ["8.0", "9.0+PTX"], True),
        ("12.0", ["8.0", "9.0+PTX"], False),
    ],
)
def test_the_extension_is_built_unless_it_has_code_for_the_gpu(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    architecture: str | None,
    cuda: list[str] | None,
    expected: bool,
) -> None:
    for name in ("MODULE", "INFO"):
        monkeypatch.setattr(gpu_build, name, tmp_path / name)
    assert not gpu_build.is_built(architecture)
    (tmp_path / "MODULE").touch()
    (tmp_path / "INFO").write_text(json.dumps({"cuda": cuda and {"architectures": cuda}}))
    assert gpu_build.is_built(architecture) is expected


def test_the_report_runs_to_the_end_on_a_fake_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("matplotlib", "scipy", "torchvision"):
        pytest.importorskip(name, reason="the benchmarks need it")
    if reason := emulation.unusable_because():
        pytest.skip(f"backend emulated_cuda: {reason}")
    # The tools of a real GPU are named as missing, whatever this machine has.
    monkeypatch.setattr(gpu_report, "add_tools_to_path", lambda: None)
    which = gpu_report.shutil.which
    tools = ("nvidia-smi", "ncu", "compute-sanitizer")
    monkeypatch.setattr(gpu_report.shutil, "which", lambda name: None if name in tools else which(name))
    # It takes a compiler a minute.
    monkeypatch.setitem(sys.modules, "triton", None)
    # In the least size, train_resnet50 is train_resnet18 again.
    expected = tuple(part for part in EVERY_PART if part != "train_resnet50")
    options = ["--device", "cpu", "--tiny", "--seconds", "100000", "--parts", *expected]
    backends = ["--backend", "cpu", "--backend", "emulated_cuda"]
    code = gpu_report.main(
        [*options, *backends, "--output", str(tmp_path)],
        [sys.executable, str(TESTS / "support" / "with_fake_cuda.py")],
        graphs=True,
    )
    summary = (tmp_path / "summary.md").read_text(encoding="utf-8")
    assert code == 0, summary
    lines = (tmp_path / "numbers.jsonl").read_text(encoding="utf-8").splitlines()
    outcomes = {row["part"]: row for row in map(json.loads, lines)}
    assert tuple(outcomes) == expected
    assert {name: row["why"] for name, row in outcomes.items() if row["ended"] != "ok"} == {
        "ncu": "not here: ncu",
        "sanitizer": "not here: compute-sanitizer",
        "step_compiled": "not here: triton",
    }
    timed = outcomes["step"]["results"][0]["contestants"]
    assert {"fused_tricks, CUDA graph", "fused_tricks, emulated_cuda"} < set(timed)
    assert {row["check"] for name, row in timed.items() if name.startswith("fused_tricks")} == {
        "every bit, backend reference"
    }
    assert "fused_tricks, CUDA graph" in outcomes["train_resnet18"]["results"][0]["contestants"]
    assert "### The kernels of our step" in summary and "check failed" not in summary
    pictures = {path.name for path in tmp_path.glob("*.png")}
    assert pictures == {"step.png", "train_resnet18.png"}
    with tarfile.open(tmp_path / "logs.tar.gz") as archive:
        assert {"step.log", "step/step.json", "train_resnet18/train.md"} < set(archive.getnames())
