"""How a directory of any name is told to LMDB, whose binding takes only names that are UTF-8."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def lmdb_path(directory: Path) -> Iterator[str]:
    """A path to the directory, good for as long as an environment is being opened."""
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
