"""Uploads a store's records to the object store in the background, by policy and at a bounded rate, and enforces the
object store's limits.

Uploading runs in a thread with its own event loop, so no request waits for it. A failed upload is tried again later,
and does not affect the store.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import random
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from antefix.errors import AntefixError
from antefix.objects.bucket import open_bucket
from antefix.objects.catalog import Catalog
from antefix.objects.janitor import SPREAD_SHARE, Janitor, ObjectLimits
from antefix.objects.object_writer import ObjectSettings, ObjectWriter
from antefix.objects.segment_object import Plans
from antefix.record import Record, RecordKind, RecordName
from antefix.secret import TENANT_BYTES, Keyring
from antefix.store.object_access import object_keys
from antefix.store_files.owners import Owners
from antefix_kvstore.storage_engine import StorageEngine
from antefix_kvstore.upload_choice import (
    Chosen,
    by_kind_and_fingerprint,
    choose,
    next_evicted,
    pinned,
    stored_before,
)
from antefix_kvstore.upload_reads import UploadBuffers, read_records

log = logging.getLogger("antefix_kvstore.object_upload")

STEP_S: Final = 1.0
TIDY_S: Final = 60.0
# How often to look for records that will be evicted next; a store takes far longer to fill that much.
EVICTING_S: Final = 5.0
_PAUSE_S_MAX: Final = 60.0
_JOIN_S: Final = 0.5
# Limit on waiting names. Past it the names that came first are forgotten; they come again when the records are used
# again.
NUM_WAITING_MAX: Final = 65_536
# A copy with less than this share of its life left counts as missing, so a record that is used again is uploaded again.
_RENEWED_SHARE: Final = 0.25


@dataclass(slots=True)
class UploadCounters:
    """Counts are numbers of records; sizes are payload bytes. num_left: records not read, or without a key.
    num_failures: failed uploads and failed maintenance passes.
    """

    num_uploaded: int = 0
    bytes_uploaded: int = 0
    num_left: int = 0
    num_forgotten: int = 0
    num_failures: int = 0
    num_passes: int = 0


class ObjectUploader:
    """`note` may be called from any thread; the work is done in the uploader's own thread."""

    def __init__(self, engine: StorageEngine, *, step_s: float = STEP_S) -> None:
        """Raises:  ConfigError: the object store's URL, or a key file, cannot be used."""
        config = engine.config
        self.counters: Final = UploadCounters()
        self._engine = engine
        self._policies = frozenset(config.object_upload)
        self._step_s = step_s
        owners = Owners(Keyring.from_file(config.secret_file) if config.secret_file else None)
        self.catalog: Final = Catalog(open_bucket(config.object_store), clock_ms=engine.clock_ms)
        self.writer: Final = ObjectWriter(
            self.catalog,
            ObjectSettings(
                segment_bytes=config.object_segment_bytes,
                ttl_s=config.object_ttl_s,
                keys=object_keys(config.object_encrypt_key_file, config.object_keys_file, owners),
                plans=self._plans,
                statements=self._statements,
            ),
        )
        quotas = {
            row[1 : 1 + TENANT_BYTES]: nbytes
            for tenant, nbytes in config.object_own_quotas.items()
            for row in owners.rows(tenant)
            if row[:1] == b"o"
        }
        self.janitor: Final = Janitor(
            self.catalog,
            ObjectLimits(
                budget_bytes=config.object_budget_bytes, tenant_bytes=config.object_tenant_quota_bytes, quotas=quotas
            ),
            spread_share=SPREAD_SHARE,
        )
        self._lock = threading.Lock()
        # Waiting names, with the time at which each was noted.
        self._waiting: dict[RecordName, float] = {}
        self._reused: dict[RecordName, None] = {}
        self._next_tidy_s = self._next_evicting_s = 0.0
        self._buffers = UploadBuffers()
        self._stopped = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="antefix-upload", daemon=True)
        engine.on_wanted = self.note

    @property
    def num_waiting(self) -> int:
        return len(self._waiting) + len(self._reused)

    def note(self, policy: str, names: Sequence[RecordName]) -> None:
        """The engine calls this with records that a policy may want to upload."""
        if policy not in self._policies or not names:
            return
        with self._lock:
            if policy == "reused":
                self._reused.update(dict.fromkeys(names))
                while len(self._reused) > NUM_WAITING_MAX:
                    del self._reused[next(iter(self._reused))]
                    self.counters.num_forgotten += 1
            else:
                self._want(names)

    def recall(self) -> None:
        """Record which records were pinned before this process began."""
        self.note("pinned", pinned(self._engine, self._engine.clock_ms()))

    def _want(self, names: Iterable[RecordName]) -> None:
        now_s = time.monotonic()
        for name in names:
            self._waiting.setdefault(name, now_s)
        while len(self._waiting) > NUM_WAITING_MAX:
            del self._waiting[next(iter(self._waiting))]
            self.counters.num_forgotten += 1

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        if self._thread.ident is None:
            return
        # The thread may not have started its loop yet, or may have ended by itself.
        while self._thread.is_alive():
            if self._loop is not None:
                with contextlib.suppress(RuntimeError):
                    self._loop.call_soon_threadsafe(self._stopped.set)
            self._thread.join(_JOIN_S)

    def _run(self) -> None:
        asyncio.run(self._work())

    async def _work(self) -> None:
        self._loop = asyncio.get_running_loop()
        pause_s, has_recalled = self._step_s, False
        try:
            while not await self._stopped_within(pause_s):
                try:
                    if not has_recalled:
                        self.recall()
                        has_recalled = True
                    await self.step()
                    pause_s = self._step_s
                except Exception as err:
                    # Whatever is wrong with the object tier, the uploader must continue.
                    self.counters.num_failures += 1
                    level = logging.WARNING if isinstance(err, AntefixError) else logging.ERROR
                    log.log(
                        level, "uploading to %s: %s", self.catalog.bucket.url, err, exc_info=level > logging.WARNING
                    )
                    pause_s = min(max(2 * pause_s, 1.0), _PAUSE_S_MAX)
        finally:
            await self.catalog.bucket.close()

    async def _stopped_within(self, seconds: float) -> bool:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._stopped.wait()
        return self._stopped.is_set()

    async def step(self, *, flush: bool = False) -> None:
        """Do the maintenance of the object store when it is due. After that, upload records that have waited long
        enough, or that fill a segment.

        flush: upload all waiting records. Raises: Unavailable: the object store does not answer, so records that were
        not uploaded keep waiting.
        """
        if time.monotonic() >= self._next_tidy_s or not self.catalog.loaded_ms:
            await self.janitor.tidy()
            self.counters.num_passes += 1
            # Random, so that hosts that were started together do not tidy together: the first does the work, the others
            # find it done.
            self._next_tidy_s = time.monotonic() + TIDY_S * random.uniform(0.5, 1.5)
        names = await asyncio.to_thread(self._take_wanted)
        if not names:
            return
        alive_ms = self._alive_ms()
        chosen = await asyncio.to_thread(choose, self._engine, self.catalog, names, alive_ms=alive_ms)
        nbytes = sum(each.nbytes for each in chosen)
        oldest_s = min(names.values())
        if (
            not flush
            and nbytes < self.writer.settings.segment_bytes
            and time.monotonic() - oldest_s < self._engine.config.object_wait_s
        ):
            self._put_back(names)
            return
        try:
            await self._upload(chosen)
        except AntefixError:
            self._put_back(names)
            raise

    def _take_wanted(self) -> dict[RecordName, float]:
        with self._lock:
            reused, self._reused = list(self._reused), {}
        if reused:
            before_ms = self._engine.clock_ms() - round(self._engine.config.object_reused_after_s * 1000)
            reused = stored_before(self._engine, reused, before_ms)
        evicting: list[RecordName] = []
        if "evicting" in self._policies and time.monotonic() >= self._next_evicting_s:
            evicting = next_evicted(self._engine)
            self._next_evicting_s = time.monotonic() + EVICTING_S
        with self._lock:
            self._want([*reused, *evicting])
            names, self._waiting = self._waiting, {}
        return names

    def _put_back(self, names: dict[RecordName, float]) -> None:
        with self._lock:
            self._waiting = names | self._waiting

    def _alive_ms(self) -> dict[RecordKind, int]:
        """For each kind, the time until which a copy must live to count as present."""
        now_ms, ttl_s = self._engine.clock_ms(), self.writer.settings.ttl_s
        return {kind: now_ms + round(ttl_s[kind] * _RENEWED_SHARE * 1000) for kind in ttl_s}

    async def _upload(self, chosen: Sequence[Chosen]) -> None:
        """Upload records, with one segment's records in memory at a time, no faster than the rate allows."""
        started_s, sent = time.monotonic(), 0
        for part in _parts(chosen, self.writer.settings.segment_bytes):
            records = await asyncio.to_thread(self._read, part)
            self.counters.num_left += len(part) - len(records)
            sent += await self.writer.write(records)
            self.counters.num_uploaded += len(records)
            self.counters.bytes_uploaded += sum(memoryview(record.payload).nbytes for record in records)
            due_s = started_s + sent / self._engine.config.object_upload_bytes_per_s
            if await self._stopped_within(due_s - time.monotonic()):
                return

    def _read(self, chosen: Sequence[Chosen]) -> list[Record]:
        """Read and verify the records. Records that cannot be read, or that have no key for the object store, are left
        out.

        Payloads are in buffers that the next call reuses; the records of the call before are uploaded by then.
        """
        self._buffers.begin()
        found: dict[RecordName, Record] = {}
        for kind, fingerprint, members in by_kind_and_fingerprint(chosen):
            costs = {each.name[1]: each.cost_s for each in members}
            for record in read_records(self._engine, kind, list(costs), fingerprint, self._buffers.take):
                found[kind, record.hash] = dataclasses.replace(record, cost_s=costs[record.hash])
        records = [found[each.name] for each in chosen if each.name in found]
        return [record for record in records if self.writer.takes(record)]

    def _plans(self) -> Plans:
        if self._engine.config.compression == "off":
            return {}
        return {(fingerprint, kind): plan for fingerprint, kind, plan in self._engine.compression.registered()}

    def _statements(self) -> dict[bytes, bytes]:
        index = self._engine.index
        with index.txn() as txn:
            return {digest: index.statement(txn, digest) for digest in index.fingerprints(txn).values()}


def _parts(chosen: Sequence[Chosen], bytes_max: int) -> Iterator[list[Chosen]]:
    part: list[Chosen] = []
    nbytes = 0
    for each in chosen:
        if part and nbytes + each.nbytes > bytes_max:
            yield part
            part, nbytes = [], 0
        part.append(each)
        nbytes += each.nbytes
    if part:
        yield part
