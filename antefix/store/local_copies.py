"""Copies records that this host often reads from other stores to the nearest store, within a budget of bytes.

A record that was read NUM_READS times from other stores within `ttl_s` is copied in the background; the next read
finds the copy in the nearest store. A copy costs one more read of the other store. No request waits for a copy.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from antefix.errors import AntefixError
from antefix.events.block_events import Key, keys_of
from antefix.record import PutResult, Record, RecordKind
from antefix.security.grants import held, hold

log = logging.getLogger("antefix.store")

NUM_READS: Final = 3
# How many records have their reads counted, at some 200 bytes each; the least recently read are forgotten.
_NUM_COUNTED_MAX: Final = 1 << 18
# How many copies may wait. A further one is dropped; the record's next read asks for it again.
_NUM_WAITING_MAX: Final = 16
# How many records one read and one put carry.
_BATCH_RECORDS: Final = 64
# Less than a disk's write rate, so that a copy never delays the writes of requests for long.
_BYTES_PER_S: Final = 128 << 20


class CopiedStores(Protocol):
    """The stores from which records are copied, and the store to which they are copied: `ManyStores`."""

    async def get_records(
        self, kind: RecordKind, hashes: Sequence[bytes], *, fingerprint: bytes, tenant: bytes = b""
    ) -> list[Record]:
        """The leading ones of these records that at least one other store has."""

    async def put_near(self, records: Sequence[Record]) -> PutResult:
        """Write records to the nearest store."""


@dataclass(slots=True)
class CopyCounters:
    """Counts of records, and of payload bytes.  num_over_budget: records not copied because the budget was used up."""

    num_copied: int = 0
    bytes_copied: int = 0
    num_over_budget: int = 0
    num_failed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Copy:
    kind: RecordKind
    hashes: tuple[bytes, ...]
    fingerprint: bytes
    tenant: bytes
    # The grant of the request that read the records last.
    grant: bytes


class LocalCopies:
    """Used from one event loop.

    bytes_max: limit on the bytes of copies made within `ttl_s`, which is how long a copy that nobody reads is kept.
    """

    def __init__(self, *, bytes_max: int, ttl_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.counters = CopyCounters()
        self._bytes_max = bytes_max
        self._ttl_s = ttl_s
        self._clock = clock
        self._reads: OrderedDict[tuple[RecordKind, Key], list[float]] = OrderedDict()
        self._made: deque[tuple[float, int]] = deque()
        self._made_bytes = 0
        self._waiting: deque[_Copy] = deque()
        self._task: asyncio.Task[None] | None = None

    def note(
        self, stores: CopiedStores, kind: RecordKind, hashes: Sequence[bytes], *, fingerprint: bytes, tenant: bytes
    ) -> None:
        """Count one read of each of these records from another store, and copy those that were read often."""
        now = self._clock()
        often = [name for name, key in zip(hashes, keys_of(hashes), strict=True) if self._count((kind, key), now)]
        if not often or not self._bytes_max or len(self._waiting) >= _NUM_WAITING_MAX:
            return
        self._waiting.append(
            _Copy(kind=kind, hashes=tuple(often), fingerprint=fingerprint, tenant=tenant, grant=held())
        )
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._copy_all(stores))

    async def settle(self) -> None:
        """Wait until all queued copies have been made."""
        if self._task is not None:
            await asyncio.gather(self._task, return_exceptions=True)

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
        await self.settle()

    def _count(self, name: tuple[RecordKind, Key], now: float) -> bool:
        """Count a read. Returns whether the record has now been read often enough to be copied."""
        times = [at for at in self._reads.pop(name, ()) if now - at <= self._ttl_s][-(NUM_READS - 1) :]
        times.append(now)
        self._reads[name] = times
        if len(self._reads) > _NUM_COUNTED_MAX:
            self._reads.popitem(last=False)
        return len(times) >= NUM_READS

    async def _copy_all(self, stores: CopiedStores) -> None:
        while self._waiting:
            copy = self._waiting.popleft()
            hold(copy.grant)
            for first in range(0, len(copy.hashes), _BATCH_RECORDS):
                started = self._clock()
                nbytes = await self._copy_batch(stores, copy, copy.hashes[first : first + _BATCH_RECORDS])
                if not nbytes:
                    break
                await asyncio.sleep(max(0.0, nbytes / _BYTES_PER_S - (self._clock() - started)))

    async def _copy_batch(self, stores: CopiedStores, copy: _Copy, hashes: Sequence[bytes]) -> int:
        """Returns how many bytes were copied; after a result of 0 the caller ends this copy."""
        try:
            records = await stores.get_records(copy.kind, hashes, fingerprint=copy.fingerprint, tenant=copy.tenant)
            fitting = self._within_budget(records)
            if not fitting:
                return 0
            result = await stores.put_near(fitting)
        except AntefixError as err:
            self.counters.num_failed += 1
            log.debug("a record could not be copied to the local store: %s", err)
            return 0
        taken = [record for record in fitting if record.hash not in result.refused]
        nbytes = sum(len(record.payload) for record in taken)
        self._made.append((self._clock(), nbytes))
        self._made_bytes += nbytes
        self.counters.num_copied += len(taken)
        self.counters.bytes_copied += nbytes
        return nbytes if len(taken) == len(hashes) else 0

    def _within_budget(self, records: Sequence[Record]) -> list[Record]:
        now = self._clock()
        while self._made and now - self._made[0][0] > self._ttl_s:
            self._made_bytes -= self._made.popleft()[1]
        room = self._bytes_max - self._made_bytes
        fitting: list[Record] = []
        for record in records:
            room -= len(record.payload)
            if room < 0:
                self.counters.num_over_budget += len(records) - len(fitting)
                break
            fitting.append(record)
        return fitting
