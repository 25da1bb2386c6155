"""Makes pages and files of the site of what docs/ links to outside itself, so that one link serves both places.

reads: the pages, and the files of the repository that they link to. writes: nothing. A linked Markdown file (or one in
the nav) becomes a page at its path in the repository, any other file is copied to there. Called by MkDocs (mkdocs.yml).
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[1]
LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)#\s]+)")


def repo_path(uri: str) -> str:
    """Where a file of the site lies in the repository; pages of docs/ are at the top of the site."""
    return f"docs/{uri}" if (REPO / "docs" / uri).exists() else uri


def site_path(path: str) -> str:
    """Where a file of the repository lies in the site."""
    return path.removeprefix("docs/")


def targets(path: str) -> list[str]:
    """Files of the repository that the Markdown file `path` links to, by their path in it."""
    text = (REPO / path).read_text(encoding="utf-8")
    found = {posixpath.normpath(posixpath.join(posixpath.dirname(path), link)) for link in LINK.findall(text)}
    return sorted(p for p in found if (REPO / p).is_file())


def on_files(files: Any, config: Any) -> Any:
    """Adds what the nav and the pages need of the rest of the repository, and what those files link to in turn."""
    from mkdocs.structure.files import File

    todo = [f"docs/{f.src_uri}" for f in files.documentation_pages()]
    todo += [uri for uri in re.findall(r"[\w/.-]+\.md", str(config.nav)) if not (REPO / "docs" / uri).exists()]
    seen: set[str] = set()
    while todo:
        path = todo.pop()
        if path in seen:
            continue
        seen.add(path)
        if files.get_file_from_path(site_path(path)) is None:
            files.append(File.generated(config, site_path(path), abs_src_path=str(REPO / path)))
        todo += targets(path) if path.endswith(".md") else []
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """The page with its links as they are in the site."""
    here = repo_path(page.file.src_uri)

    def as_in_site(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(here), match[1]))
        if not (REPO / target).is_file():
            return match[1]
        return posixpath.relpath(site_path(target), posixpath.dirname(page.file.src_uri) or ".")

    return LINK.sub(as_in_site, markdown)
