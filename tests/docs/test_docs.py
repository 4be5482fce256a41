"""The documentation: every link has a target, the code of pages runs, and the reference has every public name."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import fused_tricks as ft
from support.networks import Network

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *ROOT.glob("docs/**/*.md"),
        *ROOT.glob("benchmarks/**/*.md"),
    ]
)
# Their code runs as it stands, block after block.
COMPLETE = [
    "arithmetic",
    "index",
    "linear_scaling",
    "low_precision",
    "no_bias_decay",
    "schedule",
    "tricks",
    "zero_gamma",
]


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def code_of(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", text_of(page), flags=re.MULTILINE | re.DOTALL)


def prose_of(page: Path) -> str:
    """Returns the text without blocks of code, whose brackets are not links."""
    return re.sub(r"^```.*?^```$", "", text_of(page), flags=re.MULTILINE | re.DOTALL)


def references_of(page: Path) -> list[str]:
    """Returns the names whose docstrings the site has on a page."""
    return re.findall(r"^::: (\S+)$", prose_of(page), flags=re.MULTILINE)


def anchors_of(page: Path) -> set[str]:
    """Returns the anchors that GitHub gives to the headings, and those of the reference."""
    headings = re.findall(r"^#+ (.+)$", prose_of(page), flags=re.MULTILINE)
    anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    return anchors | set(references_of(page))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_link_leads_to_a_file_and_a_heading(page: Path) -> None:
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", prose_of(page)):
        path, _, anchor = link.partition("#")
        if re.match(r"\w+:", link):
            continue
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors_of(target)):
            broken.append(link)
    assert broken == []


def run(name: str, names: dict[str, Any]) -> None:
    """Runs the code of a page, and checks that it has some."""
    blocks = code_of(ROOT / "docs" / name)
    assert blocks
    for block in blocks:
        exec(compile(block, f"docs/{name}", "exec"), names)


@pytest.mark.parametrize("name", COMPLETE)
def test_the_code_of_a_page_runs_as_it_stands(name: str) -> None:
    run(f"{name}.md", {})


def test_the_code_of_the_readme_runs_as_it_stands() -> None:
    pytest.importorskip("torchvision", reason="the example of the README is a network of torchvision")
    names: dict[str, Any] = {}
    run("../README.md", names)
    assert names["optimizer"].stats().applied_steps == 10


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    """The default process group, of one process."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_the_code_of_the_guide_trains_a_network(
    one_process: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    generator = torch.Generator().manual_seed(0)
    loader = [
        (torch.randn(4, 6, generator=generator), torch.randint(3, (4,), generator=generator))
        for _ in range(8)
    ]
    names = {
        "copy": copy,
        "torch": torch,
        "ft": ft,
        "Network": Network,
        "model": nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)),
        "pretrained": nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)),
        "criterion": nn.functional.cross_entropy,
        "loader": loader,
        "images": loader[0][0],
        "labels": loader[0][1],
        "device": "cpu",
    }
    run("guide.md", names)
    assert names["scaler"].get_scale() > 0
    assert (tmp_path / "checkpoint.pt").exists()


def test_the_reference_has_every_public_name_once() -> None:
    found = [name for page in ROOT.glob("docs/reference/*.md") for name in references_of(page)]
    assert sorted(found) == sorted(f"fused_tricks.{name}" for name in ft.__all__)


def test_the_table_of_the_reference_links_to_every_public_name() -> None:
    links = re.findall(
        r"\[`(\w+)`\]\(\w+\.md#fused_tricks\.(\w+)\)", text_of(ROOT / "docs/reference/index.md")
    )
    assert sorted(links) == sorted((name, name) for name in ft.__all__)


@pytest.mark.parametrize("page", sorted(ROOT.glob("docs/**/*.md")), ids=name_of)
def test_the_navigation_of_the_site_has_every_page(page: Path) -> None:
    assert page.relative_to(ROOT / "docs").as_posix() in re.findall(
        r"[\w/]+\.md", text_of(ROOT / "mkdocs.yml")
    )


@pytest.mark.parametrize("picture", sorted(ROOT.glob("docs/*.svg")), ids=name_of)
def test_a_picture_has_its_script_and_a_page(picture: Path) -> None:
    assert picture.with_suffix(".py").exists()
    assert any(f"({picture.name})" in text_of(page) for page in ROOT.glob("docs/*.md"))


@pytest.mark.parametrize("name", ["arithmetic.md", "cuda_graphs.md", "how_it_works.md", "troubleshooting.md"])
def test_the_readme_links_to_a_page(name: str) -> None:
    assert f"](docs/{name})" in text_of(ROOT / "README.md")


def paths_in(page: Path) -> list[str]:
    """Returns the files and folders of this repository that a page names as code. A star matches anything."""
    words = re.findall(r"`([\w./*-]+)`", prose_of(page))
    roots = tuple(
        f"{folder.name}/" for folder in ROOT.iterdir() if folder.is_dir() and folder.name != "build"
    )
    return [word for word in words if word.startswith(roots) and "NAME" not in word]


@pytest.mark.parametrize("page", [ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/**/*.md"))], ids=name_of)
def test_every_path_that_a_page_names_exists(page: Path) -> None:
    assert [path for path in paths_in(page) if not list(ROOT.glob(path))] == []


def test_the_paths_that_a_page_names_are_found() -> None:
    assert len(paths_in(ROOT / "CONTRIBUTING.md")) > 30
