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

# Large enough for a cold disk, small enough to stay in the processor's cache until it is sent.
WINDOW_BYTES: Final = 4 << 20
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
    located: Located
    pieces: OutgoingPieces


class PayloadStream:
    """One Get's payloads. Tells the engine what was read when it ends."""

    def __init__(self, engine: Engine, threads: ThreadPoolExecutor, wanted: GetRange) -> None:
        self._engine = engine
        self._threads = threads
        self._wanted = wanted
        # What was looked up last, how much of that has been read, and how far into the request it reaches.
        self._located = Located(wanted.kind, wanted.fingerprint, [], False)
        self._num_read = 0
        self._num_located = wanted.first
        self._found = ReadOutcome()
        self._ended = False
        self._waits = False

    async def windows(self) -> AsyncGenerator[list[bytes], None]:
        """Messages, a window at a time; ends at the first payload that is missing or not what it should be."""
        loop = asyncio.get_running_loop()
        upcoming: asyncio.Future[list[bytes]] | None = None
        try:
            while messages := await (upcoming or self._read_cached()):
                upcoming = loop.run_in_executor(self._threads, self._read) if self._waits else None
                yield messages
        finally:
            if upcoming is not None:
                upcoming.cancel()
            # Not awaited: a stream that is closed early must not wait for the index. No thread is left in a closing
            # service, which then forgets this use.
            with contextlib.suppress(RuntimeError):
                self._threads.submit(self._note)

    async def _read_cached(self) -> list[bytes]:
        """The next window, from the page cache if all of it is there, else by a thread."""
        in_thread = asyncio.get_running_loop().run_in_executor
        if self._is_used_up:
            await in_thread(self._threads, self._locate)
        window = self._cut()
        if window is None:
            return []
        if window.located.plain:
            with contextlib.suppress(BlockingIOError):
                return self._fill(window, wait=False)
        # This one takes a thread, and so will the rest of the stream.
        self._waits = True
        return await in_thread(self._threads, self._fill, window)

    def _read(self) -> list[bytes]:
        """The next window, however long it takes."""
        if self._is_used_up:
            self._locate()
        window = self._cut()
        return self._fill(window) if window else []

    @property
    def _is_used_up(self) -> bool:
        return self._num_read == len(self._located.wanted)

    def _locate(self) -> None:
        hashes = self._wanted.hashes[self._num_located : self._num_located + _NUM_LOCATED]
        if hashes and not self._ended:
            self._located = self._engine.reader.locate(self._wanted.kind, hashes, fingerprint=self._wanted.fingerprint)
            self._num_read = 0
            self._num_located += len(self._located.wanted)
            self._ended = len(self._located.wanted) < len(hashes)

    def _cut(self) -> _Window | None:
        """Lay out the next window of what was looked up."""
        if self._is_used_up:
            return None
        first = self._wanted.first + self._found.num_good
        window = self._located.window(self._num_read, WINDOW_BYTES)
        self._num_read += len(window.wanted)
        offset = self._wanted.offset if first == self._wanted.first else 0
        return _Window(window, OutgoingPieces(window.sizes, first=first, offset=offset))

    def _fill(self, window: _Window, *, wait: bool = True) -> list[bytes]:
        """Raises:  BlockingIOError: not to wait, and some of it is not in the page cache."""
        outcome = self._engine.reader.fill(window.located, window.pieces.parts_of, alone=True, wait=wait)
        self._found.num_good += outcome.num_good
        self._found.bytes_read += outcome.bytes_read
        self._found.suspects += outcome.suspects
        if outcome.num_good < len(window.located.wanted):
            self._ended, self._num_read = True, len(self._located.wanted)
        return window.pieces.messages(outcome.num_good)

    def _note(self) -> None:
        """One use of the last payload stands for all before it."""
        hashes = self._wanted.hashes[self._wanted.first :]
        self._engine.settle(self._wanted.kind, hashes, self._found, num_missed=int(self._found.num_good < len(hashes)))
