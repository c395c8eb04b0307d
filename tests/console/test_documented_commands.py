"""Every command in a document exists: in the command line, in the Makefile or in the repository."""

from __future__ import annotations

import argparse
import functools
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


@functools.cache
def options(command: str, role: str) -> frozenset[str]:
    """The options of a command, or of a part of it (`usage verify`); none if there is no such command."""
    argv = [command, role] if role else [command]
    parser, _ = cli.parser_of(argv)
    found = None
    while argv and (parts := [each for each in parser._actions if isinstance(each, argparse._SubParsersAction)]):
        if argv[0] not in parts[0].choices:
            break
        parser = found = parts[0].choices[argv.pop(0)]
    return frozenset(name for action in found._actions for name in action.option_strings) if found else frozenset()


def commands_in_sentences() -> list[tuple[str, str]]:
    """(document, command) of each `antefix ...` in prose and tables."""
    found = []
    for document in DOCUMENTS:
        prose = re.sub(r"^```.*?^```", "", document.read_text(), flags=re.MULTILINE | re.DOTALL)
        found += [(document.name, " ".join(each.split())) for each in re.findall(r"`antefix ([^`]+)`", prose)]
    return found


def test_commands_in_sentences_have_the_options_that_they_show() -> None:
    wrong = []
    for document, text in commands_in_sentences():
        first, *words = re.sub(r"[\[\]()]", " ", text).split()
        if not re.fullmatch(r"[a-z]+(?:[-|][a-z]+)*", first):
            continue
        role = words[0].partition("|")[0] if words and re.fullmatch(r"[a-z|-]+", words[0]) else ""
        known = options(first.partition("|")[0], role)
        used = {word for word in words if re.fullmatch(r"--[a-z][a-z0-9-]*", word)}
        if not known or used - known:
            wrong.append(f"{document}: antefix {text}")
    assert not wrong


def test_there_are_commands_to_check() -> None:
    assert len(commands("antefix")) > 60 and len(commands("make")) > 10 and len(commands_in_sentences()) > 150
