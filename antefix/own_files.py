"""Opens Antefix's own files safely: anything but a regular file (or a directory, where expected) counts as missing.

After an accident or an attack, the name of such a file may belong to a FIFO (opening it waits for ever), an endless
device or a directory. A reader treats such a file as missing. The process that owns the directory renames the wrong
object and continues.
"""

from __future__ import annotations

import errno
import logging
import os
import secrets
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Final

log = logging.getLogger("antefix.files")

# The errors, besides ENOENT, of opening or reading something that is not a regular file.
_NO_FILE: Final = (errno.ELOOP, errno.ENXIO, errno.ENOTDIR, errno.EISDIR, errno.ENODEV)

# The end of a name that `put_aside` gives; random digits follow.
MISPLACED: Final = ".misplaced-"


def open_to_read(path: Path) -> int:
    """A descriptor of a regular file. Opening never blocks.

    Raises:  FileNotFoundError: there is no file, or not a regular one.  OSError: it cannot be opened.
    """
    try:
        # Without O_NONBLOCK, opening a FIFO waits for a writer. The flag has no effect on regular files.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as err:
        if err.errno in _NO_FILE:
            raise FileNotFoundError(errno.ENOENT, f"no regular file ({err.strerror})", str(path)) from err
        raise
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return descriptor
    os.close(descriptor)
    raise FileNotFoundError(errno.ENOENT, "no regular file", str(path))


def read_small(path: Path, nbytes_max: int) -> bytes:
    """The bytes of a file, at most the first `nbytes_max` + 1. A file longer than `nbytes_max` is not one of ours.

    Raises:  as `open_to_read`.
    """
    with os.fdopen(open_to_read(path), "rb") as file:
        return file.read(nbytes_max + 1)


def put_aside(path: Path, is_right: Callable[[int], bool] = stat.S_ISREG) -> bool:
    """Rename what is at `path` if it is not of the expected kind. Returns whether it was. Only the process that owns
    the directory may call this function.

    is_right: decides by the mode (as in `stat`, following links) whether the file is of the expected kind.
    """
    try:
        if is_right(path.stat().st_mode):
            return False
    except OSError:
        if not os.path.lexists(path):
            return False
    aside = path.with_name(f"{path.name}{MISPLACED}{secrets.token_hex(4)}")
    path.rename(aside)
    log.error("%s is not the kind of file that belongs at this path, and was renamed to %s", path, aside.name)
    return True
