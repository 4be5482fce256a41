"""MkDocs hooks: the site contains pages from outside `docs/`, and links are the relative ones that GitHub follows."""

from __future__ import annotations

import os
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
RESULTS = [
    path.relative_to(ROOT).as_posix()
    for path in sorted(ROOT.glob("benchmarks/results/**/*"))
    if path.suffix in (".md", ".png")
]
# The places on the site of files outside docs/.
OUTSIDE = {
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "benchmarks/README.md": "benchmarks/method.md",
    **{name: name for name in RESULTS},
}
# The text of a link may contain a picture.
LINK = re.compile(r"(!?\[(?:[^\[\]]|!?\[[^\[\]]*\]\([^()\s]*\))*\])\(([^()\s]+)\)")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Adds the changelog to the navigation if there is one."""
    if (ROOT / "CHANGELOG.md").exists():
        (project,) = (part["Project"] for part in config.nav or [] if "Project" in part)
        project.append({"Changelog": "changelog.md"})
    return config


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Adds the pages and pictures from outside `docs/`."""
    for source, place in OUTSIDE.items():
        if (ROOT / source).exists():
            files.append(File.generated(config, place, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rewrites each relative link for the site."""
    here = page.file.src_uri
    source = next((name for name, place in OUTSIDE.items() if place == here), f"docs/{here}")

    def rewritten(link: re.Match[str]) -> str:
        text, target = link.groups()
        path, hash_sign, anchor = target.partition("#")
        if not path or re.match(r"\w+:", target):
            return link[0]
        name = os.path.normpath(os.path.join(os.path.dirname(source), path)).replace(os.sep, "/")
        place = site_path(name)
        if files.get_file_from_path(place):
            return f"{text}({os.path.relpath(place, os.path.dirname(here) or '.')}{hash_sign}{anchor})"
        if not (ROOT / name).exists():
            return link[0]
        return f"{text}({config.repo_url.rstrip('/')}/blob/main/{name})" if config.repo_url else plain(text)

    method = os.path.relpath("benchmarks/README.md", os.path.dirname(source))
    markdown = re.sub(
        r"^benchmarks/README\.md(?= says)", rf"[Method]({method})", markdown, flags=re.MULTILINE
    )
    # GitHub ignores the second word of a block, and the site shows it as a title.
    markdown = re.sub(r"^```python (\w+)$", r'```python title="\1"', markdown, flags=re.MULTILINE)
    parts = re.split(r"(^```.*?^```$)", markdown, flags=re.MULTILINE | re.DOTALL)
    markdown = "".join(part if part.startswith("```") else LINK.sub(rewritten, part) for part in parts)
    # A picture is small on a narrow screen, and its link opens it alone.
    return re.sub(r"^(!\[.*\])\(([^()\s]+)\)$", r"[\1(\2)](\2)", markdown, flags=re.MULTILINE)


def site_path(name: str) -> str:
    """Returns the place on the site of a file of the repository."""
    if name == "README.md":
        return "index.md"
    return OUTSIDE.get(name, name.removeprefix("docs/"))


def plain(text: str) -> str:
    """Returns the text of a link without its brackets, as code if it is a path."""
    words = text.removeprefix("[").removesuffix("]")
    return f"`{words}`" if re.fullmatch(r"[\w./-]+", words) else words


def on_post_page(output: str, *, page: Page, config: MkDocsConfig) -> str:
    """Raises an error if a page loads a file from another server.

    Raises:
        PluginError: The page loads such a file.
    """
    loaded = re.findall(r'<(?:script|img|iframe|source)\b[^>]*\bsrc="?(https?:[^">\s]+)', output)
    loaded += re.findall(
        r'<link\b[^>]*\brel="?(?:stylesheet|preconnect)"?[^>]*\bhref="?(https?:[^">\s]+)', output
    )
    if loaded:
        raise PluginError(f"{page.file.src_uri} loads {', '.join(loaded)}; keep a copy in docs/")
    # Beside the link to the repository, Material would show numbers that it loads from GitHub.
    return output.replace('data-md-component="source"', "")
