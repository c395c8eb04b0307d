"""Turns payloads that were looked up together into messages. This module knows the reader of segments and the wire
format, but never gRPC.

Plain records are sent as they are in their segments; the store only copies them, and the caller verifies them. All
other payloads are verified here: compressed or encrypted ones, those larger than a message, those that a caller
requests from the middle, and those that a caller found damaged.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Final

from antefix.store.payload_wire import BlankMessage, records_head
from antefix.store.pieces import PIECE_BYTES, OutgoingPieces
from antefix.store_files.read_runs import runs_of
from antefix.store_files.segment_reader import Located, ReadOutcome, StoreReader

# Bytes read at once if they are in the page cache: few enough to be still in the core's own cache when they are sent.
_CACHED_BYTES: Final = 1 << 20
# Bytes read at once by a thread: enough for a disk that does not have them in the page cache.
_COLD_BYTES: Final = 4 << 20


def can_go_plain(located: Located, record_format: int) -> bool:
    """Whether a caller that knows records up to version `record_format` can verify all of these records, each of which
    must fit one message.
    """
    return all(
        want.plain and want.version <= record_format and want.entry.extent_bytes <= PIECE_BYTES
        for want in located.wanted
    )


@dataclass(slots=True)
class _Stretch:
    """Records that follow each other in a segment, and the header of their message."""

    head: bytes
    segment: int
    offset: int
    nbytes: int
    stored_bytes: int
    num_records: int


class PlainBatch:
    """Stretches of segment files, each of which is copied into one message."""

    verified: ClassVar[bool] = False

    def __init__(self, reader: StoreReader, located: Located, found: ReadOutcome, *, first: int) -> None:
        """first: number of the first payload.  found: counts the reads."""
        self.broken = False
        self._runs = reader.runs
        self._runs.files.sweep()
        self._found = found
        # All messages are prepared at once. Between messages, whose bytes evict everything else from the core's caches,
        # each line of Python takes several times as long.
        self._unread = deque(_stretches(located, reader.seed, first))

    @property
    def drained(self) -> bool:
        return not self._unread

    def read_cached(self) -> list[bytes]:
        """The next message.  Raises:  BlockingIOError: a part of the bytes is not in the page cache."""
        return self._read_next(wait=False)

    def read(self) -> list[bytes]:
        """The next messages. May wait for the disk."""
        messages: list[bytes] = []
        while self._unread and sum(map(len, messages)) < _COLD_BYTES:
            messages += self._read_next(wait=True)
        return messages

    def _read_next(self, *, wait: bool) -> list[bytes]:
        stretch = self._unread[0]
        blank = BlankMessage(stretch.head, stretch.nbytes)
        if not self._runs.copy(stretch.segment, stretch.offset, blank.payload, wait=wait):
            # The record was moved or dropped since it was looked up, or the disk cannot read it.
            self.broken = True
            self._unread.clear()
            return []
        self._unread.popleft()
        self._found.num_good += stretch.num_records
        self._found.bytes_read += stretch.stored_bytes
        return [blank.finish()]


def _stretches(located: Located, seed: int, first: int) -> Iterator[_Stretch]:
    for run in runs_of(located.wanted, PIECE_BYTES):
        segment, offset = run[0].entry.segment, run[0].entry.offset
        # The padding behind the last record may not have been written yet.
        nbytes = run[-1].entry.end - offset
        head = records_head(first=first, seed=seed, segment=segment, offset=offset, records_bytes=nbytes)
        yield _Stretch(head, segment, offset, nbytes, sum(want.entry.stored_bytes for want in run), len(run))
        first += len(run)


@dataclass(frozen=True, slots=True)
class _Window:
    """The payloads to be read next, and where the parts of each go. last: whether these are the last that were looked
    up.
    """

    located: Located
    parts: list[list[memoryview]]
    last: bool


class VerifiedBatch:
    """Payloads that are read, decompressed and verified in this process. The payloads' pieces follow each other without
    gaps.
    """

    verified: ClassVar[bool] = True

    def __init__(
        self,
        reader: StoreReader,
        located: Located,
        found: ReadOutcome,
        *,
        first: int,
        offset: int = 0,
        has_seals: bool = False,
    ) -> None:
        """offset: byte of the first payload at which to begin.  has_seals: send each payload's sealed part.

        Raises:  InvalidRequest: the offset is beyond the end of that payload.
        """
        self.broken = False
        self._reader = reader
        self._found = found
        self._located = located
        self._pieces = OutgoingPieces(located.sizes, first=first, offset=offset, has_seals=has_seals)
        self._num_cut = self._num_read = 0
        # A window that was prepared, but was not in the page cache when it should be read without waiting.
        self._waiting: _Window | None = None

    @property
    def drained(self) -> bool:
        return self.broken or (self._waiting is None and self._num_cut == len(self._located.wanted))

    def read_cached(self) -> list[bytes]:
        """The next messages to send; none if a piece needs more than one call.

        Raises:  BlockingIOError: part of it is not in the page cache, or must be decoded.
        """
        window = self._waiting = self._waiting or self._cut(_CACHED_BYTES)
        if not window.located.plain:
            raise BlockingIOError("must be decoded")
        return self._fill(window, wait=False)

    def read(self) -> list[bytes]:
        """The next messages. This call may wait for the disk; it returns no messages if a piece needs more than one
        call.
        """
        return self._fill(self._waiting or self._cut(_COLD_BYTES), wait=True)

    def _fill(self, window: _Window, *, wait: bool) -> list[bytes]:
        outcome = self._reader.fill(window.located, lambda number, _: window.parts[number], wait=wait)
        self._waiting = None
        for number, want in enumerate(window.located.wanted[: outcome.num_good], start=self._num_read):
            self._pieces.note_sealed(number, want.sealed)
        self._num_read += outcome.num_good
        self._found.num_good += outcome.num_good
        self._found.bytes_read += outcome.bytes_read
        self._found.suspects += outcome.suspects
        self.broken = outcome.num_good < len(window.parts)
        return self._pieces.messages(self._num_read, last=window.last or self.broken)

    def _cut(self, bytes_max: int) -> _Window:
        """The next part (window) of the payloads that were looked up."""
        located = self._located.window(self._num_cut, bytes_max)
        parts = [self._pieces.parts_of(self._num_cut + number) for number in range(len(located.wanted))]
        self._num_cut += len(parts)
        return _Window(located, parts, self._num_cut == len(self._located.wanted))
