"""docs/FAULTS.md: each fault has a promise and tests, and the named tests exist."""

import ast
import functools
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENT = (ROOT / "docs" / "FAULTS.md").read_text()
ROWS = [line.strip("| ").split(" | ") for line in DOCUMENT.splitlines() if line.startswith("| ")]
FAULTS = [row for row in ROWS if row[0] not in ("fault", "---")]
NAMED = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")


@functools.cache
def names_in(path):
    """The names of the tests in a file, with those of its classes."""
    tree = ast.parse((ROOT / path).read_text())
    return {node.name for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))}


@pytest.mark.parametrize("row", FAULTS, ids=lambda row: row[0][:60])
def test_each_fault_has_a_promise_and_tests_that_there_are(row):
    assert len(row) == 3 and row[0] and row[1], row
    named = NAMED.findall(row[2])
    # Nothing else is in the column, so a name in another form cannot hide from this test.
    assert named and NAMED.sub("", row[2]).strip(", ") == "", row[2]
    for path, name in named:
        assert (ROOT / path).is_file(), path
        assert name.startswith("test_") and name in names_in(path), f"{path}::{name}"


def test_the_tables_are_read_whole():
    assert len(FAULTS) > 60
    assert DOCUMENT.count("| fault | what happens | tests |") == DOCUMENT.count("\n## ") == 8


def test_a_test_that_is_gone_is_found():
    assert "test_nobody_wrote_this" not in names_in("tests/shared/test_faults_document.py")
    assert "test_the_tables_are_read_whole" in names_in("tests/shared/test_faults_document.py")
