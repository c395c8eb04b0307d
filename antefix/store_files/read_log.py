"""A reader's own lines in the store's log: written as it reads, so that no process's end takes the evidence of a hit.

The writer of a store that keeps a log leaves the log's directory in USAGE_LOG next to the segments; readers on its host
append what they used to files of their own there. Readers elsewhere are logged by the service that serves them.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Final

from antefix.own_files import read_small
from antefix.private_file import open_private
from antefix.store_files.hit_log import StoreLog

USAGE_LOG_FILE: Final = "USAGE_LOG"
_PATH_BYTES_MAX: Final = 4096


def announce_log(store_directory: Path, log_directory: str) -> None:
    """Tell readers where the log is, or, without a directory, that there is none."""
    path = store_directory / USAGE_LOG_FILE
    if not log_directory:
        path.unlink(missing_ok=True)
        return
    # A directory's name is bytes, of which not all are text.
    text = os.fsencode(Path(log_directory).resolve()) + b"\n"
    with contextlib.suppress(OSError):
        if read_small(path, len(text)) == text:
            return  # also on a disk that has no room to say it again
    part = path.with_suffix(".part")
    with open_private(part, "w") as file:
        file.write(os.fsdecode(text))
    part.rename(path)


class ReadEvidence:
    """One reader's. Failing to write costs evidence, never an answer; the service is told of the use as well."""

    def __init__(self, store_directory: Path) -> None:
        self._log: StoreLog | None = None
        with contextlib.suppress(OSError):
            name = read_small(store_directory / USAGE_LOG_FILE, _PATH_BYTES_MAX).removesuffix(b"\n")
            self._log = StoreLog(Path(os.fsdecode(name)))

    def used(self, block_hash: bytes) -> None:
        """The last block of a path that was read."""
        if self._log is not None:
            with contextlib.suppress(OSError):
                self._log.read([block_hash])

    def close(self) -> None:
        if self._log is not None:
            self._log.close()
