"""The payloads that one Get requests, as messages ready to be sent. Knows the engine, never gRPC.

Payloads in the page cache are read on the event loop itself, which costs less than handing the read to a thread and
waking the loop again. The first window that would wait for the disk, or must be decoded, moves the rest of the stream
to threads; these read each window while the one before it is sent. A stream holds at most two windows in memory.
Streams take turns, so that no stream blocks the event loop for long.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Final

from antefix.record import RecordKind
from antefix.store_files.segment_reader import Located, ReadOutcome
from antefix_kvstore.outgoing import PlainBatch, VerifiedBatch, can_go_plain
from antefix_kvstore.storage_engine import StorageEngine
from antefix_kvstore.turns import Turns

# So many payloads are looked up at once, in a thread: reading index pages may need the disk, and the loop must not
# wait.
_NUM_LOCATED: Final = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class GetRange:
    """The payloads of hashes[first:], the first of them from byte `offset` on.

    record_format: the newest version of plain records that the caller can verify; 0: none.  wants_seals: send the seals
    of payloads that are not plain.  owners: who the payloads may belong to; None: anybody.
    """

    kind: RecordKind
    hashes: Sequence[bytes]
    fingerprint: bytes
    first: int
    offset: int
    record_format: int = 0
    wants_seals: bool = False
    owners: tuple[bytes, ...] | None = None


class PayloadStream:
    """The payloads of one Get. When the stream ends, it tells the engine what was read."""

    def __init__(self, engine: StorageEngine, threads: ThreadPoolExecutor, turns: Turns, wanted: GetRange) -> None:
        """turns: shared by all streams on the event loop."""
        self._engine = engine
        self._threads = threads
        self._turns = turns
        self._wanted = wanted
        # Everything read by this stream.
        self._found = ReadOutcome()
        # Whether records are sent plain, for the caller to verify; then the latest batch, and whether it is the last
        # one.
        self._sends_plain = bool(wanted.record_format)
        self._is_last = False
        self._batch = self._batch_of(Located(wanted.kind, wanted.fingerprint, [], False))

    async def messages(self, counted: AbstractContextManager[None]) -> AsyncGenerator[bytes, None]:
        """Messages as they become ready. The stream ends at the first payload that is missing or damaged.

        counted: a context that is held as long as the stream lasts.
        """
        in_thread, threads = asyncio.get_running_loop().run_in_executor, self._threads
        upcoming: asyncio.Future[list[bytes] | None] | None = None
        with counted:
            try:
                # 1. Send what is in the page cache.
                with contextlib.suppress(BlockingIOError):
                    while not self._batch.drained or await in_thread(threads, self._locate):
                        await self._turns.take(self)
                        for message in self._batch.read_cached():
                            yield message
                    return
                # 2. The next window, and all that follow, are read in a thread.
                upcoming = in_thread(threads, self._read)
                while (messages := await upcoming) is not None:
                    upcoming = in_thread(threads, self._read)
                    for message in messages:
                        await self._turns.take(self)
                        yield message
            finally:
                self._turns.leave(self)
                if upcoming is not None:
                    upcoming.cancel()
                # Not awaited: a stream that is closed early must not wait for the index. In a closing service no thread
                # is left to do this; then this use is not noted.
                with contextlib.suppress(RuntimeError):
                    threads.submit(self._note)

    def _read(self) -> list[bytes] | None:
        """The next messages of the stream; this call may wait for the disk. None at the end."""
        while not self._batch.drained or self._locate():
            if messages := self._batch.read():
                return messages
        return None

    def _locate(self) -> bool:
        """Look up the next payloads. Returns whether there are more."""
        wanted = self._wanted
        if self._batch.broken:
            # Records that could not be copied are read and verified; a damaged one then ends the stream.
            self._is_last = self._batch.verified
            self._sends_plain = False
        first = wanted.first + self._found.num_good
        hashes = wanted.hashes[first : first + _NUM_LOCATED]
        if self._is_last or not hashes:
            return False
        located = self._engine.reader.locate(wanted.kind, hashes, fingerprint=wanted.fingerprint, owners=wanted.owners)
        self._is_last = len(located.wanted) < len(hashes)
        self._batch = self._batch_of(located)
        return bool(located.wanted)

    def _batch_of(self, located: Located) -> PlainBatch | VerifiedBatch:
        reader, first = self._engine.reader, self._wanted.first + self._found.num_good
        offset = 0 if self._found.num_good else self._wanted.offset
        if self._sends_plain and not offset and can_go_plain(located, self._wanted.record_format):
            return PlainBatch(reader, located, self._found, first=first)
        return VerifiedBatch(
            reader, located, self._found, first=first, offset=offset, has_seals=self._wanted.wants_seals
        )

    def _note(self) -> None:
        """Record a use of the last payload, which counts as a use of all payloads before it."""
        hashes = self._wanted.hashes[self._wanted.first :]
        self._engine.settle(self._wanted.kind, hashes, self._found, num_missed=int(self._found.num_good < len(hashes)))
