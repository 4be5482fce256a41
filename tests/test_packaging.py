"""What a build leaves behind: the extension module, the record of the build, the report about both."""

from __future__ import annotations

import importlib
import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import fused_tricks
from fused_tricks import extension as extension_module

ROOT = Path(__file__).parent.parent
PACKAGE = Path(fused_tricks.__file__).parent


@pytest.fixture
def extension() -> Path:
    """The file of the extension module."""
    spec = importlib.util.find_spec("fused_tricks._extension")
    if spec is None:
        pytest.skip("the extension is not built")
    assert spec.origin is not None
    return Path(spec.origin)


@pytest.fixture
def symbols(extension):
    """Lists the dynamic symbols of the module, as nm does with an option."""
    nm = shutil.which("nm")
    if nm is None or sys.platform != "linux":
        pytest.skip("needs nm on Linux")

    def of(option: str) -> list[str]:
        output = subprocess.run(
            [nm, "-D", option, str(extension)], check=True, capture_output=True, text=True
        ).stdout
        return [line.split()[-1].partition("@")[0] for line in output.splitlines()]

    return of


def test_the_extension_needs_nothing_of_torchs_cpp_interface(symbols):
    undefined = symbols("--undefined-only")
    assert any(name.startswith("Py") for name in undefined)
    assert [
        name for name in undefined if any(part in name for part in ("2at", "3c10", "5torch", "aoti_torch"))
    ] == []


def test_the_extension_carries_its_cuda_runtime_and_shows_nothing_of_it(symbols):
    every = symbols("--undefined-only") + symbols("--defined-only")
    assert "PyInit__extension" in every
    assert [name for name in every if name.startswith(("cuda", "__cuda"))] == []


def test_the_extension_is_of_the_version_of_the_package(extension):
    module = importlib.import_module("fused_tricks._extension")
    assert module.__version__ == fused_tricks.__version__


def test_a_build_leaves_a_record_that_agrees_with_what_it_made(extension):
    info = json.loads((PACKAGE / "_build_info.json").read_text())
    assert info["version"] == fused_tricks.__version__
    assert info["extension_failure"] is None
    has_cuda = hasattr(importlib.import_module("fused_tricks._extension"), "CudaStep")
    assert (info["cuda"] is not None, info["cuda_failure"] is None) == (has_cuda, has_cuda)


def python(*arguments: str) -> str:
    """What a new Python prints: other tests may have registered backends in this one."""
    return subprocess.run(
        [sys.executable, *arguments], check=True, capture_output=True, text=True, cwd=ROOT
    ).stdout


def test_the_report_names_every_backend_and_why_one_is_not_usable():
    lines = [line.split(maxsplit=1) for line in python("-m", "fused_tricks").splitlines()]
    code = "import json; from fused_tricks.backends import availability; print(json.dumps(availability()))"
    for name, reason in json.loads(python("-c", code)).items():
        assert [name, "usable" if reason is None else f"not usable: {reason}"] in lines


def test_the_package_says_that_it_is_typed():
    assert (PACKAGE / "py.typed").exists()


def test_the_requirements_of_a_build_are_the_same_with_and_without_isolation():
    tomllib = pytest.importorskip("tomllib", reason="tomllib came with Python 3.11")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["dependency-groups"]["build"] == project["build-system"]["requires"]


@pytest.mark.parametrize(
    ("failure", "advice"),
    [
        ("no C++ compiler was found", "install a C++ compiler and reinstall fused_tricks"),
        ("FUSED_TRICKS_EXTENSION=0 was set", "reinstall fused_tricks without it"),
    ],
)
def test_the_advice_about_a_missing_extension_fits_its_reason(monkeypatch, tmp_path, failure, advice):
    (tmp_path / "_build_info.json").write_text(json.dumps({"extension_failure": failure}))
    monkeypatch.setattr(extension_module, "__file__", str(tmp_path / "extension.py"))
    assert extension_module._why_not_built() == f"the extension was not built ({failure}); {advice}"
