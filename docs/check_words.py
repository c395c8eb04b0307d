"""Refuses words that make a native reader stumble, in documents, comments, docstrings and texts that a user sees.

    python docs/check_words.py

`make lint` runs it. Code itself is not checked: a variable may have any name. WORDS has a replacement for
each word.
"""

from __future__ import annotations

import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
SUFFIXES = (".md", ".py", ".proto", ".toml", ".yaml")
# From Python 3.12 on, the text of an f-string is a separate token.
TEXT_TOKENS = (tokenize.COMMENT, tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", tokenize.STRING))
WORDS = {
    r"beside": "next to",
    r"anew": "again",
    r"whoever": "anyone who, or the reader, the caller, ...",
    r"whosoever|whomever": "anyone",
    r"hence|thence|whence": "so, therefore",
    r"there(by|in|of|upon|to)|where(by|in|of|upon)|here(in|by|of|to)": "by this, in it, ...",
    r"thus": "so",
    r"albeit|lest|ere|nought|naught|amongst|whilst|upon": "the plain word",
    r"forenoon|overmuch|oftentimes|meantimes": "the plain word",
    r"hangs? on": "depend on",
    r"(go|goes|going|gone|went) on": "continue",
    r"hitherto|heretofore|henceforth|hereafter|thereafter|forthwith|afresh|unto|insofar|inasmuch": "the plain word",
    r"aforesaid|aforementioned|notwithstanding|whatsoever|howsoever|thrice|twofold|betwixt|amidst": "the plain word",
    r"hand(s|ed|ing)? on": "pass on",
    r"(go|goes|went) round": "take turns, repeat, ...",
    r"in clear": "without TLS, unencrypted",
    r"for want of": "because there is no",
    r"in lieu|save for|ought to|shall|comes of": "instead, except, must, ...",
}
# Units that are counted, and what they are counted per: "8 bytes per token", not "8 bytes a token".
_COUNTED = (
    r"tokens|requests|bytes|blocks|records|steps|operations|rows|entries|keys|prompts|cycles|launches|calls|numbers|experts"
    r"|descriptors|evictions|checkpoints|floats|bits|nats|marks|outputs|histories|[KMGT]?i?B|us|ms"
)
_BY = (
    r"second|minute|hour|day|token|request|prompt|step|layer|block|row|sequence|call|round|process|worker|card|rank|byte"
    r"|[KMG]iB"
)
# In "how many bytes a token takes" the second noun is the subject of a verb, so "a" is right.
_VERB = r"takes|has|stands|may|or|says|holds|needs|is|was|further|reads|writes|had|costs|does|runs|of|can|must|will"
PER = re.compile(rf"\b({_COUNTED}) an? ({_BY})\b(?! ({_VERB})\b)", re.IGNORECASE)
STUMBLING = [(re.compile(rf"\b({word})\b", re.IGNORECASE), better) for word, better in WORDS.items()]


def files() -> list[Path]:
    """All files to check: our own, without generated texts, recorded texts and this file."""
    found = [path for path in ROOT.iterdir() if path.suffix in SUFFIXES or path.name == "Makefile"]
    for folder in sorted(path for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith(".")):
        found += [path for path in sorted(folder.rglob("*")) if path.suffix in SUFFIXES]
    left_out = {ROOT / "docs" / "API.md", Path(__file__), ROOT / "tests" / "shared" / "test_words.py"}
    return [path for path in found if path not in left_out and not {"v1", "recorded"} & set(path.parts)]


def texts(file: Path) -> Iterator[tuple[int, str]]:
    """(line number, text) of all text for readers: comments and strings of a Python file, every line of other files."""
    if file.suffix != ".py":
        yield from enumerate(file.read_text().split("\n"), 1)
        return
    if not any(complaints(file.read_text())):
        return  # reading a file's tokens takes a hundred times as long
    with file.open("rb") as source:
        for token in tokenize.tokenize(source.readline):
            if token.type in (tokenize.COMMENT, tokenize.STRING) or token.type == getattr(
                tokenize, "FSTRING_MIDDLE", -1
            ):
                yield from enumerate(token.string.split("\n"), token.start[0])


def complaints(text: str) -> Iterator[str]:
    for pattern, better in STUMBLING:
        if found := pattern.search(text):
            yield f'"{found[0]}": {better}'
    if found := PER.search(text):
        yield f'"{found[0]}": per'


def main() -> int:
    found = [
        f"{file.relative_to(ROOT)}:{number}: {complaint}"
        for file in files()
        for number, text in texts(file)
        for complaint in complaints(text)
    ]
    print("\n".join(found) if found else "no stumbling words")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
