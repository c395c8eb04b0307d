"""Adapts the documents for `mkdocs build` (mkdocs.yml). The documents are written for readers of the repository, so
these hooks:

- add README.md, CONTRIBUTING.md and CHANGELOG.md, which lie outside docs/, as pages, with README.md as the first page;
- copy every other file outside docs/ that a page links to, and replace a link to a folder with the folder's name;
- turn the name of a page in the text, as in "docs/FORMAT.md has the layout", into a link.
"""

from __future__ import annotations

import os
import re
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
OUTSIDE = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")
# Text and target of a link or an image; the target includes its anchor.
_LINK = re.compile(r"\[([^\]]*)\]\((?!https?://|#|mailto:)([^)\s]+)\)")
_CODE = re.compile(r"(```.*?^```|`[^`\n]+`|<!--.*?-->)", re.DOTALL | re.MULTILINE)
_NAMED = re.compile(r"(?<![\w/\[(.-])(?:docs/)?((?:results/)?[A-Za-z_]+\.md)\b(?![\])])")


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages that lie outside docs/, and the files that pages link to."""
    for name in OUTSIDE:
        files.append(File.generated(config, name, content=(ROOT / name).read_text()))
    for page in [*OUTSIDE, *(str(path.relative_to(DOCS)) for path in sorted(DOCS.rglob("*.md")))]:
        for target in sorted(set(_outside_targets(page))):
            if files.get_file_from_path(target) is None:
                files.append(File.generated(config, target, abs_src_path=str(ROOT / target)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """The page's Markdown, with links changed for the site."""
    source = page.file.src_uri
    linked = _LINK.sub(lambda found: _site_link(source, found[1], found[2]), markdown)
    pieces = _CODE.split(linked)
    pages = {file.src_uri for file in files.documentation_pages()}
    pieces[::2] = (_NAMED.sub(lambda found: _page_link(source, found, pages), piece) for piece in pieces[::2])
    return "".join(pieces)


def _in_repository(source: str, target: str) -> Path:
    """The file or folder in the repository that a document's link points to."""
    folder = ROOT if source in OUTSIDE else (DOCS / source).parent
    return Path(os.path.normpath(folder / target.split("#")[0]))


def _place(path: Path) -> str:
    """Where a file of the repository lies in the site's sources, whose root is docs/."""
    return str(PurePosixPath(path.relative_to(DOCS if path.is_relative_to(DOCS) else ROOT)))


def _outside_targets(source: str) -> list[str]:
    text = ((ROOT if source in OUTSIDE else DOCS) / source).read_text()
    paths = (_in_repository(source, target) for _, target in _LINK.findall(_CODE.sub("", text)))
    return [_place(path) for path in paths if path.is_file() and not path.is_relative_to(DOCS)]


def _site_link(source: str, text: str, target: str) -> str:
    path = _in_repository(source, target)
    if path.is_dir():
        return text
    anchor = f"#{target.split('#')[1]}" if "#" in target else ""
    return f"[{text}]({_relative(source, _place(path))}{anchor})"


def _page_link(source: str, found: re.Match[str], pages: set[str]) -> str:
    for target in (found[1], str(PurePosixPath(source).parent / found[1])):
        if target in pages and target != source:
            return f"[{found[0]}]({_relative(source, target)})"
    return found[0]


def _relative(source: str, target: str) -> str:
    return os.path.relpath(target, start=str(PurePosixPath(source).parent))
