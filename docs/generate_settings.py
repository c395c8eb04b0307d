"""Fills the tables of settings in docs/ from the commands' own help: python docs/generate_settings.py [--check]

A document asks for a table with two comments, and this script writes the table between them:

    <!-- settings: serve router --store-events --store-events-bytes; serve decode --advertise -->
    <!-- end of settings -->

Each part names a command and its flags; `...` after the flags stands for all later flags of the command. Words and
defaults are those of `--help`, so a document never differs from the command. `make lint` runs it with `--check`, which
changes nothing and exits with 1 if a document would change.
"""

from __future__ import annotations

import argparse
import functools
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from antefix_console.cli import parser_of

ROOT = Path(__file__).resolve().parents[1]
_REGION = re.compile(r"(<!-- settings: ([^>]+?) -->\n).*?(<!-- end of settings -->)", re.DOTALL)
# The help of a setting ends with its unit and its default: "how often [s] (default: 60.0)".
_HELP = re.compile(r"(?P<text>.*?)(?: \[(?P<unit>\w+)\])?(?: \(default:? (?P<default>.*)\))?", re.DOTALL)
_POWERS = ((1 << 40, "TiB"), (1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB"))


def filled(text: str) -> str:
    """The document with its tables of settings written again.

    Raises:  KeyError: it names a command or a flag that does not exist.
    """
    return _REGION.sub(lambda found: f"{found[1]}{_table(found[2])}{found[3]}", text)


def _table(asked: str) -> str:
    parts = [part.split() for part in asked.split(";")]
    rows = [row for part in parts for row in _rows(part)]
    return "\n".join(["| setting | what it does | default |", "| --- | --- | --- |", *rows, ""])


def _rows(part: list[str]) -> Iterator[str]:
    names = [word for word in part if not word.startswith(("--", "..."))]
    flags = [word for word in part if word.startswith("--")]
    actions = _actions(" ".join(names))
    chosen = [actions[flag] for flag in flags]
    if part[-1] == "...":
        listed = list(actions.values())
        chosen += listed[listed.index(chosen[-1]) + 1 :]
    for action in chosen:
        yield _row(action)


@functools.cache
def _actions(command: str) -> dict[str, argparse.Action]:
    """The command's flags in the order of its help, without --help."""
    parser, _ = parser_of(command.split())
    for name in command.split():
        (choices,) = (action.choices for action in parser._actions if isinstance(action, argparse._SubParsersAction))
        parser = choices[name]
    return {action.option_strings[-1]: action for action in parser._actions if action.option_strings[-1] != "--help"}


def _row(action: argparse.Action) -> str:
    told = _HELP.fullmatch((action.help or "").replace("%%", "%"))
    assert told is not None
    value = _value(action)
    default = _default(told["default"], told["unit"]) if told["default"] else "" if value else "off"
    cells = (f"`{action.option_strings[-1]}{value}`", told["text"], default)
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _value(action: argparse.Action) -> str:
    """The placeholder of the flag's value, as in the help, after a space; empty for a flag without a value."""
    if action.nargs == 0:
        return ""
    name = action.metavar or (f"{{{','.join(map(str, action.choices))}}}" if action.choices else action.dest.upper())
    assert isinstance(name, str)
    return f" {name}"


def _default(text: str, unit: str | None) -> str:
    """The default with its unit: 67108864 bytes are 64 MiB, and 60.0 s are 60 s."""
    if not re.fullmatch(r"[0-9.]+", text):
        return text
    number = float(text)
    if unit == "bytes" and number:
        size, name = next((each for each in _POWERS if number % each[0] == 0), (1, "bytes"))
        return f"{number / size:,.0f} {name}"
    shown = f"{number:,.15g}"
    return shown if unit is None or not number else f"{shown} {unit}"


def documents() -> list[Path]:
    """All documents that may contain tables of settings."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--check", action="store_true", help="write nothing; the exit status is 1 if a document would change"
    )
    args = parser.parse_args()
    changed = [path for path in documents() if filled(path.read_text()) != path.read_text()]
    for path in changed:
        print(f"{path.relative_to(ROOT)}: {'differs from the help of its commands' if args.check else 'written'}")
        if not args.check:
            path.write_text(filled(path.read_text()))
    return 1 if args.check and changed else 0


if __name__ == "__main__":
    sys.exit(main())
