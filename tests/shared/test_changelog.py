"""CHANGELOG.md keeps to Keep a Changelog: known kinds of changes, and one line per entry."""

from __future__ import annotations

import re
from pathlib import Path

TEXT = (Path(__file__).resolve().parents[2] / "CHANGELOG.md").read_text()
KINDS = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


def test_each_entry_is_one_line_of_a_known_kind():
    lines = TEXT[TEXT.index("\n## ") :].split("\n")
    assert {line[4:] for line in lines if line.startswith("### ")} <= KINDS
    wrong = [line for line in lines if line and not re.match(r"#{2,4} \S|- \S.{0,150}$", line)]
    assert not wrong, "one line of at most 150 characters per entry; details belong in docs/"


def test_versions_are_newest_first():
    versions = [tuple(map(int, found)) for found in re.findall(r"^## (\d+)\.(\d+)\.(\d+) \(", TEXT, re.MULTILINE)]
    assert versions == sorted(versions, reverse=True) and versions
