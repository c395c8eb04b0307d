"""Keeps in the nearest store what this host reads from others again and again, within a budget of bytes.

A record that was read NUM_READS times from elsewhere within its time to live is copied in the background; the next read
finds it here. Copying costs one more read of the other store, and no request waits for it.
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
# Records whose reads are counted, at some 200 bytes each; the least recently read are forgotten.
_NUM_COUNTED_MAX: Final = 1 << 18
# Copies that wait; more than that are not made, and the next read asks again.
_NUM_WAITING_MAX: Final = 16
# Records of one read and one put.
_BATCH_RECORDS: Final = 64
# Below what a disk writes, so that a copy never holds up the writes of requests for long.
_BYTES_PER_S: Final = 128 << 20


class CopiedStores(Protocol):
    """Where copies come from and go to: `ManyStores`."""

    async def get_records(
        self, kind: RecordKind, hashes: Sequence[bytes], *, fingerprint: bytes, tenant: bytes = b""
    ) -> list[Record]:
        """Leading ones of these, from any other store."""

    async def put_near(self, records: Sequence[Record]) -> PutResult:
        """Into the nearest store."""


@dataclass(slots=True)
class CopyCounters:
    """In records, and their payload bytes. num_over_budget: that would have been copied, had there been room."""

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
    # Of the request that read them last.
    grant: bytes


class LocalCopies:
    """Used from one event loop. bytes_max: of copies made within `ttl_s`, which is how long one lives unread."""

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
        """These were read from elsewhere."""
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
        """Until what waits has been copied."""
        if self._task is not None:
            await asyncio.gather(self._task, return_exceptions=True)

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
        await self.settle()

    def _count(self, name: tuple[RecordKind, Key], now: float) -> bool:
        """Note a read; whether it was one too many for being elsewhere."""
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
        """Returns the bytes that were copied; 0 ends this copy."""
        try:
            records = await stores.get_records(copy.kind, hashes, fingerprint=copy.fingerprint, tenant=copy.tenant)
            fitting = self._within_budget(records)
            if not fitting:
                return 0
            result = await stores.put_near(fitting)
        except AntefixError as err:
            self.counters.num_failed += 1
            log.debug("a copy was not made: %s", err)
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
