"""The object store as readers see it: a `TierSource` over segments in a bucket."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from typing import Final

from antefix.errors import AntefixError, InvalidRequest, Unavailable
from antefix.objects.bucket import Bucket, ObjectGone
from antefix.objects.catalog import Catalog
from antefix.objects.object_reads import ObjectReads, ObjectWanted, ranges_of
from antefix.record import MEMORY_KINDS, Held, Record, RecordKind
from antefix.store.record_source import records_of
from antefix.store_files.read_runs import Decrypt
from antefix.store_files.seal import Seals
from antefix.store_files.segment_reader import wall_ms

log = logging.getLogger("antefix.objects")

# If the index is older than this, a look-up starts a refresh in the background.
REFRESH_S: Final = 30.0
# After a read of the bucket's names failed.
_RETRY_S: Final = 5.0


class ObjectTier:
    """Used from one event loop. Which records the object store has is known from `catalog`, with a short delay."""

    def __init__(
        self,
        bucket: Bucket,
        *,
        seals: Seals | None = None,
        decrypt: Decrypt | None = None,
        clock_ms: Callable[[], int] = wall_ms,
        refresh_s: float = REFRESH_S,
    ) -> None:
        """seals: if given, only sealed records are accepted, which every worker must require. decrypt: decrypts
        encrypted records.
        """
        self.bucket: Final = bucket
        self.catalog: Final = Catalog(bucket, clock_ms=clock_ms)
        self.reads: Final = ObjectReads(bucket, seals=seals, decrypt=decrypt)
        self.counters: Final = self.reads.counters
        self._refresh_s = refresh_s
        self._refreshing: asyncio.Task[None] | None = None
        self._next_s = 0.0

    async def load(self) -> None:
        """Load the tier's index.  Raises:  Unavailable: the bucket does not answer."""
        await self._be_fresh()

    async def held(self, chain: Sequence[bytes], *, fingerprint: bytes, tenant: bytes = b"") -> Held:
        """Raises:  Unavailable: the bucket does not answer, and nothing is known of it."""
        await self._be_fresh()
        blocks = self.catalog.find(RecordKind.BLOCK, chain)
        checkpoints = self.catalog.find(RecordKind.CHECKPOINT, chain)
        return Held.of_flags(
            (each is not None for each in blocks),
            [number + 1 for number, each in enumerate(checkpoints) if each is not None],
        )

    async def get_blocks(
        self, hashes: Sequence[bytes], into: Sequence[memoryview], *, fingerprint: bytes, tenant: bytes = b""
    ) -> int:
        if len(hashes) != len(into):
            raise InvalidRequest(f"{len(hashes)} hashes but {len(into)} buffers")
        parts = [buffer.cast("B") for buffer in into]
        wanted = await self._read(
            RecordKind.BLOCK, hashes, lambda number, _: parts[number], fingerprint=fingerprint, tenant=tenant
        )
        self.counters.num_blocks += len(wanted)
        return len(wanted)

    async def get(self, kind: RecordKind, hash: bytes, *, fingerprint: bytes, tenant: bytes = b"") -> bytes | None:
        if kind in MEMORY_KINDS:
            return None
        payloads: list[bytearray] = []

        def allocate(_: int, nbytes: int) -> memoryview:
            payloads[:] = [bytearray(nbytes)]
            return memoryview(payloads[0])

        good = await self._read(kind, [hash], allocate, fingerprint=fingerprint, tenant=tenant)
        return bytes(payloads[0]) if good else None

    async def get_records(
        self, kind: RecordKind, hashes: Sequence[bytes], *, fingerprint: bytes, tenant: bytes = b""
    ) -> list[Record]:
        """The leading records of a list, with their headers, so that they can be put into another store."""
        payloads: dict[int, bytearray] = {}

        def allocate(number: int, nbytes: int) -> memoryview:
            payloads[number] = bytearray(nbytes)
            return memoryview(payloads[number])

        good = await self._read(kind, hashes, allocate, fingerprint=fingerprint, tenant=tenant)
        return records_of([want.sealed for want in good], [payloads[number] for number in range(len(good))])

    async def close(self) -> None:
        if self._refreshing is not None:
            self._refreshing.cancel()
            await asyncio.gather(self._refreshing, return_exceptions=True)
        self.reads.close()
        await self.bucket.close()

    async def _read(
        self,
        kind: RecordKind,
        hashes: Sequence[bytes],
        into: Callable[[int, int], memoryview],
        *,
        fingerprint: bytes,
        tenant: bytes,
    ) -> list[ObjectWanted]:
        """The leading records of a list that pass all checks. into: called with a record's number and size, returns the
        memory for its payload.
        """
        await self._be_fresh()
        wanted: list[ObjectWanted] = []
        for number, (hash, place) in enumerate(zip(hashes, self.catalog.find(kind, hashes), strict=True)):
            if place is None:
                break
            wanted.append(ObjectWanted(hash, place, lambda nbytes, number=number: into(number, nbytes)))  # type: ignore[misc]
        left = wanted
        for is_last in (False, True):
            await self._read_ranges(kind, left, fingerprint, tenant)
            left = [want for want in left if not want.is_good]
            if not left or is_last:
                break
            # What was cut or flipped on its way is right the second time; a segment that is gone may have a double.
            places = self.catalog.find(kind, [want.hash for want in left])
            for want, place in zip(left, places, strict=True):
                want.place = place or want.place
            left = [want for want, place in zip(left, places, strict=True) if place is not None]
            self.counters.num_read_again += len(left)
        self._note_bad(wanted)
        num_good = next((number for number, want in enumerate(wanted) if not want.is_good), len(wanted))
        return wanted[:num_good]

    async def _read_ranges(
        self, kind: RecordKind, wanted: Sequence[ObjectWanted], fingerprint: bytes, tenant: bytes
    ) -> None:
        """Raises:  Unavailable: a range could not be read; all others have ended."""
        tasks = [asyncio.ensure_future(self._read_range(kind, each, fingerprint, tenant)) for each in ranges_of(wanted)]
        try:
            await asyncio.gather(*tasks)
        finally:
            # Nobody writes to the caller's buffers after this.
            for task in tasks:
                task.cancel()
            if tasks:
                await asyncio.wait(tasks)

    async def _read_range(
        self, kind: RecordKind, wanted: list[ObjectWanted], fingerprint: bytes, tenant: bytes
    ) -> None:
        try:
            await self.reads.read(kind, wanted, fingerprint=fingerprint, tenant=tenant)
        except ObjectGone:
            self.counters.num_gone += 1
            self.catalog.lose(wanted[0].place.segment.id)

    def _note_bad(self, wanted: Sequence[ObjectWanted]) -> None:
        for want in wanted:
            if not want.is_good and want.problem:
                self.counters.num_bad += 1
                log.warning(
                    "%s: %s at %d: %s", self.bucket.url, want.place.segment.name, want.place.offset, want.problem
                )

    async def _be_fresh(self) -> None:
        """Have the list of records read again if it was last read long ago; only the first call waits for it.

        Raises:  Unavailable: it failed, and nothing is known yet.
        """
        now_s = time.monotonic()
        if now_s >= self._next_s and (self._refreshing is None or self._refreshing.done()):
            self._next_s = now_s + self._refresh_s
            self._refreshing = asyncio.create_task(self._refresh())
        if not self.catalog.loaded_ms:
            # Somebody who does not wait to the end does not stop it for the others.
            assert self._refreshing is not None
            await asyncio.shield(self._refreshing)
            if not self.catalog.loaded_ms:
                raise Unavailable(f"{self.bucket.url} cannot be listed")

    async def _refresh(self) -> None:
        try:
            await self.catalog.refresh()
        except AntefixError as err:
            self._next_s = time.monotonic() + _RETRY_S
            log.warning("%s: it is not known which records this object store has: %s", self.bucket.url, err)
