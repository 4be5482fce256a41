"""The wheel without compiled code: built without a compiler, installed in a new environment, and used there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]

TRAIN = """
import torch
import fused_tricks as ft

def train(backend):
    params = [torch.nn.Parameter(torch.full((40,), 1.0, dtype=torch.float16)) for _ in range(2)]
    optimizer = ft.FusedSGD(params, lr=0.1, momentum=0.9, loss_scale="dynamic", backend=backend)
    for step in range(3):
        for param in params:
            param.grad = torch.linspace(-3.0, 7.0, 40).half()
        params[1].grad[39] = float("inf") if step == 1 else 1.0
        optimizer.step()
    return torch.cat([param.detach() for param in params]).tolist(), optimizer.stats()

print(ft.__file__)
print(train("triton") == train("reference"))
print(train("auto")[1].applied_steps)
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """Returns a clone with the uncommitted changes of tracked files."""
    folder = tmp_path_factory.mktemp("source") / "clone"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(folder)], check=True)
    changes = subprocess.run(
        ["git", "diff", "--binary", "HEAD"], cwd=ROOT, check=True, capture_output=True
    ).stdout
    if changes:
        subprocess.run(["git", "apply"], cwd=folder, input=changes, check=True)
    return folder


def build(source: Path, folder: Path, **variables: str) -> Path:
    """Returns a wheel, built without network access and without a compiler on the path."""
    environment = {**os.environ, "PATH": str(Path(sys.executable).parent), "PIP_NO_INDEX": "1", **variables}
    environment.pop("FUSED_TRICKS_REQUIRE_EXTENSION", None)
    command = ["pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps", "--wheel-dir", str(folder)]
    subprocess.run([sys.executable, "-m", *command, str(source)], check=True, env=environment)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory) -> Path:
    return build(source, tmp_path_factory.mktemp("wheel"), FUSED_TRICKS_EXTENSION="0")


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory):
    """Returns a function that runs the Python of a new environment, with the wheel and this environment's packages."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    executable = folder / "bin" / "python"
    site_packages = folder / "lib" / f"python{sysconfig.get_python_version()}" / "site-packages"
    install = ["-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site_packages), str(wheel)]
    subprocess.run([sys.executable, *install], check=True)
    (site_packages / "borrowed.pth").write_text(sysconfig.get_path("purelib"))

    def run(*arguments: str, **environment: str) -> list[str]:
        result = subprocess.run(
            [str(executable), *arguments],
            cwd=folder,
            env={"PATH": os.environ["PATH"], **environment},
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0, result.stderr
        return result.stdout.splitlines()

    return run


def test_it_is_for_every_platform(wheel) -> None:
    assert wheel.name.endswith("-py3-none-any.whl")


def test_a_wheel_whose_extension_cannot_be_compiled_is_for_every_platform_too(source, tmp_path) -> None:
    built = build(source, tmp_path, CXX="no_such_compiler")
    assert built.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(built) as files:
        info = json.loads(files.read("fused_tricks/_build_info.json"))
    assert "no_such_compiler" in info["extension_failure"]


def test_the_source_distribution_is_complete_and_builds_the_same_wheel(source, wheel, tmp_path) -> None:
    subprocess.run(
        [sys.executable, "setup.py", "--quiet", "sdist", "--dist-dir", str(tmp_path)], cwd=source, check=True
    )
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as files:
        packed = {name.partition("/")[2] for name in files.getnames()}
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=source, check=True, capture_output=True, text=True
    ).stdout
    assert {name for name in tracked.splitlines() if not name.startswith(".")} <= packed
    rebuilt = build(archive, tmp_path, FUSED_TRICKS_EXTENSION="0")
    with zipfile.ZipFile(wheel) as ours, zipfile.ZipFile(rebuilt) as theirs:
        assert sorted(ours.namelist()) == sorted(theirs.namelist())


def test_it_states_its_licence_and_has_it(wheel) -> None:
    with zipfile.ZipFile(wheel) as files:
        names = [name.rpartition("/")[2] for name in files.namelist()]
        (metadata,) = [
            files.read(name).decode() for name in files.namelist() if name.endswith(".dist-info/METADATA")
        ]
    assert "LICENSE" in names
    assert "\nLicense-Expression: MIT\n" in metadata


def test_it_says_that_it_is_typed(wheel) -> None:
    with zipfile.ZipFile(wheel) as files:
        assert "fused_tricks/py.typed" in files.namelist()
        assert "fused_tricks/_extension.pyi" in files.namelist()


def test_its_report_says_why_nothing_is_compiled(python) -> None:
    rows = dict(line.split(maxsplit=1) for line in python("-m", "fused_tricks") if line.startswith("  "))
    assert "FUSED_TRICKS_EXTENSION=0" in rows["cpu"]
    assert "FUSED_TRICKS_EXTENSION=0" in rows["cuda"]
    assert rows["reference"] == "usable"


def test_it_trains_with_triton_as_with_the_reference(python) -> None:
    pytest.importorskip("triton")
    file, equal, applied = python("-c", TRAIN, TRITON_INTERPRET="1")
    assert str(ROOT) not in file
    assert (equal, applied) == ("True", "2")


def test_its_kernels_are_compiled_without_a_gpu_or_a_toolkit(python) -> None:
    pytest.importorskip("triton")
    code = (
        "from triton.backends.compiler import GPUTarget\n"
        "from fused_tricks.backends.triton.launch import compile_for, pair_bits, update_source\n"
        "source = update_source(pair_bits([(0, 0), (2, 2)]), 1, True)\n"
        "print(len(compile_for(source, GPUTarget('cuda', 90, 32)).asm['cubin']) > 0)"
    )
    assert python(
        "-c", code, TRITON_INTERPRET="0", PATH="/nonexistent", HOME=os.environ.get("HOME", "/tmp")
    ) == ["True"]
