"""The mark: a small file that names the last acknowledged entry of the ledger.

The mark distinguishes a ledger that lost acknowledged entries at its end from one whose last write was merely
incomplete. The mark has 64 bytes and lies next to the segments. The mark is overwritten after each batch has been
synced and before the batch is acknowledged. The mark itself is not synced: it survives the end of the process, and
after a power cut it may be older than the ledger's end but never newer. So everything up to the mark was on disk once.
If any entry up to the mark is missing, data was lost.

    offset  size  mark
    0       4     magic "AFLM"
    4       4     crc-32 of bytes 8 to 64
    8       8     sequence of the last acknowledged entry
    16      8     first sequence of the segment that holds this entry
    24      8     offset in the segment at which this entry ends
    32      32    the entry's hash
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
    """The last acknowledged entry: its number, the first entry of its segment, the offset at which it ends there, and
    its hash.
    """

    sequence: int
    segment: int
    end: int
    hash: bytes

    def pack(self) -> bytes:
        body = _BODY.pack(self.sequence, self.segment, self.end, self.hash)
        return _HEAD.pack(_MAGIC, zlib.crc32(body)) + body

    @classmethod
    def of(cls, directory: Path) -> Self | None:
        """Read the mark. Returns None if there is no mark (ledgers of early versions have none) or if the mark is
        damaged.
        """
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
    """The writer's side of the mark. If writing the mark fails, the only cost is that a later loss of entries may go
    unnoticed.
    """

    def __init__(self, directory: Path) -> None:
        put_aside(directory / MARK_FILE)
        self._fd = os.open(directory / MARK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def write(self, mark: Mark) -> None:
        """Overwrite the mark.  Raises:  OSError."""
        os.pwrite(self._fd, mark.pack(), 0)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1
