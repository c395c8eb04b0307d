"""The store's own log of blocks that were written and read, separate from the ledger so that the two can be compared.

Per call one line, or several for thousands of blocks: `time_us kind hash[,hash...]`, kind "stored" or "read", hashes
in hex. A read names the last block that was used; using a block uses all blocks before it. Log files rotate by size,
and a file's name is the time of its first line. Log lines are passed to the operating system, but not synced to disk. A
line lost in a power cut leaves a real hit without evidence; it never gives evidence for a false hit.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import IO

from antefix.own_files import open_to_read
from antefix.private_file import open_private

log = logging.getLogger("antefix_billing")

FILE_BYTES = 64 << 20
# A file without new lines for this long gets no more lines, so a tool that compacts it may replace it.
QUIET_S = 7200.0
_BEGINS_NEW_AFTER_S = 3600.0
_HASHES_PER_LINE_MAX = 1 << 14
# Far more than a line that is written here. Older versions wrote one line per call, of any length.
_LINE_BYTES_MAX = 16 << 20
# The digits of a 64-bit number of microseconds since 1970.
_DIGITS_MAX = 20
_KINDS = ("stored", "read")


class StoreEventKind(StrEnum):
    STORED = "stored"
    READ = "read"


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreEvent:
    """One block in one line of the log. time_us: Unix time in microseconds.  hash: the block's hash in hex."""

    time_us: int
    kind: StoreEventKind
    hash: str


class StoreLog:
    """Writes the log, in the one process that writes the store. Methods of the log may be called from any thread.

    A log line that cannot be written is lost. A lost line costs the evidence of a hit, but no read or write of the
    store fails.
    """

    def __init__(self, directory: Path, *, file_bytes: int = FILE_BYTES) -> None:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._directory = directory
        self._file_bytes = file_bytes
        self._file: IO[str] | None = None
        self._num_bytes = 0
        self._written_at = 0.0
        self.num_lost = 0
        self._mutex = threading.Lock()

    def stored(self, hashes: Sequence[bytes]) -> None:
        """Log that these blocks are durable now."""
        self._write(StoreEventKind.STORED, hashes)

    def read(self, hashes: Sequence[bytes]) -> None:
        """Log that these blocks were sent to a client, or read from the files by a reader on this host."""
        self._write(StoreEventKind.READ, hashes)

    def close(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            with contextlib.suppress(OSError):
                file.close()

    def _write(self, kind: StoreEventKind, hashes: Sequence[bytes]) -> None:
        if not hashes:
            return
        with self._mutex:
            now_us = time.time_ns() // 1000
            names = [name.hex() for name in hashes]
            firsts = range(0, len(names), _HASHES_PER_LINE_MAX)
            parts = [",".join(names[first : first + _HASHES_PER_LINE_MAX]) for first in firsts]
            lines = [f"{now_us} {kind.value} {part}\n" for part in parts]
            try:
                self._append("".join(lines), now_us)
            except OSError as err:
                self.close()
                if not self.num_lost:
                    log.warning("the store's log cannot be written, so evidence of cache hits is lost: %s", err)
                self.num_lost += 1

    def _append(self, lines: str, now_us: int) -> None:
        now_s = time.monotonic()
        is_old = now_s - self._written_at > _BEGINS_NEW_AFTER_S
        self._written_at = now_s
        if self._file is not None and os.fstat(self._file.fileno()).st_nlink == 0:
            log.warning("the store's log in %s was deleted, so evidence of earlier cache hits is lost", self._directory)
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.close()
        if self._file is None or is_old or self._num_bytes >= self._file_bytes:
            self.close()
            self._file = open_private(self._directory / f"store-{now_us:017d}.log", "a")
            self._num_bytes = 0
        self._file.write(lines)
        self._num_bytes += len(lines)


def read_store_log(directory: Path) -> Iterator[StoreEvent]:
    """All events, oldest file first. A log line that is incomplete (the end of a file after a crash) is skipped."""
    for events in read_store_log_files(directory):
        yield from events


def read_store_log_files(directory: Path) -> Iterator[Iterator[StoreEvent]]:
    """For each log file, its events in the order of its lines. One process wrote each file."""
    for path in log_files(directory):
        yield read_log_file(path)


def log_files(directory: Path) -> list[Path]:
    """The log's files, oldest first."""
    return sorted(directory.glob("store-*.log"))


def read_log_file(path: Path) -> Iterator[StoreEvent]:
    """The events of one file, in the order of its lines.

    Raises:  FileNotFoundError: the file is gone, or something else has its name.
    """
    # A damaged disk may return any bytes, so skip every line that does not parse. One without an end, as in a file with
    # a hole, would take all memory, so what is too long is skipped in parts.
    with os.fdopen(open_to_read(path), "rb") as file:
        is_begin = True
        while part := file.readline(_LINE_BYTES_MAX):
            is_end = part.endswith(b"\n")
            if is_begin and is_end:
                yield from _parse(part.decode("ascii", errors="replace"))
            is_begin = is_end


def _parse(line: str) -> Iterator[StoreEvent]:
    parts = line.split()
    if not line.endswith("\n") or len(parts) != 3 or parts[1] not in _KINDS:
        return
    if not parts[0].isdecimal() or len(parts[0]) > _DIGITS_MAX:
        return
    for name in parts[2].split(","):
        yield StoreEvent(time_us=int(parts[0]), kind=StoreEventKind(parts[1]), hash=name)
