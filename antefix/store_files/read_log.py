"""A reader's own lines in the store's log, written as it reads, so that the evidence of a hit survives any crash.

If the store keeps a log, its writer puts the log's directory into USAGE_LOG next to the segments. Readers on the same
host append the blocks that they used to their own files there. For readers on other hosts, the service writes the log.
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
    """Tell readers in which directory the log is. An empty directory means that there is no log."""
    path = store_directory / USAGE_LOG_FILE
    if not log_directory:
        path.unlink(missing_ok=True)
        return
    # A directory's name is bytes, which need not be valid text.
    text = os.fsencode(Path(log_directory).resolve()) + b"\n"
    with contextlib.suppress(OSError):
        if read_small(path, len(text)) == text:
            return  # nothing to write, which also works on a full disk
    part = path.with_suffix(".part")
    with open_private(part, "w") as file:
        file.write(os.fsdecode(text))
    part.rename(path)


class ReadEvidence:
    """The log lines of one reader. A log line that cannot be written loses evidence of a hit, but never fails a read.
    The service is also told that the records were used.
    """

    def __init__(self, store_directory: Path) -> None:
        self._log: StoreLog | None = None
        with contextlib.suppress(OSError):
            name = read_small(store_directory / USAGE_LOG_FILE, _PATH_BYTES_MAX).removesuffix(b"\n")
            self._log = StoreLog(Path(os.fsdecode(name)))

    def used(self, block_hash: bytes) -> None:
        """Log the last block of a prefix that was read."""
        if self._log is not None:
            with contextlib.suppress(OSError):
                self._log.read([block_hash])

    def close(self) -> None:
        if self._log is not None:
            self._log.close()
