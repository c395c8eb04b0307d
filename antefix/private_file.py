"""Files with secrets: written for their owner only, replaced as a whole, and refused where others may read them.

A file's group may read it. So secrets can be given to a service that does not run as the file's owner.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Final

from antefix.checked_files import read_bytes
from antefix.errors import ConfigError

FILE_MODE: Final = 0o600
DIRECTORY_MODE: Final = 0o700
# Far more than any file of current and older keys has.
_BYTES_MAX: Final = 1 << 20
_OTHERS: Final = 0o007
_WRITERS: Final = 0o022


def read_private(path: str | Path, what: str) -> str:
    """The text of a file that holds a secret. what: the setting or the kind of file, for the error message.

    Raises:  ConfigError: it cannot be read, is not text, or everybody on the host may read or change it.
    """
    path = Path(path)
    try:
        if path.stat().st_mode & _OTHERS:
            raise ConfigError(f"{what} {path} is open to every user of this host: chmod 600 {path}")
        return read_bytes(path, _BYTES_MAX).decode()
    except (OSError, UnicodeDecodeError) as err:
        raise ConfigError(f"{what} {path}: {err}") from err


def refuse_writable(path: str | Path, what: str) -> None:
    """Check a file that defines permissions: anyone who can write such a file can grant himself access.

    Raises:  ConfigError: someone other than its owner may change the file, or it does not exist.
    """
    try:
        if Path(path).stat().st_mode & _WRITERS:
            raise ConfigError(f"{what} {path} can be changed by other users than its owner: chmod go-w {path}")
    except OSError as err:
        raise ConfigError(f"{what} {path}: {err}") from err


def open_private(path: str | Path, mode: str) -> IO[str]:
    """Open a file to write, with mode "w" or "a", line-buffered. A file that is created here can be opened only by its
    owner.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | (os.O_APPEND if mode == "a" else os.O_TRUNC)
    return os.fdopen(os.open(path, flags, FILE_MODE), mode, buffering=1, encoding="utf-8", errors="surrogateescape")


def write_private(path: str | Path, text: str) -> None:
    """Replace the file atomically and durably: a reader sees either the old text or the new one.

    Raises:  OSError: the error names the file, which still has its old text.
    """
    with _drafted(Path(path), text) as draft:
        draft.replace(path)


def create_private(path: str | Path, text: str) -> bool:
    """Create the file atomically and durably. Returns whether it was created; an existing file stays as it is.

    Raises:  OSError: the error names the file, which was not created.
    """
    path = Path(path)
    if path.exists():
        return False
    with _drafted(path, text) as draft:
        try:
            # Unlike a rename, a link never replaces a file that another process has just made.
            os.link(draft, path)
        except FileExistsError:
            return False
        finally:
            draft.unlink()
    return True


@contextlib.contextmanager
def _drafted(path: Path, text: str) -> Iterator[Path]:
    """A synced temporary file with this text in the directory of `path`, to be renamed or linked to `path`."""
    draft = path.with_name(f".{path.name}.{secrets.token_hex(6)}")
    try:
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, FILE_MODE)
        with os.fdopen(descriptor, "w", encoding="utf-8", errors="surrogateescape") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        yield draft
    except OSError as err:
        draft.unlink(missing_ok=True)
        # The error of a full disk does not name the file.
        raise OSError(err.errno, err.strerror, str(path)) from err
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
