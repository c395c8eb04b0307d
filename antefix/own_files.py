"""Files of ours under names of ours, taken for what they must be: regular files and directories.

After an accident or an attack such a name may lead to something else: a FIFO, whose opening waits for ever, a device
that has no end, a directory. For a reader that is a file that is not there; the owner puts it aside and continues.
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

# What opening or reading such a name says, besides that nothing is there.
_NO_FILE: Final = (errno.ELOOP, errno.ENXIO, errno.ENOTDIR, errno.EISDIR, errno.ENODEV)


def open_to_read(path: Path) -> int:
    """A descriptor of a regular file; opening never waits.

    Raises:  FileNotFoundError: nothing is there, or something else.  OSError: it cannot be opened.
    """
    try:
        # Without O_NONBLOCK a FIFO's opening waits for a writer; to a regular file it means nothing.
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
    """All of a file, or its first `nbytes_max` + 1 bytes: one that is longer is not what was written.

    Raises:  as `open_to_read`.
    """
    with os.fdopen(open_to_read(path), "rb") as file:
        return file.read(nbytes_max + 1)


def put_aside(path: Path, is_right: Callable[[int], bool] = stat.S_ISREG) -> bool:
    """For a directory's owner: rename what lies there and is of another kind. Returns whether there was such a thing.

    is_right: of a mode, as in `stat`; links are followed.
    """
    try:
        if is_right(path.stat().st_mode):
            return False
    except OSError:
        if not os.path.lexists(path):
            return False
    aside = path.with_name(f"{path.name}.misplaced-{secrets.token_hex(4)}")
    path.rename(aside)
    log.error("%s is not of the kind that belongs there, and was renamed to %s", path, aside.name)
    return True
