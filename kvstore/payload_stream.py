"""The payloads that one Get asks for, as messages ready to be sent, window by window. Knows the engine, never gRPC.

What is in the page cache is read on the event loop itself, which costs less than handing it to a thread and waking the
loop again. The first window that would wait for the disk sends the rest of the stream to threads, which then read each
window while the one before it is sent. So is what must be decoded. Memory is bounded by two windows a stream.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final

from antefix.store.api import RecordKind
from antefix.store.pieces import OutgoingPieces
from antefix.store.reader import Located, ReadOutcome
from kvstore.engine import Engine

# Read at once while the page cache has it: so little that it is still in the core's own cache when it is sent.
_CACHED_BYTES: Final = 1 << 20
# Read at once by a thread: large enough for a cold disk.
_COLD_BYTES: Final = 4 << 20
# Looked up at once, in a thread: the index may be cold, and the event loop must not wait for its pages.
_NUM_LOCATED: Final = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class GetRange:
    """Payloads of hashes[first:], the first one from byte `offset` on."""

    kind: RecordKind
    hashes: Sequence[bytes]
    fingerprint: bytes
    first: int
    offset: int


@dataclass(frozen=True, slots=True)
class _Window:
    """Payloads to be read next, and where the parts of each go. last: of those that were looked up."""

    located: Located
    parts: list[list[memoryview]]
    last: bool


class PayloadStream:
    """One Get's payloads. Tells the engine what was read when it ends."""

    def __init__(self, engine: Engine, threads: ThreadPoolExecutor, wanted: GetRange) -> None:
        self._engine = engine
        self._threads = threads
        self._wanted = wanted
        # What was looked up last, the messages that will carry it, and how many of it have been laid out and read.
        self._located = Located(wanted.kind, wanted.fingerprint, [], False)
        self._pieces = OutgoingPieces([], first=0)
        self._num_cut = self._num_read = 0
        # What was read in all.
        self._found = ReadOutcome()
        self._ended = False
        self._waits = False

    async def windows(self) -> AsyncGenerator[list[bytes], None]:
        """Messages, as they get ready; ends at the first payload that is missing or not what it should be."""
        loop = asyncio.get_running_loop()
        upcoming: asyncio.Future[list[bytes] | None] | None = None
        try:
            while (messages := await (upcoming or self._read_cached())) is not None:
                upcoming = loop.run_in_executor(self._threads, self._read) if self._waits else None
                yield messages
        finally:
            if upcoming is not None:
                upcoming.cancel()
            # Not awaited: a stream that is closed early must not wait for the index. No thread is left in a closing
            # service, which then forgets this use.
            with contextlib.suppress(RuntimeError):
                self._threads.submit(self._note)

    async def _read_cached(self) -> list[bytes] | None:
        """What comes next, from the page cache if all of it is there, else by a thread. None at the end."""
        in_thread = asyncio.get_running_loop().run_in_executor
        if self._num_cut == len(self._located.wanted):
            await in_thread(self._threads, self._locate)
        window = self._cut(_CACHED_BYTES)
        if window is None:
            return None
        if window.located.plain:
            with contextlib.suppress(BlockingIOError):
                return self._fill(window, wait=False)
        # This one takes a thread, and so will the rest of the stream.
        self._waits = True
        return await in_thread(self._threads, self._fill, window)

    def _read(self) -> list[bytes] | None:
        """What comes next, however long it takes. None at the end."""
        if self._num_cut == len(self._located.wanted):
            self._locate()
        window = self._cut(_COLD_BYTES)
        return self._fill(window) if window else None

    def _locate(self) -> None:
        wanted = self._wanted
        first = wanted.first + self._found.num_good
        hashes = wanted.hashes[first : first + _NUM_LOCATED]
        if hashes and not self._ended:
            self._located = self._engine.reader.locate(wanted.kind, hashes, fingerprint=wanted.fingerprint)
            offset = 0 if self._found.num_good else wanted.offset
            self._pieces = OutgoingPieces(self._located.sizes, first=first, offset=offset)
            self._num_cut = self._num_read = 0
            self._ended = len(self._located.wanted) < len(hashes)

    def _cut(self, bytes_max: int) -> _Window | None:
        """The next of what was looked up, None if there is no more."""
        if self._num_cut == len(self._located.wanted):
            return None
        located = self._located.window(self._num_cut, bytes_max)
        parts = [self._pieces.parts_of(self._num_cut + number) for number in range(len(located.wanted))]
        self._num_cut += len(parts)
        return _Window(located, parts, self._num_cut == len(self._located.wanted))

    def _fill(self, window: _Window, *, wait: bool = True) -> list[bytes]:
        """Raises:  BlockingIOError: not to wait, and some of it is not in the page cache."""
        outcome = self._engine.reader.fill(window.located, lambda number, _: window.parts[number], wait=wait)
        self._num_read += outcome.num_good
        self._found.num_good += outcome.num_good
        self._found.bytes_read += outcome.bytes_read
        self._found.suspects += outcome.suspects
        if outcome.num_good < len(window.parts):
            self._ended, self._num_cut = True, len(self._located.wanted)
        return self._pieces.messages(self._num_read, last=window.last or outcome.num_good < len(window.parts))

    def _note(self) -> None:
        """One use of the last payload stands for all before it."""
        hashes = self._wanted.hashes[self._wanted.first :]
        self._engine.settle(self._wanted.kind, hashes, self._found, num_missed=int(self._found.num_good < len(hashes)))
