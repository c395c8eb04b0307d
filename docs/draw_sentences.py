"""Draws random sentences from our texts, to test whether a stranger can explain each one without its context.

    python docs/draw_sentences.py --seed 1 --number 60

The sentences come from documents, docstrings, help texts, and messages of errors and logs. Each output line has one
sentence, with its file and line. The same seed draws the same sentences from the same files. Tables, code, commands,
headings, generated pages and sentences of fewer than six words are left out. A colon does not end a sentence, because
the reader would see half of it. The draw takes the same number of each kind, so that docstrings do not outweigh errors.
"""

from __future__ import annotations

import argparse
import ast
import functools
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
KINDS = ("document", "docstring", "help", "message")
WORDS_MIN = 6
# Names of the logging methods whose first argument is a message.
_LOGS = {"debug", "info", "warning", "error", "exception", "critical"}
_BLOCK = re.compile(r"^ *```.*?^ *```|<!-- figures.*?end of figures -->|<!--.*?-->", re.DOTALL | re.MULTILINE)
_END = re.compile(r"(?<=[.!?])(?<!e\.g\.)(?<!i\.e\.)\s+(?=[A-Z`*\"'(])")
# A paragraph in which every line is indented by four spaces or more: code, a command or a formula.
_CODE = re.compile(r"(?: {4,}.*(?:\n|$))+")
# Lines of a docstring that are not prose: a legend of shapes, names of arguments in columns, an example.
_LEGEND = re.compile(r"^\s*(?:Shapes|Raises|Source|>>>|\||\$|[a-z_]+ {2,}\S)")


@dataclass(frozen=True)
class Sentence:
    """kind: one of KINDS.  place: file and line, from the repository's root."""

    kind: str
    place: str
    text: str


def sentences(root: Path = ROOT) -> list[Sentence]:
    """All sentences that can be drawn, in an order that depends only on the files."""
    documents = [root / "README.md", root / "CONTRIBUTING.md", *sorted((root / "docs").rglob("*.md"))]
    found = [s for path in documents if path.exists() and path.name != "API.md" for s in _of_document(path, root)]
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if not parts[0].startswith(".") and parts[0] not in {"tests", "build"} and "v1" not in parts:
            found += _of_code(path, root)
    return found


def draw(found: list[Sentence], seed: int, number: int) -> list[Sentence]:
    """Draw `number` sentences, equally many of each kind; fewer if a kind does not have enough."""
    rng = random.Random(seed)
    kinds = [kind for kind in KINDS if any(sentence.kind == kind for sentence in found)]
    drawn = []
    for index, kind in enumerate(kinds):
        ours = [sentence for sentence in found if sentence.kind == kind]
        share = number // len(kinds) + (index < number % len(kinds))
        drawn += rng.sample(ours, min(share, len(ours)))
    rng.shuffle(drawn)
    return drawn


def split(text: str) -> list[str]:
    """A paragraph's sentences, each as one line of text."""
    return [piece for piece in _END.split(" ".join(text.split())) if len(piece.split()) >= WORDS_MIN]


def _of_document(path: Path, root: Path) -> Iterator[Sentence]:
    # Blocks are blanked, not removed, so that lines keep their numbers.
    text = _BLOCK.sub(lambda block: re.sub(r"[^\n]", "", block[0]), path.read_text())
    for paragraph in re.finditer(r"(?:^(?!\s*$|\s*\||#|!\[|\*benchmarks).*\n?)+", text, re.MULTILINE):
        if _CODE.fullmatch(paragraph[0]):
            continue
        line = text.count("\n", 0, paragraph.start()) + 1
        for item in re.split(r"^\s*(?:[-*]|\d+\.) ", paragraph[0], flags=re.MULTILINE):
            yield from (Sentence("document", f"{path.relative_to(root)}:{line}", one) for one in split(item))


def _of_code(path: Path, root: Path) -> Iterator[Sentence]:
    place = path.relative_to(root)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            line = node.body[0].lineno if node.body else 1
            for paragraph in re.split(r"\n\s*\n", ast.get_docstring(node) or ""):
                if not _CODE.fullmatch(paragraph) and not any(_LEGEND.match(text) for text in paragraph.split("\n")):
                    yield from (Sentence("docstring", f"{place}:{line}", one) for one in split(paragraph))
        elif isinstance(node, ast.Call):
            yield from _of_call(node, place)


def _of_call(node: ast.Call, place: Path) -> Iterator[Sentence]:
    """The help of an argument, or the message of an error or of a log line."""
    name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    helps = [keyword.value for keyword in node.keywords if keyword.arg in {"help", "description"}]
    for value in helps:
        yield from (Sentence("help", f"{place}:{node.lineno}", one) for one in split(_text(value)))
    if name in _LOGS or name.endswith("Error") or name in _errors():
        for value in node.args[:1]:
            yield from (Sentence("message", f"{place}:{node.lineno}", one) for one in split(_text(value)))


@functools.cache
def _errors() -> set[str]:
    """Names of our own exceptions, some of which do not end in Error."""
    tree = ast.parse((ROOT / "antefix" / "errors.py").read_text())
    return {node.name for node in tree.body if isinstance(node, ast.ClassDef)}


def _text(node: ast.expr) -> str:
    """The text of a string expression; an f-string's value appears as its expression in braces."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part) if isinstance(part, ast.Constant) else _braced(part) for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _text(node.left) + _text(node.right)
    return ""


def _braced(node: ast.expr) -> str:
    return f"{{{ast.unparse(node.value)}}}" if isinstance(node, ast.FormattedValue) else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--number", type=int, default=60)
    parser.add_argument("--kind", choices=KINDS, help="draw only sentences of this kind")
    args = parser.parse_args()
    found = [sentence for sentence in sentences() if args.kind in (None, sentence.kind)]
    for number, sentence in enumerate(draw(found, args.seed, args.number), 1):
        print(f"{number}. [{sentence.kind}, {sentence.place}] {sentence.text}")


if __name__ == "__main__":
    main()
