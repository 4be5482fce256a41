"""The documentation: every link has a target, and the code of docs/arithmetic.md runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/**/*.md")]
)


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def code_of(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", text_of(page), flags=re.MULTILINE | re.DOTALL)


def prose_of(page: Path) -> str:
    """Returns the text without blocks of code, whose brackets are not links."""
    return re.sub(r"^```.*?^```$", "", text_of(page), flags=re.MULTILINE | re.DOTALL)


def anchors_of(page: Path) -> set[str]:
    """Returns the anchors that GitHub gives to the headings."""
    headings = re.findall(r"^#+ (.+)$", prose_of(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


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


@pytest.mark.parametrize("name", ["arithmetic.md"])
def test_the_code_of_a_page_runs(name: str) -> None:
    blocks = code_of(ROOT / "docs" / name)
    assert blocks
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, f"docs/{name}", "exec"), names)


@pytest.mark.parametrize("name", ["arithmetic.md", "cuda_graphs.md", "how_it_works.md", "troubleshooting.md"])
def test_the_readme_links_to_a_page(name: str) -> None:
    assert f"](docs/{name})" in text_of(ROOT / "README.md")


def paths_in(page: Path) -> list[str]:
    """Returns the files and folders of this repository that a page names as code. A star matches anything."""
    words = re.findall(r"`([\w./*-]+)`", prose_of(page))
    roots = tuple(f"{folder.name}/" for folder in ROOT.iterdir() if folder.is_dir())
    return [word for word in words if word.startswith(roots) and "NAME" not in word]


@pytest.mark.parametrize(
    "name", ["CONTRIBUTING.md", "docs/arithmetic.md", "docs/cuda_graphs.md", "docs/how_it_works.md"]
)
def test_every_path_that_a_page_names_exists(name: str) -> None:
    paths = paths_in(ROOT / name)
    assert len(paths) > 3
    assert [path for path in paths if not list(ROOT.glob(path))] == []
