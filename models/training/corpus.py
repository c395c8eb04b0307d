"""Build and read the training text: the source and the reference documentation of a CPython standard library.

    python -m models.training.corpus OUT_DIRECTORY [--stdlib DIRECTORY]

writes `train.xz` and `valid.xz`: documents, each a NUL byte, its path, a newline and its text. Files go to the
validation half by a hash of their path, so that the split does not depend on order or machine. Licence of the text:
Python Software Foundation License 2.0.
"""

from __future__ import annotations

import argparse
import hashlib
import lzma
import runpy
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Tokens = NDArray[np.uint16]

BOS = 256
# Mapping tables and bundled packages teach a model of text nothing, or carry other licences.
SKIPPED = ("site-packages", "_bundled", "encodings", "__pycache__", "lib2to3", "config-3", "pydoc_data", "cjkencodings")
SUFFIXES = (".py", ".txt", ".rst")
# Larger files are generated tables; smaller ones hold no text to speak of.
FILE_BYTES_MAX = 300_000
FILE_BYTES_MIN = 200
VALID_PERCENT = 4


def documents(stdlib: Path) -> Iterator[tuple[str, str]]:
    """(path, text) of every document, in path order, the reference documentation last."""
    for path in sorted(stdlib.rglob("*")):
        name = path.relative_to(stdlib).as_posix()
        if path.suffix not in SUFFIXES or any(part in name for part in SKIPPED) or not path.is_file():
            continue
        if FILE_BYTES_MIN <= path.stat().st_size <= FILE_BYTES_MAX and (text := _read_text(path)):
            yield name, text
    # The language reference and the tutorial-like topics ship as a dict of plain text.
    topics: dict[str, str] = runpy.run_path(str(stdlib / "pydoc_data" / "topics.py"))["topics"]
    for topic, text in sorted(topics.items()):
        yield f"reference/{topic}.txt", text


def _read_text(path: Path) -> str | None:
    """The text of a file, or None if the file is not UTF-8 or contains a NUL, which separates documents."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return None
    return None if "\0" in text else text


def is_validation(name: str) -> bool:
    """Whether a document is held out of the training text."""
    return hashlib.blake2b(name.encode(), digest_size=2).digest()[0] * 100 // 256 < VALID_PERCENT


def build(stdlib: Path, out: Path) -> dict[str, int]:
    """Write both halves of the text; returns their sizes in bytes."""
    halves: dict[str, list[bytes]] = {"train": [], "valid": []}
    for name, text in documents(stdlib):
        halves["valid" if is_validation(name) else "train"].append(f"\0{name}\n{text}".encode())
    out.mkdir(parents=True, exist_ok=True)
    for half, parts in halves.items():
        (out / f"{half}.xz").write_bytes(lzma.compress(b"".join(parts), preset=6))
    return {half: sum(map(len, parts)) for half, parts in halves.items()}


def load(path: Path) -> Tokens:
    """One half as tokens [N] uint16: bytes, with `<|bos|>` where a document starts."""
    tokens = np.frombuffer(lzma.decompress(path.read_bytes()), dtype=np.uint8).astype(np.uint16)
    tokens[tokens == 0] = BOS
    return tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--stdlib", type=Path, default=Path(sysconfig.get_paths()["stdlib"]))
    arguments = parser.parse_args()
    for half, nbytes in build(arguments.stdlib, arguments.out).items():
        print(f"{half}: {nbytes} bytes of text")


if __name__ == "__main__":
    main()
