"""The store as a library: one writer, durable puts, checked reads, a hard budget.

    1. admit     decide which records are new, which exist, which lack a parent
    2. make room expire, evict and compact until the batch fits the budget
    3. append    write to the active segment, then fdatasync
    4. commit    commit the index transaction; only now is a record stored

A reader in any process sees a record only after step 4. All calls block; callers that must not wait use
`antefix_kvstore.group_commit`. The engine never sees tokens, tensors or protobuf.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Final

import lmdb

from antefix.block import STATEMENT_BYTES_MAX, digest_of, is_statement
from antefix.errors import AntefixError, InvalidRequest
from antefix.events.block_events import BlockEvent
from antefix.events.numbered_log import Batch
from antefix.record import (
    STORED_KINDS,
    Held,
    LookupResult,
    PutResult,
    Record,
    RecordKind,
    RecordName,
    RefusalReason,
)
from antefix.secret import Keyring
from antefix.store_files import codec
from antefix.store_files.encryption import KeyRing
from antefix.store_files.hit_log import StoreLog
from antefix.store_files.index import Change
from antefix.store_files.owners import Owners
from antefix.store_files.read_log import announce_log
from antefix.store_files.record_format import RecordFlag
from antefix.store_files.segment_reader import ReadOutcome, StoreReader, wall_ms
from antefix_kvstore.admission import admit, batches_of, check_record, results_of
from antefix_kvstore.batch_writer import BatchWriter
from antefix_kvstore.compression import Compression
from antefix_kvstore.disk import Disk
from antefix_kvstore.disk_probe import read_bytes_per_s
from antefix_kvstore.disk_reserve import is_full
from antefix_kvstore.drafting import Drafter
from antefix_kvstore.event_log import EventLog
from antefix_kvstore.eviction import EvictionPolicy
from antefix_kvstore.free_space import FreeSpace
from antefix_kvstore.index_faults import IndexDamaged, fault_of, told
from antefix_kvstore.index_forest import drop_subtrees
from antefix_kvstore.index_writer import IndexTxn, read_totals
from antefix_kvstore.kept_records import is_sound, owned_records, pin_records, records_of_owner
from antefix_kvstore.kvstore_config import KvStoreConfig
from antefix_kvstore.opening import drop_locked, load_plans, log_newest
from antefix_kvstore.recovery import open_store
from antefix_kvstore.registration import register_fingerprint, set_plans
from antefix_kvstore.space import Space
from antefix_kvstore.storage_counters import StorageCounters
from antefix_kvstore.tenant_quota import Quotas
from antefix_kvstore.touches import Touches

log = logging.getLogger("antefix_kvstore.storage_engine")

# How often `maintain` should be called; the bytes that one call may copy follow from it.
MAINTAIN_S: Final = 0.25
# Background compaction takes segments of which this share is dead, so it copies at most one byte per byte freed.
HALF_DEAD: Final = 0.5
# A hundred years.
PIN_S_MAX: Final = 3_153_600_000
# Reasons for refusal that no change in the store's state removes.
_FOR_EVER: Final = (RefusalReason.INVALID, RefusalReason.NO_KEY, RefusalReason.TOO_LARGE)


class StorageEngine:
    """One store directory, open for writing. The engine is thread-safe; only one thread writes at a time."""

    def __init__(
        self,
        config: KvStoreConfig,
        *,
        disk: Disk | None = None,
        clock_ms: Callable[[], int] = wall_ms,
        policy: EvictionPolicy | None = None,
        free: FreeSpace | None = None,
    ) -> None:
        """Open or create the store in `config.dir`, also after a crash.

        Raises:  ConfigError: not a store, another format version, or in use by another process.
        """
        self.config = config
        self.policy = policy or EvictionPolicy()
        self.clock_ms = clock_ms
        self.counters = StorageCounters()
        self._lock = threading.RLock()
        self._counters_lock = threading.Lock()
        self._touches = Touches()
        owners = Owners(Keyring.from_file(config.secret_file) if config.secret_file else None)
        keys = _keys(config, owners)
        self._store = open_store(config, disk or Disk(), clock_ms)
        self.identity = self._store.identity
        self.index = self._store.index
        self.segments = self._store.segments
        self.reader = StoreReader(
            config.dir, clock_ms=clock_ms, decrypt=keys.decrypt if keys else None, index=self.index
        )
        # Called with a policy of `object_config.POLICIES` and records that the object tier may want under it.
        self.on_wanted: Callable[[str, Sequence[RecordName]], None] = lambda _policy, _names: None
        # Damage that a read or write found in the index, kept until it is rebuilt; and why the last rebuild failed.
        self._damage = self._unhealed = ""
        # `counters.bytes_read` when background compaction last ran.
        self._bytes_read_before = 0
        self.events = EventLog(self.index)
        self.index.on_change = self._publish
        self.space = Space(
            self.segments,
            self.index,
            config.budget_bytes,
            now_ms=clock_ms,
            free=free or FreeSpace(Path(config.dir), config.free_bytes_min),
        )
        self.space.compactor.on_corrupt = self.quarantine
        self.space.compactor.on_dropped = self.reader.runs.files.let_go
        self.compression = Compression(config.compression, lambda: read_bytes_per_s(Path(config.dir)))
        self._drafter = Drafter(config, self.compression, keys, clock_ms)
        self.writer = BatchWriter(
            self.index,
            self.segments,
            self.space,
            drafter=self._drafter,
            quotas=Quotas(config, owners),
            policy=self.policy,
            touches=self._touches,
            counters=self.counters,
            clock_ms=clock_ms,
            durable=config.durable,
        )
        self._usage_log = StoreLog(Path(config.usage_log_dir)) if config.usage_log_dir else None
        announce_log(Path(config.dir), config.usage_log_dir)
        try:
            self._prepare(keys)
        except BaseException:
            self.abandon()
            raise

    def _prepare(self, keys: KeyRing | None) -> None:
        """What is done once (`antefix_kvstore.opening`), before the engine serves anybody."""
        self.space.reserve.hold()
        if self._usage_log is not None:
            log_newest(self.segments, self._usage_log)
        load_plans(self.index, self.compression)
        if keys is not None:
            drop_locked(self.index, self.space, keys)

    @property
    def is_open(self) -> bool:
        return self._store.is_open

    def close(self) -> None:
        """Write everything that is only in memory, and store the index's checksum, so that the next opening can trust
        the index.
        """
        with self._lock:
            if self.space.free.is_sudden:
                # Storing the checksum needs disk space; the next opening makes the reserve again.
                self.space.reserve.release()
            self.flush_touches()
            self.writer.close()
            self._drafter.close()
            self.reader.close()
            self._store.close()
            if self._usage_log is not None:
                self._usage_log.close()

    def abandon(self) -> None:
        """Close the files as a crash would, without writing anything. For tests of recovery."""
        with self._lock:
            self.writer.close()
            self._drafter.close()
            self.reader.close()
            self._store.abandon()

    # --- reading -------------------------------------------------------------------------------------------------

    def lookup(
        self, chain: Sequence[bytes], *, fingerprint: bytes, owners: Collection[bytes] | None = None
    ) -> LookupResult:
        with self._telling():
            return self.index.lookup(chain, fingerprint=fingerprint, now_ms=self.clock_ms(), owners=owners)

    def held(self, chain: Sequence[bytes], *, fingerprint: bytes, owners: Collection[bytes] | None = None) -> Held:
        with self._telling():
            held = self.index.held(chain, fingerprint=fingerprint, now_ms=self.clock_ms(), owners=owners)
            return self.reader.page_cache.sampled(held, chain)

    def owned(self, names: Iterable[RecordName], owners: Collection[bytes]) -> list[RecordName]:
        """The records that these owners have stored."""
        with self.index.txn() as txn:
            ids = self.index.owner_ids(txn, owners) or frozenset()
            entries = [(name, self.index.entry(txn, *name)) for name in names]
        return [name for name, entry in entries if entry is not None and entry.tenant_id in ids]

    def read_blocks(self, hashes: Sequence[bytes], into: Sequence[memoryview], *, fingerprint: bytes) -> ReadOutcome:
        """Fill the buffers `into`, and record the use of the records. Records that the reader found damaged are checked
        again and quarantined.
        """
        outcome = self.reader.read_blocks(hashes, into, fingerprint=fingerprint)
        self.settle(RecordKind.BLOCK, hashes, outcome, num_missed=len(hashes) - outcome.num_good)
        return outcome

    def read(self, kind: RecordKind, block_hash: bytes, *, fingerprint: bytes) -> bytearray | None:
        payload, outcome = self.reader.read(kind, block_hash, fingerprint=fingerprint)
        self.settle(kind, [block_hash], outcome, num_missed=int(payload is None))
        return payload

    def settle(self, kind: RecordKind, hashes: Sequence[bytes], outcome: ReadOutcome, *, num_missed: int) -> None:
        """Count what a read of `hashes` found, and note uses and suspects."""
        used = [(kind, hashes[outcome.num_good - 1])] if outcome.num_good else []
        suspects = [(kind, suspect) for suspect in outcome.suspects]
        self.note_use(used, suspects, hits=outcome.num_good, misses=num_missed, bytes_read=outcome.bytes_read)

    def note_use(
        self,
        used: Iterable[RecordName],
        suspects: Iterable[RecordName],
        *,
        forged: Iterable[RecordName] = (),
        unusable: Iterable[RecordName] = (),
        hits: int = 0,
        misses: int = 0,
        bytes_read: int = 0,
    ) -> None:
        """Note what readers did.

        used: the last record of each path that was read.  suspects: records that a reader found damaged.  forged:
        records without a right seal. unusable: records whose content is not valid numbers. The call waits for a commit
        only if there are damaged records to report, so reads do not wait for writes.
        """
        names = list(used)
        self._touches.add(names, self.clock_ms())
        self.on_wanted("reused", names)
        with self._counters_lock:
            self.counters.hits += hits
            self.counters.misses += misses
            self.counters.bytes_read += bytes_read
        if self._usage_log is not None:
            self._usage_log.read([block_hash for kind, block_hash in names if kind is RecordKind.BLOCK])
        for name in suspects:
            self.quarantine(name)
        for name in forged:
            self.counters.forged += self.quarantine(name, judge=False)
        for name in unusable:
            self.counters.unusable += self.quarantine(name, judge=False)

    # --- writing -------------------------------------------------------------------------------------------------

    def put(self, records: Sequence[Record]) -> PutResult:
        """Store the records of one put; see `put_group`.

        Raises:  InvalidRequest: as `check`; no record was stored.
        """
        self.check(records)
        return self.put_group([records])[0]

    def put_group(self, puts: Sequence[Sequence[Record]]) -> list[PutResult]:
        """Store several puts with one sync. In `durable` mode, records reported as stored survive a power loss.

        The caller has run `check` on each put separately, so that a malformed record does not fail other callers' puts.
        """
        with self._lock, self._telling():
            self._check_directory()
            merged = [record for records in puts for record in records]
            with self.index.txn() as snapshot:
                admission = admit(self.index, snapshot, merged, refusal=self._drafter.refusal)
            for batch in batches_of(admission.new, self.config):
                self.writer.put(batch, admission)
            self.counters.refused += len(admission.refused)
            for refusal in admission.refused.values():
                if refusal.reason in _FOR_EVER:
                    self.note_impossible(refusal.text)
            self._touches.add(admission.existing, self.clock_ms())
            return results_of(puts, admission)

    def check(self, records: Sequence[Record]) -> None:
        """Raises:  InvalidRequest: a record can never be stored. It is counted, and the statistics name the reason."""
        try:
            for record in records:
                registered_bytes = self.compression.registered_bytes(record.fingerprint, record.kind)
                check_record(record, self.config.record_bytes_max, registered_bytes)
        except InvalidRequest as err:
            self.note_impossible(str(err))
            raise

    def note_impossible(self, reason: str) -> None:
        """Count a record that can never be stored under the present settings."""
        with self._counters_lock:
            self.counters.impossible += 1
            self.counters.last_impossible = reason

    def register(
        self,
        fingerprint: bytes,
        block_tokens: int,
        plans: Mapping[RecordKind, codec.PlanePlan],
        *,
        statement: bytes = b"",
    ) -> None:
        """Register what a fingerprint means: tokens per block, how payloads may be compressed, a statement of its
        origin.

        Raises:  InvalidRequest: the statement belongs to another fingerprint, or is none.  FingerprintMismatch: the
        block size is known already, and is another.
        """
        if statement and digest_of(statement) != fingerprint:
            raise InvalidRequest(
                "the statement of the worker's settings does not match the fingerprint, which must be its digest"
            )
        if statement and not is_statement(statement):
            raise InvalidRequest(
                f"the statement of the worker's settings must be an object of JSON with texts and numbers, of at most"
                f" {STATEMENT_BYTES_MAX:,} bytes; nothing was registered"
            )
        with self._lock:
            with IndexTxn(self.index) as txn:
                register_fingerprint(txn, fingerprint, block_tokens, plans, statement)
            for kind, plan in plans.items():
                self.compression.register(fingerprint, kind, plan)

    def flush_touches(self) -> None:
        with self._lock:
            if self._touches:
                with IndexTxn(self.index) as txn:
                    self._touches.apply(txn, self.policy)

    # --- keeping -------------------------------------------------------------------------------------------------

    def pin(self, names: Iterable[RecordName], duration_s: float, *, owner: bytes | None = None) -> int:
        """Keep records from eviction for a time; 0 unpins them. Returns how many of the records are stored.

        owner: who they must belong to (`antefix.store_files.record_header.owner_row`); None: anybody.
        Raises:  InvalidRequest: the duration is invalid.
        """
        if not 0 <= duration_s <= PIN_S_MAX:
            raise InvalidRequest(f"records can be pinned for 0 to {PIN_S_MAX} s, not for {duration_s} s")
        until_ms = self.clock_ms() + round(duration_s * 1000) if duration_s > 0 else 0
        with self._lock, IndexTxn(self.index) as txn:
            pinned = pin_records(txn, names, until_ms, owner=owner)
        if until_ms:
            self.on_wanted("pinned", pinned)
        return len(pinned)

    def evict(self, names: Iterable[RecordName], *, owner: bytes | None = None) -> int:
        """Delete records and all records that depend on them, pinned or not. Returns how many were dropped."""
        with self._lock, IndexTxn(self.index) as txn:
            num_gone = drop_subtrees(txn, self.space, owned_records(txn, names, owner))
        self.counters.asked += num_gone
        return num_gone

    def purge(self, owner: bytes) -> int:
        """Delete all records of an owner; if the owner names no user, those of the whole tenant. Returns how many were
        dropped.

        owner: as the index has it (`antefix.store_files.record_header.owner_row`).
        """
        with self._lock, IndexTxn(self.index) as txn:
            num_gone = drop_subtrees(txn, self.space, records_of_owner(txn, owner))
        self.counters.asked += num_gone
        return num_gone

    def quarantine(self, name: RecordName, *, judge: bool = True) -> bool:
        """Read a record again that a reader found damaged; if it is damaged, it counts as missing from now on. Returns
        whether the record counts as missing now.

        judge: False makes it a miss without reading it, where only the caller can tell: a forged seal has right
        checksums.
        """
        if name[0] not in STORED_KINDS:
            return False
        with self._lock, IndexTxn(self.index) as txn:
            entry = txn.get(name)
            if entry is None or entry.quarantined:
                return False
            if judge and is_sound(txn, self.segments, name, entry):
                return False
            entry.flags |= RecordFlag.QUARANTINED
        self.counters.corrupt += judge
        return True

    def maintain(self) -> None:
        """The engine's background work: record uses, delete expired records, compact at the allowed rate, and repair
        damaged files.
        """
        with self._lock:
            if fault := self._damage or fault_of(self._store):
                self._heal(fault)
                return
            try:
                with self._telling():
                    self._tidy()
            except IndexDamaged:
                return  # the next call rebuilds the index
            except (lmdb.Error, OSError) as err:
                # Reads still work. The next put, or the next call, finds room or reports why not.
                if not is_full(err, self.index.directory):
                    raise
                log.debug(
                    "the disk has no room for the work of deleting expired records and compacting segments: %s", err
                )

    def read_back(self) -> bool:
        """Read some of the newest records into the page cache, if their puts bypassed it. False: nothing is left to be
        read.
        """
        with self._lock:
            return self.segments.fresh.read_some()

    def _tidy(self) -> None:
        self.space.follow_disk()
        self.flush_touches()
        self.space.expire()
        self.index.env.reader_check()
        if self.space.free.is_sudden:
            # Touches and expiry need space before they free any, and compaction copies before it deletes.
            return
        self.space.reserve.hold()
        self.compact_in_background()

    def compact_in_background(self, gain_min: float = HALF_DEAD) -> int | None:
        """One step of background compaction, at the allowed rate; at half of it if payloads were read since the last
        step, so that reads are hardly slowed.

        gain_min: as for `Compactor.compact_step`. Returns the bytes copied; None if no segment is worth compacting.
        """
        with self._lock:
            before, self._bytes_read_before = self._bytes_read_before, self.counters.bytes_read
            seconds = MAINTAIN_S if self._bytes_read_before == before else MAINTAIN_S / 2
            return self.space.compactor.compact_step(gain_min, round(self.config.compact_bytes_per_s * seconds))

    def _check_directory(self) -> None:
        """Raises:  IndexDamaged: the files in our directory are not ours (another writer's, perhaps), or are
        damaged.
        """
        if not self._store.lock.is_of_the_present:
            self.note_damage("its directory is gone or was replaced")
        if self._damage:
            raise IndexDamaged("the store's files were harmed; it accepts records again after the repair")

    def note_damage(self, what: str) -> None:
        """Note that the index is damaged, so that it is soon rebuilt from the segments."""
        self._damage = self._damage or what

    def _telling(self) -> AbstractContextManager[None]:
        return told(self.index.directory, self.note_damage)

    def _heal(self, fault: str) -> None:
        """Use the files that the directory holds now: rebuild the index from the segments, or start empty if all files
        are gone.
        """
        try:
            self._store.renew(self.config, self.clock_ms)
        except (AntefixError, OSError, lmdb.Error) as err:
            # Nothing is stored or found until the rebuild succeeds; each call of `maintain` tries again.
            self._damage = fault
            if str(err) != self._unhealed:
                log.exception("the store in %s cannot be used: %s", self.config.dir, fault)
            self._unhealed = str(err)
            return
        self._damage = self._unhealed = ""
        self.identity = self._store.identity
        self.reader.renew(self.identity.seed)
        self.space.compactor.restart()
        self._touches.take()
        with IndexTxn(self.index) as txn:
            set_plans(txn, self.compression.registered())
        announce_log(Path(self.config.dir), self.config.usage_log_dir)
        self.events.restart()
        self.counters.heals += 1
        num_records = sum(records for key, (records, _, _) in self.totals().items() if key[:1] == b"k")
        log.error("the store in %s was harmed: %s; it continues with %d records", self.config.dir, fault, num_records)

    def _publish(self, changes: list[Change]) -> None:
        self.events.publish(changes)
        self.on_wanted("all", [(change.kind, change.hash) for change in changes if change.present])
        if self._usage_log is not None:
            self._usage_log.stored(
                [change.hash for change in changes if change.present and change.kind is RecordKind.BLOCK]
            )

    def snapshot(self) -> Iterator[Batch[BlockEvent]]:
        """All stored records, for a watcher that cannot resume from its cursor."""
        with self._lock:
            return self.events.snapshot()

    @property
    def num_log_lines_lost(self) -> int:
        return self._usage_log.num_lost if self._usage_log is not None else 0

    def totals(self) -> dict[bytes, tuple[int, int, int]]:
        with self.index.txn() as txn:
            return read_totals(self.index, txn)


def _keys(config: KvStoreConfig, owners: Owners) -> KeyRing | None:
    if config.encrypt_key_file:
        return KeyRing.from_master_file(Path(config.encrypt_key_file))
    return KeyRing.from_file(Path(config.keys_file), owners) if config.keys_file else None
