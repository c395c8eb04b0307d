"""docs/ builds into a site without warnings, and no text of the documents is lost (`make test-docs`)."""

from __future__ import annotations

import html
import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import antefix

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="make test-docs installs mkdocs"),
    pytest.mark.services,
]


def build(root: Path, target: Path) -> subprocess.CompletedProcess[str]:
    call = [sys.executable, "-m", "mkdocs", "build", "--config-file", str(root / "mkdocs.yml")]
    return subprocess.run([*call, "--site-dir", str(target)], capture_output=True, text=True, check=False)


def built(page: Path, site: Path) -> Path:
    """The place of a document in the site. README.md is the index."""
    if page.parent == ROOT:
        return site / ("index.html" if page.name == "README.md" else page.with_suffix(".html").name)
    return site / page.relative_to(ROOT / "docs").with_suffix(".html")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("site")
    done = build(ROOT, target)
    assert done.returncode == 0, done.stderr
    return target


def prose(file: Path) -> str:
    """The text of a built page's article, without code."""
    text = file.read_text()
    article = text[text.index('<div role="main"') : text.index("<footer")]
    return re.sub(r"<pre>.*?</pre>|<code>.*?</code>", "", article, flags=re.DOTALL)


def test_each_document_is_a_page_with_all_its_headings(site: Path) -> None:
    for page in PAGES:
        text = re.sub(r"```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
        article = built(page, site).read_text()
        assert len(re.findall(r"^#{1,4} ", text, re.MULTILINE)) <= len(re.findall(r"<h[1-4] id=", article)), page.name


def test_tables_and_lists_are_not_shown_as_text(site: Path) -> None:
    for page in PAGES:
        article = prose(built(page, site))
        assert not re.search(r"^\|", article, re.MULTILINE), page.name
        assert not re.search(r"^(- |\d+\. )(?=\S)", article, re.MULTILINE), page.name


def test_every_link_leads_somewhere(site: Path) -> None:
    for file in site.rglob("*.html"):
        for target in re.findall(r'(?:href|src)="([^"#?]+)', file.read_text()):
            if not re.match(r"https?:|mailto:|data:", target) and file.name != "404.html":
                assert (file.parent / html.unescape(target)).exists(), f"{file.name}: {target}"


def test_the_site_asks_no_other_host(site: Path) -> None:
    for file in site.rglob("*.html"):
        assert not re.search(r'<(?:script|img|link)[^>]+(?:src|href)="(?:https?:)?//', file.read_text()), file.name


def test_the_api_reference_has_every_public_name(site: Path) -> None:
    reference = (site / "API.html").read_text()
    public = [name for name in antefix.__all__ if not name.startswith("_")]
    missing = [name for name in public if not re.search(rf"<code>(async )?{name}\b", reference)]
    assert not missing


def test_a_page_that_the_text_names_is_a_link(site: Path) -> None:
    assert '<a href="FORMAT.html">' in (site / "ARCHITECTURE.html").read_text()


@pytest.mark.parametrize("planted", ["[gone](GONE.md)", "[gone](FORMAT.md#no-such-heading)"])
def test_a_broken_link_fails_the_build(planted: str, tmp_path: Path) -> None:
    root = tmp_path / "repository"
    for name in ("docs", "examples", "benchmarks/results", "models/antefix-tiny/figures"):
        shutil.copytree(ROOT / name, root / name)
    for name in ("mkdocs.yml", "README.md", "CONTRIBUTING.md", "CHANGELOG.md"):
        shutil.copy(ROOT / name, root / name)
    with (root / "docs" / "STORES.md").open("a") as document:
        document.write(f"\n{planted}\n")
    done = build(root, tmp_path / "site")
    assert done.returncode != 0 and "STORES.md" in done.stderr
