"""Tells a store's service which records this process read from its files, because eviction depends on recent use."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextvars import Context
from dataclasses import dataclass, field
from typing import Final

from antefix.errors import AntefixError
from antefix.record import RecordKind, RecordName
from antefix.store.names_wire import name_to_wire
from antefix.store_files.segment_reader import ReadOutcome
from antefix.v1 import kvstore_pb2

# How long uses are collected for one call, and how many may wait.
TELL_S: Final = 0.2
NUM_TOLD_MAX: Final = 4096


@dataclass(slots=True)
class Uses:
    """The uses since the last call to the service.  used: the records that were read, by fingerprint."""

    used: dict[bytes, set[RecordName]] = field(default_factory=dict)
    suspects: set[RecordName] = field(default_factory=set)
    hits: int = 0
    misses: int = 0
    bytes_read: int = 0

    def requests(self) -> list[kvstore_pb2.TouchRequest]:
        first = kvstore_pb2.TouchRequest(
            suspect=[name_to_wire(name) for name in self.suspects],
            hits=self.hits,
            misses=self.misses,
            bytes_read=self.bytes_read,
        )
        return [
            first,
            *(
                kvstore_pb2.TouchRequest(fingerprint=fingerprint, used=[name_to_wire(name) for name in names])
                for fingerprint, names in self.used.items()
            ),
        ]


class UsesTold:
    """Collects uses and reports them. The object is used from one event loop. touch: makes the call to the service."""

    def __init__(self, touch: Callable[[kvstore_pb2.TouchRequest], Awaitable[None]]) -> None:
        self.uses = Uses()
        self._touch = touch
        self._telling: asyncio.Task[None] | None = None

    def note(
        self, kind: RecordKind, last: bytes | None, num_missed: int, outcome: ReadOutcome, fingerprint: bytes
    ) -> None:
        """Report a read to the service soon, without waiting for it.  last: the hash of the last
        record that was read.
        """
        uses = self.uses
        uses.hits += outcome.num_good
        uses.misses += num_missed
        uses.bytes_read += outcome.bytes_read
        names = uses.used.setdefault(fingerprint, set())
        if last is not None and len(names) < NUM_TOLD_MAX:
            names.add((kind, last))
        if len(uses.suspects) < NUM_TOLD_MAX:
            uses.suspects.update((kind, suspect) for suspect in outcome.suspects)
        if self._telling is None or self._telling.done():
            self._telling = asyncio.get_running_loop().create_task(self._tell(), context=Context())

    async def close(self) -> None:
        """Report the uses of records that have not been reported yet."""
        if self._telling is not None:
            await self._telling

    async def _tell(self) -> None:
        await asyncio.sleep(TELL_S)
        uses, self.uses = self.uses, Uses()
        for request in uses.requests():
            try:
                await self._touch(request)
            except AntefixError:
                # If the service does not hear of a use, eviction may choose worse. Nothing else depends on it.
                return
