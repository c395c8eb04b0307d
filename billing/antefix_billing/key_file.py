"""The list of API keys as a file. One process at a time writes the file, which is replaced as a whole; only its owner
may read it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from antefix.checked_files import JSON_BYTES_MAX, read_bytes
from antefix.errors import ConfigError
from antefix.private_file import FILE_MODE, refuse_writable, write_private
from antefix_billing.api_keys import KeyBook, from_json, to_json

_WHAT = "file of API keys"


def read_book(path: str | Path) -> KeyBook:
    """Read the book of keys. Raises: ConfigError: the file cannot be read, others may change it, or it is not a list of
    keys.
    """
    refuse_writable(path, _WHAT)
    try:
        return from_json(read_bytes(path, JSON_BYTES_MAX))
    except (OSError, ConfigError) as err:
        raise ConfigError(f"{_WHAT} {path}: {err}") from err


def create_book(path: str | Path) -> KeyBook:
    """Create a file with an empty list of keys if no file exists. If the file exists, its list of keys is returned."""
    if not Path(path).exists():
        write_private(path, to_json(KeyBook()))
    return read_book(path)


@contextlib.contextmanager
def changing(path: str | Path) -> Iterator[None]:
    """A lock that is held while the list of keys is changed. The lock is a file next to the book, because the book's
    own file is replaced.

    Raises:  ConfigError: the directory cannot be written.
    """
    lock = Path(f"{path}.lock")
    try:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, FILE_MODE)
    except OSError as err:
        raise ConfigError(f"{_WHAT} {path}: {err}") from err
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def write_book(path: str | Path, book: KeyBook) -> None:
    """Write the book of keys.  Raises:  ConfigError: the file cannot be written."""
    try:
        write_private(path, to_json(book))
    except OSError as err:
        raise ConfigError(f"{_WHAT} {path}: {err}") from err
