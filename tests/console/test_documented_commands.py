"""Every command in a document exists: in the command line, in the Makefile or in the repository."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from antefix_console import cli

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
DOCUMENTS += sorted((ROOT / "examples").rglob("*.md"))
TARGETS = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
# Text after a command in a shell line, or `...`, which stands for the reader's own arguments.
END = re.compile(r"\s(?:#|\||>|&&|;|&(?=\s|$)|<<|2>).*$|\s\.\.\.$|\s\.\.\.(?=\s)")
FOLDERS = ("examples/", "deploy/", "docs/", "tests/", "benchmarks/", "models/")


def lines() -> Iterator[tuple[str, str]]:
    """(document, line) of each line of a shell block, with continued lines joined."""
    for document in DOCUMENTS:
        blocks = re.findall(r"^```(?:sh|bash|console|)\n(.*?)^```", document.read_text(), re.MULTILINE | re.DOTALL)
        for block in blocks:
            for line in block.replace("\\\n", " ").splitlines():
                yield document.name, line.strip().removeprefix("$ ")


def commands(program: str) -> list[tuple[str, str]]:
    found = []
    for document, line in lines():
        line = re.sub(r"^(?:[A-Z_]+=\S+ +)*(?:\S*/bin/)?", "", line)
        if line.startswith(f"{program} "):
            found.append((document, END.sub("", line).strip()))
    return found


@pytest.mark.parametrize(("document", "line"), commands("antefix"))
def test_the_command_line_takes_what_is_documented(document: str, line: str) -> None:
    # `a|b` means a choice of one, and brackets hold optional parts.
    text = re.sub(r"\[[^\]]*\]", "", re.sub(r"([\w-]+)(\|[\w-]+)+", r"\1", line))
    argv = shlex.split(text)[1:]
    parser, _ = cli.parser_of(argv)
    try:
        parser.parse_args(argv)
    except SystemExit as end:
        assert end.code == 0, f"{document}: {line}"


@pytest.mark.parametrize(("document", "line"), commands("make"))
def test_make_has_the_targets_that_are_documented(document: str, line: str) -> None:
    assert {word for word in line.split()[1:] if re.fullmatch(r"[a-z0-9-]+", word)} <= TARGETS


def test_programs_and_files_that_are_documented_are_there() -> None:
    missing = []
    for document, line in lines():
        for word in re.findall(r"(?<![\w./-])[\w./-]+", END.sub("", line)):
            if word.startswith(FOLDERS) and not (ROOT / word).exists() and "=" not in word:
                missing.append(f"{document}: {word}")
    assert not missing


def test_there_are_commands_to_check() -> None:
    assert len(commands("antefix")) > 60 and len(commands("make")) > 10
