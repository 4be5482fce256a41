"""The results of a build: the extension module, the record of the build, the report about both."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import fused_tricks
from fused_tricks import extension as extension_module
from fused_tricks.__main__ import collect, text_of
from fused_tricks.backends import cuda

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
PACKAGE = Path(fused_tricks.__file__).parent


@pytest.fixture
def extension() -> Path:
    """Returns the file of the extension module."""
    spec = importlib.util.find_spec("fused_tricks._extension")
    if spec is None:
        pytest.skip("the extension is not built")
    assert spec.origin is not None
    return Path(spec.origin)


@pytest.fixture
def symbols(extension):
    """Returns a function that lists the dynamic symbols of the module, for an option of nm."""
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
    """Returns the output of a new Python process: other tests may have registered backends in this one."""
    return subprocess.run(
        [sys.executable, *arguments], check=True, capture_output=True, text=True, cwd=ROOT
    ).stdout


def test_the_report_names_every_backend_and_why_one_is_not_usable():
    lines = [line.split(maxsplit=1) for line in python("-m", "fused_tricks").splitlines()]
    code = "import json; from fused_tricks.backends import availability; print(json.dumps(availability()))"
    for name, reason in json.loads(python("-c", code)).items():
        assert [name, "usable" if reason is None else f"not usable: {reason}"] in lines


def test_the_report_as_json_gives_every_backend_and_the_record_of_the_build():
    report = json.loads(python("-m", "fused_tricks", "--json"))
    code = "import json; from fused_tricks.backends import availability; print(json.dumps(availability()))"
    reasons = {name: backend["reason"] for name, backend in report["backends"].items()}
    assert reasons == json.loads(python("-c", code))
    assert all(backend["usable"] is (backend["reason"] is None) for backend in report["backends"].values())
    versions = {name: report["versions"][name] for name in ("fused_tricks", "torch", "python")}
    assert versions == {
        "fused_tricks": fused_tricks.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    record = PACKAGE / "_build_info.json"
    assert report["extension"]["build"] == (json.loads(record.read_text()) if record.exists() else None)


def test_the_report_as_json_says_what_the_report_for_a_reader_says():
    report = json.loads(python("-m", "fused_tricks", "--json"))
    assert list(text_of(report)) == python("-m", "fused_tricks").split("\n")[:-1]


def test_the_report_describes_gpus_and_names_one_that_torch_cannot_use(monkeypatch):
    def properties(index: int) -> SimpleNamespace:
        if index == 1:
            raise RuntimeError("CUDA error: device busy\nmore")
        return SimpleNamespace(name="A GPU", major=9, minor=0, total_memory=80 * 2**30)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    report = collect()
    assert report["processors"]["gpus"] == [
        {"name": "A GPU", "architecture": "9.0", "memory_bytes": 80 * 2**30},
        {"failure": "CUDA error: device busy"},
    ]
    lines = [line.strip() for line in text_of(report)]
    assert "GPU 0             A GPU, architecture 9.0, 80 GiB" in lines
    assert "GPU 1             torch cannot use it (CUDA error: device busy)" in lines


def test_the_package_says_that_it_is_typed():
    assert (PACKAGE / "py.typed").exists()


def test_the_requirements_of_a_build_are_the_same_with_and_without_isolation():
    tomllib = pytest.importorskip("tomllib", reason="tomllib came with Python 3.11")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["dependency-groups"]["build"] == project["build-system"]["requires"]


PIP = "pip install --force-reinstall --no-deps --no-cache-dir"


@pytest.fixture
def installed(monkeypatch, tmp_path) -> Path:
    """Returns the folder of an installed package, whose origin is not recorded."""
    package = tmp_path / "site" / "fused_tricks"
    package.mkdir(parents=True)
    monkeypatch.setattr(extension_module, "__file__", str(package / "extension.py"))
    monkeypatch.setattr(metadata, "distribution", lambda name: SimpleNamespace(read_text=lambda file: None))
    return package


@pytest.mark.parametrize(
    ("failure", "advice"),
    [
        ("no C++ compiler: CXX=cl is not a program", "install a C++ compiler, and"),
        ("FUSED_TRICKS_EXTENSION=0 was set", "without this variable,"),
        ("a header is missing", "fix this problem, and"),
    ],
)
def test_the_advice_about_a_missing_extension_fits_its_reason(installed, failure, advice):
    (installed / "_build_info.json").write_text(json.dumps({"extension_failure": failure}))
    command = f"run `{PIP} PATH`, where PATH is a checkout or the archive of the sources"
    assert extension_module._why_missing() == f"the extension was not built ({failure}); {advice} {command}"


def test_a_build_without_cuda_names_the_variable_that_left_it_out(installed, monkeypatch):
    monkeypatch.setattr(cuda, "missing_because", lambda: None)
    monkeypatch.setattr(cuda, "load_extension", SimpleNamespace)
    assert "install a CUDA toolkit, and run `pip" in cuda.unavailable_because()
    record = {"cuda_failure": "FUSED_TRICKS_CUDA=0 was set"}
    (installed / "_build_info.json").write_text(json.dumps(record))
    assert "(FUSED_TRICKS_CUDA=0 was set); without this variable, run `pip" in cuda.unavailable_because()


@pytest.mark.parametrize("folder", ["sources", "my sources"])
def test_an_installation_from_a_folder_is_compiled_from_this_folder(installed, monkeypatch, tmp_path, folder):
    (tmp_path / folder).mkdir()
    (tmp_path / folder / "setup.py").touch()
    record = json.dumps({"url": (tmp_path / folder).as_uri(), "dir_info": {}})
    monkeypatch.setattr(metadata, "distribution", lambda name: SimpleNamespace(read_text=lambda file: record))
    command = shlex.split(extension_module.reinstall().removeprefix("run `").removesuffix("`"))
    assert command == [*PIP.split(), str(tmp_path / folder)]
    shutil.rmtree(tmp_path / folder)
    assert "PATH is a checkout" in extension_module.reinstall()


@pytest.mark.parametrize("record", ["[]", "null", '{"url": null}', "{", '{"url": "git+https://a.b/c"}'])
def test_an_installation_of_unknown_origin_asks_for_the_sources(installed, monkeypatch, record):
    monkeypatch.setattr(metadata, "distribution", lambda name: SimpleNamespace(read_text=lambda file: record))
    assert "PATH is a checkout" in extension_module.reinstall()


def test_an_editable_installation_is_compiled_in_its_folder(installed):
    (installed.parent / "setup.py").touch()
    assert extension_module.reinstall() == f"run `{PIP} -e {installed.parent}`"


@pytest.fixture
def source(tmp_path) -> Path:
    """Returns a source tree without a build."""
    built = shutil.ignore_patterns("*.so", "*.pyd", "_build_info.json", "__pycache__")
    shutil.copytree(PACKAGE, tmp_path / "source" / "fused_tricks", ignore=built)
    (tmp_path / "source" / "csrc").mkdir()
    return tmp_path / "source"


def reported(folder: Path, path: Path | None = None) -> dict[str, str]:
    """Returns the rows that `python -m fused_tricks` prints in a folder, with another folder on Python's path."""
    output = subprocess.run(
        [sys.executable, "-m", "fused_tricks"],
        check=True, capture_output=True, text=True, cwd=folder,
        env={**os.environ, "PYTHONPATH": "" if path is None else str(path)},
    ).stdout  # fmt: skip
    return dict(line.split(maxsplit=1) for line in output.splitlines() if line.startswith("  "))


def test_a_source_tree_without_its_extension_says_so_and_names_the_way_out(source):
    rows = reported(source)
    for row in ("cpu", "cuda", "build"):
        assert f"Python runs the source tree {source}, in which nothing is built" in rows[row]
        assert f"pip install -e {source}" in rows[row] and "another folder" in rows[row]


def test_a_source_tree_names_the_installation_that_it_hides(source, tmp_path):
    shutil.copytree(PACKAGE, tmp_path / "site" / "fused_tricks")
    rows = reported(source, tmp_path / "site")
    assert (
        f"instead of the package installed in {tmp_path / 'site'}; run Python from another folder"
        in rows["cpu"]
    )
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    assert str(tmp_path / "site") in str(reported(elsewhere, tmp_path / "site"))


def test_a_source_tree_says_if_the_installation_that_it_hides_has_no_extension_either(source, tmp_path):
    (tmp_path / "site" / "fused_tricks").mkdir(parents=True)
    (tmp_path / "site" / "fused_tricks" / "__init__.py").touch()
    record = {"extension_failure": "FUSED_TRICKS_EXTENSION=0 was set"}
    (tmp_path / "site" / "fused_tricks" / "_build_info.json").write_text(json.dumps(record))
    row = reported(source, tmp_path / "site")["cpu"]
    assert "that package has no extension either (FUSED_TRICKS_EXTENSION=0 was set); pip install -e" in row


def test_an_extension_for_another_python_is_named(source):
    (source / "fused_tricks" / "_extension.cpython-39-x86_64-linux-gnu.so").touch()
    shutil.rmtree(source / "csrc")
    assert "built for another Python (_extension.cpython-39-x86_64-linux-gnu.so)" in reported(source)["cpu"]


def test_the_extension_of_another_tree_is_not_used(source, extension, tmp_path):
    """The finder of an editable installation offers the extension of its own tree."""
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(
        "import importlib.util, sys\n"
        "class Finder:\n"
        "    def find_spec(name, path=None, target=None):\n"
        f"        where = {str(extension)!r}\n"
        "        if name == 'fused_tricks._extension':\n"
        "            return importlib.util.spec_from_file_location(name, where)\n"
        "sys.meta_path.append(Finder)\n"
    )
    assert "nothing is built" in reported(source, site)["cpu"]


@pytest.mark.skipif(sys.version_info >= (3, 12), reason="no setuptools comes with this Python")
def test_setup_works_with_the_setuptools_that_comes_with_python(tmp_path):
    """Python 3.10 and 3.11 have setuptools 65.5, which refuses today's licence field and requires the package wheel."""
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    interpreter = tmp_path / "venv" / "bin" / "python"
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy2(ROOT / name, source)
    shutil.copytree(PACKAGE, source / "fused_tricks", ignore=shutil.ignore_patterns("*.so"))

    def setup(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [str(interpreter), "setup.py", "--quiet", *arguments]
        return subprocess.run(command, cwd=source, capture_output=True, text=True)

    assert setup("--name", "--version", "--license").stdout.split() == [
        "fused_tricks",
        fused_tricks.__version__,
        "MIT",
    ]
    refused = setup("bdist_wheel")
    assert refused.returncode != 0
    assert "needs another package to make wheels: pip install wheel" in refused.stderr
