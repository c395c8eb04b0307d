"""Gives LMDB a path to a directory of any name. LMDB's Python binding accepts only UTF-8 paths."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def lmdb_path(directory: Path) -> Iterator[str]:
    """A UTF-8 path to the directory, valid inside the `with` block, in which an environment is opened."""
    try:
        os.fspath(directory).encode()
    except UnicodeEncodeError:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            yield f"/proc/self/fd/{descriptor}"
        finally:
            os.close(descriptor)
    else:
        yield str(directory)
