"""Hooks of mkdocs for this repository: pages may link to files outside of docs/, which become part of the site.

A link such as ``../examples/tiny_vlm/README.md`` works in a repository viewer as it stands. For the site, each linked file is
added under its path in the repository, and the link is rewritten to it; a link to a file that is not there fails the build.
"""

from __future__ import annotations

import logging
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r"(\]\()([^)\s#]+)((?:#[^)\s]*)?\))")
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
ROLE = re.compile(r":(?:func|class|meth|mod|data|attr|exc):(<code[^>]*>)~?")  # Sphinx's markup in docstrings
log = logging.getLogger("mkdocs.hooks.repository")


def target(page: str, link: str) -> str | None:
    """The path in the repository that a relative link of a page names, if it leaves docs/."""
    if "://" in link or link.startswith(("/", "mailto:")):
        return None
    found = posixpath.normpath(posixpath.join(posixpath.dirname(page), link))
    return None if found.startswith("docs/") else found


def links(page: str, text: str) -> set[str]:
    """The files outside of docs/ that a page of the repository links to."""
    found = (target(page, match[2]) for match in LINK.finditer(FENCE.sub("", text)))
    return {x for x in found if x is not None}


def on_files(files: Files, config: Any) -> Files:
    """Add every linked file of the repository, and those that the added pages link to."""
    todo = [f"docs/{file.src_uri}" for file in files if file.is_documentation_page()]
    seen: set[str] = set()
    while todo:
        page = todo.pop()
        for path in sorted(links(page, (ROOT / page).read_text()) - seen):
            seen.add(path)
            if path.startswith("..") or not (ROOT / path).is_file():
                log.warning("%s links to %s, which is not a file of this repository", page, path)
                continue
            files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
            if path.endswith(".md"):
                todo.append(path)
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Rewrite links so that they reach the added files, whose pages lie as if the repository were docs/."""
    here = page.file.src_uri
    added = page.file.generated_by is not None
    source = here if added else f"docs/{here}"

    def rewritten(match: re.Match[str]) -> str:
        path = target(source, match[2])
        if path is None:
            if not added or "://" in match[2]:
                return match[0]
            path = posixpath.normpath(posixpath.join(posixpath.dirname(source), match[2])).removeprefix("docs/")
        return f"{match[1]}{posixpath.relpath(path, posixpath.dirname(here) or '.')}{match[3]}"

    parts = re.split(f"({FENCE.pattern})", markdown, flags=FENCE.flags)
    return "".join(part if part.startswith("```") else LINK.sub(rewritten, part) for part in parts)


def on_page_content(html: str, page: Any, config: Any, files: Files) -> str:
    """Show the roles of docstrings, such as ``:func:`name```, as plain code."""
    return ROLE.sub(r"\1", html)
