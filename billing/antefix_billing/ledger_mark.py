"""How far a ledger was acknowledged: what a cut or rotten end is told by from one that was only torn.

A file of 64 bytes next to the segments, written over after each batch has been synced and before it is answered for. It
is not synced itself: it outlives the process, and after a power cut it may be older than the ledger's end, never newer.
So everything up to the mark was durable once. Where it is not there any more, something was lost.

    offset  size  mark
    0       4     magic "AFLM"
    4       4     crc-32 of bytes 8 to 64
    8       8     sequence of the last acknowledged entry
    16      8     first sequence of its segment
    24      8     where it ends there
    32      32    its hash
"""

from __future__ import annotations

import os
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

from antefix.own_files import put_aside, read_small

MARK_FILE: Final = "acknowledged"
_MAGIC: Final = b"AFLM"
_HEAD: Final = struct.Struct("<4sI")
_BODY: Final = struct.Struct("<QQQ32s")
MARK_BYTES: Final = _HEAD.size + _BODY.size


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """Of the last acknowledged entry: its number, its segment's first entry, where it ends there, its hash."""

    sequence: int
    segment: int
    end: int
    hash: bytes

    def pack(self) -> bytes:
        body = _BODY.pack(self.sequence, self.segment, self.end, self.hash)
        return _HEAD.pack(_MAGIC, zlib.crc32(body)) + body

    @classmethod
    def of(cls, directory: Path) -> Self | None:
        """None where there is none, as in ledgers of before there was one, or where it is damaged itself."""
        try:
            data = read_small(directory / MARK_FILE, MARK_BYTES)
        except FileNotFoundError:
            return None
        if len(data) != MARK_BYTES:
            return None
        magic, crc = _HEAD.unpack_from(data)
        if magic != _MAGIC or zlib.crc32(data[_HEAD.size :]) != crc:
            return None
        sequence, segment, end, hash = _BODY.unpack_from(data, _HEAD.size)
        return cls(sequence=sequence, segment=segment, end=end, hash=hash)


class MarkFile:
    """The writer's. Failing to write it costs nothing but that a later loss may not show."""

    def __init__(self, directory: Path) -> None:
        put_aside(directory / MARK_FILE)
        self._fd = os.open(directory / MARK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def write(self, mark: Mark) -> None:
        """Raises:  OSError."""
        os.pwrite(self._fd, mark.pack(), 0)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1
