"""A hook of mkdocs: pages of the site that lie outside of docs/, and links to them. README.md is the front page.

A link is resolved in the repository, as on a page of it, and then points to where the site has that file.
"""

from __future__ import annotations

import posixpath
import re
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FRONT = "README.md"
LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)#\s]+)")
"""The path of a relative link: what stands in `](path#anchor)`."""
ROOT_PAGES = (FRONT, "spec.md", "AGENTS.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")


def site_path(path: str) -> str:
    """Where the site has a file of the repository."""
    return "index.md" if path == FRONT else path.removeprefix("docs/")


def in_repository(page: str) -> str:
    """The file of the repository that a page of the site is made of."""
    if page == "index.md":
        return FRONT
    return page if page in ROOT_PAGES or not (ROOT / "docs" / page).exists() else f"docs/{page}"


def targets(path: str) -> set[str]:
    """Files of the repository that a Markdown file of it links to."""
    text = (ROOT / path).read_text(encoding="utf-8")
    return {resolved(path, link) for link in LINK.findall(text)}


def resolved(path: str, link: str) -> str:
    return posixpath.normpath(posixpath.join(posixpath.dirname(path), link))


def on_files(files: Any, *, config: Any) -> Any:
    """Adds the pages of the root, and every file outside of docs/ that a page links to."""
    known = [*ROOT_PAGES, *(f"docs/{file.src_uri}" for file in files.documentation_pages())]
    linked = set().union(*map(targets, known))
    outside = {path for path in linked if not path.startswith("docs/") and (ROOT / path).is_file()}
    file = import_module("mkdocs.structure.files").File
    for path in sorted({*ROOT_PAGES, *outside}):
        files.append(file.generated(config, site_path(path), content=(ROOT / path).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    here, folder = in_repository(page.file.src_uri), posixpath.dirname(page.file.src_uri)
    return LINK.sub(lambda link: posixpath.relpath(site_path(resolved(here, link[1])), folder or "."), markdown)
