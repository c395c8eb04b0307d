"""Finds figures in documents that no record backs: python docs/check_figures.py [--unrecorded]

A figure that was measured has a record: a file of benchmarks/results with commit, date, machine and command. A
reader finds the record's name next to the figure:

- In README.md and docs/*.md the paragraph, list item or table names a file of benchmarks/results, or a page of
  docs/results. The rule does not apply to figures that were not measured: settings, and sizes that a format implies.
- In docs/results/*.md the section names a file of benchmarks/results, or says "No record:" and how to measure again.
  Figures that cannot be measured again say what they are instead: "Published by others" (with a link), or "Single
  trials" of code that was not kept.

`make lint` runs it. `--unrecorded` lists the sections that say "No record:", whose figures must be measured again.
"""

from __future__ import annotations

import argparse
import itertools
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# A file name after --json or --out is a command's output and need not exist yet.
RECORD = re.compile(r"(?<!--json )(?<!--out )benchmarks/results/([\w./-]+\.\w+)")
NO_RECORD = "No record:"
OTHERS, TRIALS = "Published by others", "Single trials"
# A speed counts as measured; a time or a share counts only if its sentence says that it was measured.
_SPEED = r"\d ?(?:[KMGT]i?B/s|TFLOP/s|tokens/s|requests/s|records/s|(?:tokens|requests|records) per second)\b"
_AMOUNT = r"\d ?(?:us|ms|s|min|%|MB|GB|MiB|GiB|hours?|minutes|seconds|times)(?![\w/])"
_SAID = r"\b(?:took|medians?|p50|p99|ran at|as fast|processor time|measured (?:on|in|here))\b"
SPEED, AMOUNT, SAID = re.compile(_SPEED), re.compile(_AMOUNT), re.compile(_SAID)
_CODE = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)
_GENERATED = re.compile(r"<!-- figures: .*?<!-- end of figures -->", re.DOTALL)


def unbacked(path: Path) -> Iterator[tuple[int, str]]:
    """(line, beginning) of each statement with a figure that names no record."""
    text = _GENERATED.sub(_blank, _CODE.sub(_blank, path.read_text()))
    results = path.parent.name == "results"
    for line, piece, section in _sections(text, path.read_text()) if results else _statements(text):
        if _measured(re.sub(r"`[^`]*`", "", piece)) and not _backed(section, results):
            yield line, " ".join(piece.split())[:100]
    for name in RECORD.findall(text):
        if not (ROOT / "benchmarks" / "results" / name).exists():
            yield 1, f"benchmarks/results/{name} is not there"


def _measured(text: str) -> bool:
    return bool(SPEED.search(text) or (SAID.search(text) and AMOUNT.search(text)))


def unrecorded(path: Path) -> Iterator[str]:
    """The statements "No record: ..." on a page of results."""
    yield from (" ".join(found.split()) for found in re.findall(rf"{NO_RECORD}[^*]*", path.read_text()))


def _backed(text: str, results: bool) -> bool:
    if RECORD.search(text) or "<!-- figures:" in text or NO_RECORD in text:
        return True
    words = " ".join(text.split())
    if results and (TRIALS in words or (OTHERS in words and "https://" in words)):
        return True
    return not results and re.search(r"results/\w+\.md|PEERS\.md", text) is not None


def _blank(found: re.Match[str]) -> str:
    """Blank lines, as many as the found text had, so that line numbers stay the same."""
    return re.sub(r"[^\n]", "", found[0])


def _statements(text: str) -> Iterator[tuple[int, str, str]]:
    """(line, text, text in which the record must be named) of each paragraph, table or list item."""
    for found in re.finditer(r"(?:^(?!#)[^\n]*\S[^\n]*\n?)+", text, re.MULTILINE):
        line = text.count("\n", 0, found.start()) + 1
        for item in re.split(r"^(?=- |\d+\. )", found[0], flags=re.MULTILINE):
            yield line, item, item
            line += item.count("\n")


def _sections(text: str, whole: str) -> Iterator[tuple[int, str, str]]:
    """(line, text without code and generated tables, full text in which the record must be named) of each section."""
    starts = [0, *(found.start() for found in re.finditer(r"^#+ ", text, re.MULTILINE)), len(text)]
    lines = whole.split("\n")
    for start, end in itertools.pairwise(starts):
        first, last = text.count("\n", 0, start), text.count("\n", 0, end)
        yield first + 1, text[start:end], "\n".join(lines[first : last + (end == len(text))])


def documents() -> list[Path]:
    """README.md and docs/, without API.md (generated) and PEERS.md (which quotes figures of other projects)."""
    left_out = {"API.md", "PEERS.md"}
    return [ROOT / "README.md", *(path for path in sorted((ROOT / "docs").rglob("*.md")) if path.name not in left_out)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--unrecorded", action="store_true", help="list the figures in documents that have no result file"
    )
    args = parser.parse_args()
    if args.unrecorded:
        for path in documents():
            for told in unrecorded(path):
                print(f"{path.relative_to(ROOT)}: {told}")
        return 0
    found = [f"{path.relative_to(ROOT)}:{line}: {told}" for path in documents() for line, told in unbacked(path)]
    print("\n".join(found) if found else "every figure has a record, or says that it has none")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
