"""Reads a store's payloads from any process on its host: records are looked up in a snapshot of the index, and read
with preadv into the caller's buffers.

Reading makes no call to the service, and no copy in Python if a record is stored raw. Records that are neighbours in a
segment are read together, and several such runs at the same time. Each record's header, own hash, fingerprint and
checksum are verified on every read. A record that was moved or deleted during the read is looked up again. If the index
still names a record but the segment does not hold it, the record is corrupt; it is reported to the store as a suspect.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from antefix.errors import BlockCorrupt, InvalidRequest, Unavailable
from antefix.host_limits import usable_cores
from antefix.own_files import read_small
from antefix.record import Held, LookupResult, RecordKind
from antefix.store_files.index import Index
from antefix.store_files.page_cache import PageCache
from antefix.store_files.plain_reads import PlainRead, PlainReads
from antefix.store_files.read_runs import (
    Decrypt,
    RunReader,
    Wanted,
    records_per_run,
    runs_of,
)
from antefix.store_files.record_format import (
    INDEX_DIR,
    SEGMENT_DIR,
    STORE_FILE,
    STORE_HEADER,
    IndexEntry,
    unpack_identity,
)
from antefix.store_files.record_header import RecordHeader
from antefix.store_files.seal import Seals
from antefix.store_files.shared_read import SharedRead

# Measured on two cores: 2 in flight, 4 MiB each, read a cold file at least as fast as direct I/O of any depth did,
# and a warm one faster than 4 or 16 did. Prefetching by fadvise made both slower. More cores can keep more in flight.
READS_IN_FLIGHT: Final = max(2, min(16, usable_cores()))

# Of small payloads; what is laid out and sent at once should not make others wait.
_WINDOW_RECORDS_MAX: Final = 512

# Maps (payload number, payload bytes) to the buffers for its parts.
Parts = Callable[[int, int], Sequence[memoryview]]


def wall_ms() -> int:
    """Unix time in ms. Expiry times use this clock, because it is the same in every process."""
    return time.time_ns() // 1_000_000


@dataclass(slots=True)
class ReadOutcome:
    """num_good: how many leading records passed all checks.  suspects: records that the index names but whose segment
    holds something else.

    locked: the read stopped at an encrypted record for which this reader has no keys; the service may have them.
    forged: records that are undamaged but have no valid seal. The store cannot check seals, so it must be told about
    forged records.
    """

    num_good: int = 0
    bytes_read: int = 0
    locked: bool = False
    suspects: list[bytes] = field(default_factory=list)
    forged: list[bytes] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Located:
    """The leading records that are stored, as one snapshot of the index names them. `locked` as in ReadOutcome."""

    kind: RecordKind
    fingerprint: bytes
    wanted: list[Wanted]
    locked: bool
    tenant: bytes = b""

    @property
    def sizes(self) -> list[int]:
        """The payload size of each record."""
        return [want.entry.payload_bytes for want in self.wanted]

    @property
    def plain(self) -> bool:
        """Whether all records are stored raw, so that reading needs no decoding."""
        return all(want.plain for want in self.wanted)

    def window(self, first: int, bytes_max: int) -> Located:
        """The records from number `first` on, numbered from 0: at least one record, and up to about `bytes_max`
        bytes.
        """
        window = Located(self.kind, self.fingerprint, [], self.locked, self.tenant)
        nbytes = 0
        for want in self.wanted[first : first + _WINDOW_RECORDS_MAX]:
            nbytes += want.entry.payload_bytes
            if window.wanted and nbytes > bytes_max:
                break
            window.wanted.append(Wanted(len(window.wanted), want.hash, want.entry))
        return window


class StoreReader:
    """Reads one store directory. The reader is thread-safe; any number of readers may exist, in any process of the
    host.
    """

    def __init__(
        self,
        directory: Path | str,
        *,
        num_threads: int = READS_IN_FLIGHT,
        decrypt: Decrypt | None = None,
        seals: Seals | None = None,
        clock_ms: Callable[[], int] = wall_ms,
        index: Index | None = None,
    ) -> None:
        """num_threads: how many runs of records are read at once, including one by the calling thread. seals: if given,
        only sealed records are accepted.

        index: the owner's, which it closes itself.
        Raises:  Unavailable: there is no store (yet), or its index cannot be opened.
        """
        self.directory = Path(directory)
        try:
            self.seed = unpack_identity(read_small(self.directory / STORE_FILE, STORE_HEADER.size)).seed
        except (FileNotFoundError, BlockCorrupt) as err:
            raise Unavailable(f"{self.directory} holds no readable store: {err}") from err
        self.index = index or Index(self.directory / INDEX_DIR)
        self._owns_index = index is None
        self.runs = RunReader(self.directory / SEGMENT_DIR, self.seed, decrypt, seals)
        self.page_cache = PageCache(self.index, self.runs.files)
        self._plain = PlainReads(self.index, self.runs.files, seals)
        self._num_helpers = max(1, num_threads - 1)
        self._pool = ThreadPoolExecutor(self._num_helpers, thread_name_prefix="antefix-read")
        self._reads_locked = decrypt is not None
        self._clock_ms = clock_ms

    def close(self) -> None:
        self._pool.shutdown()
        self.runs.files.close()
        if self._owns_index:
            self.index.close()

    def renew(self, seed: int) -> None:
        """Close all open files of the store, because the directory has new files."""
        self.seed = seed
        self.runs.renew(seed)

    def lookup(self, chain: Sequence[bytes], *, fingerprint: bytes) -> LookupResult:
        return self.index.lookup(chain, fingerprint=fingerprint, now_ms=self._clock_ms())

    def held(self, chain: Sequence[bytes], *, fingerprint: bytes) -> Held:
        """Which blocks and checkpoints of `chain` are stored, and which of them are in the page cache."""
        return self.page_cache.sampled(self.index.held(chain, fingerprint=fingerprint, now_ms=self._clock_ms()), chain)

    def read_blocks(
        self, hashes: Sequence[bytes], into: Sequence[memoryview], *, fingerprint: bytes, tenant: bytes = b""
    ) -> ReadOutcome:
        """Fill `into[i]` with block `hashes[i]`; see api.Store.get_blocks.

        Raises:  InvalidRequest: a buffer has another size than its payload.
        """
        if len(hashes) != len(into):
            raise InvalidRequest(f"{len(hashes)} hashes but {len(into)} buffers")
        self.runs.files.sweep()
        outcome = self._read_plainly(hashes, into, fingerprint, tenant)
        if outcome.num_good < len(hashes):
            done = outcome.num_good
            rest = self._read_rest(hashes[done:], into[done:], fingerprint, tenant)
            outcome = _joined([(0, outcome), (done, rest)])
        return outcome

    def _read_plainly(
        self, hashes: Sequence[bytes], into: Sequence[memoryview], fingerprint: bytes, tenant: bytes
    ) -> ReadOutcome:
        """Read leading blocks in many threads, in one part or several. A part counts as read if all of it passed all
        checks.
        """
        plain, num_helpers = self._plain, self._num_helpers
        shares = plain.shares(len(hashes))
        if not shares:
            return ReadOutcome()

        def located() -> Iterator[PlainRead]:
            for first, end in shares:
                if first:
                    shared.let_another_begin()
                names, buffers, now_ms = hashes[first:end], into[first:end], self._clock_ms()
                part = plain.locate(
                    names, buffers, fingerprint=fingerprint, tenant=tenant, now_ms=now_ms, num_threads=num_helpers + 1
                )
                yield part
                if len(part) < len(names):
                    return

        shared, parts = SharedRead(plain, self.seed, num_helpers + 1), located()
        if len(shares) == 1:
            (part,) = parts
            parts, num_helpers = iter([part]), len(part.runs) - 1
        num_good = num_bytes = 0
        try:
            self._with_helpers(shared.work, num_helpers, shared.stop, lambda: shared.locate_and_work(parts))
        except OSError:
            shared.has_failed = True
        finally:
            num_good, num_bytes = shared.close()
        return ReadOutcome(num_good, num_bytes)

    def _read_rest(
        self, hashes: Sequence[bytes], into: Sequence[memoryview], fingerprint: bytes, tenant: bytes
    ) -> ReadOutcome:
        """Read record by record, in many threads: records that are not raw, and those that failed a check."""
        shares = _shares(len(hashes), self._num_helpers + 1, into[0].nbytes)
        found: list[tuple[int, ReadOutcome]] = []

        def work() -> None:
            # Looking up and preparing one share takes the interpreter's lock, reading another does not.
            while shares:
                try:
                    first, end = shares.popleft()
                except IndexError:
                    return
                outcome = self._read_share(hashes[first:end], into[first:end], fingerprint, tenant)
                found.append((first, outcome))
                if outcome.num_good < end - first:
                    # Records after the first gap are not used.
                    shares.clear()

        self._with_helpers(work, len(shares) - 1, shares.clear)
        return _joined(found)

    def _read_share(
        self, hashes: Sequence[bytes], into: Sequence[memoryview], fingerprint: bytes, tenant: bytes
    ) -> ReadOutcome:
        located = self.locate(RecordKind.BLOCK, hashes, fingerprint=fingerprint, tenant=tenant)
        for number, nbytes in enumerate(located.sizes):
            if into[number].nbytes != nbytes:
                raise InvalidRequest(f"a buffer has {into[number].nbytes} bytes, its payload {nbytes}")
        return self.fill(located, lambda number, _: (into[number].cast("B"),))

    def _with_helpers(
        self,
        work: Callable[[], None],
        num_helpers: int,
        stop: Callable[[], None],
        own_work: Callable[[], None] | None = None,
    ) -> None:
        """Do `work` in this thread and at the same time in up to `num_helpers` others; `stop` makes all of them end.

        own_work: what this thread does instead of `work`.
        """
        helpers = [self._pool.submit(work) for _ in range(min(num_helpers, self._num_helpers))]
        try:
            (own_work or work)()
            for helper in helpers:
                # A helper that has not begun yet has nothing left to do.
                if not helper.cancel():
                    helper.result()
        finally:
            # No thread may write to the caller's buffers after this returns, even after an error.
            stop()
            if helpers:
                wait([helper for helper in helpers if not helper.cancel()])

    def read(
        self, kind: RecordKind, block_hash: bytes, *, fingerprint: bytes, tenant: bytes = b""
    ) -> tuple[bytearray | None, ReadOutcome]:
        """One payload in a newly allocated buffer; None if it cannot be read."""
        located = self.locate(kind, [block_hash], fingerprint=fingerprint, tenant=tenant)
        payload = bytearray(sum(located.sizes))
        outcome = self.fill(located, lambda *_: (memoryview(payload),))
        return (payload if outcome.num_good else None), outcome

    def locate(
        self,
        kind: RecordKind,
        hashes: Sequence[bytes],
        *,
        fingerprint: bytes,
        tenant: bytes = b"",
        owners: Collection[bytes] | None = None,
    ) -> Located:
        """The leading records that are stored, in one snapshot. owners: as in `Index.lookup`."""
        now_ms = self._clock_ms()
        located = Located(kind, fingerprint, [], False, tenant)
        with self.index.txn() as txn:
            fingerprint_id = self.index.fingerprint_id(txn, fingerprint)
            owner_ids = self.index.owner_ids(txn, owners)
            for number, entry in enumerate(self.index.entries(txn, kind, hashes)):
                if entry is None or entry.fingerprint_id != fingerprint_id or not entry.live(now_ms):
                    break
                if owner_ids is not None and entry.tenant_id not in owner_ids:
                    break
                want = Wanted(number, hashes[number], entry)
                if want.locked and not self._reads_locked:
                    return Located(kind, fingerprint, located.wanted, True, tenant)
                located.wanted.append(want)
        return located

    def fill(self, located: Located, into: Parts, *, wait: bool = True) -> ReadOutcome:
        """Read located payloads into the given parts, verified, in the calling thread.

        wait: whether reading may wait for the disk.
        Raises:  BlockingIOError: `wait` is False, and some bytes are not in the page cache; the parts hold garbage.
        """
        self.runs.files.sweep()
        wanted = located.wanted
        outcome = ReadOutcome(num_good=len(wanted), locked=located.locked)
        for want in wanted:
            want.into = into(want.number, want.entry.payload_bytes)
            outcome.bytes_read += want.entry.stored_bytes
        # A record that failed was moved, was deleted, or is corrupt.
        for run in runs_of(wanted):
            for want in self.runs.read(located.kind, run, located.fingerprint, tenant=located.tenant, wait=wait):
                if not self._read_again(located, want, outcome):
                    outcome.num_good = min(outcome.num_good, want.number)
        return outcome

    def _read_again(self, located: Located, want: Wanted, outcome: ReadOutcome) -> bool:
        """Look a failed record up again, because compaction may have moved it, or eviction removed it."""
        with self.index.txn() as txn:
            entry = self.index.entry(txn, located.kind, want.hash)
        if entry is None or not entry.live(self._clock_ms()) or entry.tenant_id != want.entry.tenant_id:
            return False
        if (entry.segment, entry.offset) != (want.entry.segment, want.entry.offset):
            moved = Wanted(want.number, want.hash, entry, want.into)
            if moved.locked and not self._reads_locked:
                return False
            same = entry.payload_bytes == want.entry.payload_bytes
            if same and not self.runs.read(located.kind, [moved], located.fingerprint, tenant=located.tenant):
                want.sealed = moved.sealed
                return True
            want.forged = moved.forged
        (outcome.forged if want.forged else outcome.suspects).append(want.hash)
        return False


def _shares(count: int, num_threads: int, record_bytes: int) -> deque[tuple[int, int]]:
    """The shares (first, end) of the records that one thread reads at a time."""
    size = records_per_run(count, num_threads, record_bytes)
    return deque((first, min(first + size, count)) for first in range(0, count, size))


def _joined(found: list[tuple[int, ReadOutcome]]) -> ReadOutcome:
    """The result of all shares of a read: records are good up to the first one that was not read."""
    joined = ReadOutcome()
    for first, outcome in sorted(found, key=lambda share: share[0]):
        joined.suspects += outcome.suspects
        joined.forged += outcome.forged
        if first == joined.num_good:
            joined.num_good += outcome.num_good
            joined.bytes_read += outcome.bytes_read
            joined.locked = outcome.locked
    return joined


def verify(header: RecordHeader, kind: RecordKind, block_hash: bytes, fingerprint: bytes, entry: IndexEntry) -> None:
    """Check that a record's header matches the index and the caller's request.

    Raises:  BlockCorrupt: it does not; the message says what differs.
    """
    for name, found, expected in (
        ("kind", header.kind, kind),
        ("hash", header.hash, block_hash),
        ("fingerprint", header.fingerprint, fingerprint),
        ("place", (header.segment, header.offset), (entry.segment, entry.offset)),
        ("length", (header.stored_bytes, header.payload_bytes), (entry.stored_bytes, entry.payload_bytes)),
        ("codec", header.codec, entry.codec),
    ):
        if found != expected:
            raise BlockCorrupt(
                f"record {block_hash.hex()[:16]}: its {name} is {found!r}, but the index says {expected!r}"
            )
