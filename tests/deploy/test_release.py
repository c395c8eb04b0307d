"""A release is a commit whose changelog says what is in it."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

from antefix.version import __version__

ROOT = Path(__file__).parents[2]
changes_of = runpy.run_path(str(ROOT / "deploy" / "release.py"))["changes_of"]
LOG = "# Changelog\n\n## 0.2.0 (2026-12-01)\n\n### Added\n\n- Much.\n\n## 0.1.0\n\n- First.\n"


def test_a_versions_part_is_found() -> None:
    assert changes_of("0.2.0", LOG) == "### Added\n\n- Much.\n"
    assert changes_of("0.1.0", LOG) == "- First.\n"


@pytest.mark.parametrize(
    ("version", "log", "message"),
    [
        ("0.3.0", LOG, "no part for 0.3.0"),
        ("0.2", LOG, "no part for 0.2:"),
        ("0.2.0", LOG.replace("2026-12-01", "unreleased"), "unreleased"),
        ("0.1.0", LOG.replace("- First.\n", ""), "says nothing"),
    ],
)
def test_what_is_not_ready_is_refused(version: str, log: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        changes_of(version, log)


def test_a_rehearsal_takes_what_is_not_released_yet() -> None:
    assert "Much" in changes_of("0.2.0", LOG.replace("2026-12-01", "unreleased"), allow_unreleased=True)


def test_the_version_is_the_one_that_the_changelog_is_at() -> None:
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest is not None
    assert newest[1] == __version__
    assert f"Version {__version__.rpartition('.')[0]}." in (ROOT / "README.md").read_text()
