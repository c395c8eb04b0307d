"""Changes the index: one LMDB transaction that updates the derived tables from the entries that changed.

The engine edits entries. On commit, each changed entry is compared with its old value, and leaves, expiry, totals,
segment counts and the number of quarantined records are updated to match. So the entries and the tables derived from
them cannot disagree.
"""

from __future__ import annotations

import dataclasses
import struct
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from antefix.errors import BlockCorrupt
from antefix.record import RecordKind, RecordName
from antefix.store_files.index import APART_KEY, QUARANTINED_KEY, TABLE_OF_KIND, Change, Index
from antefix.store_files.record_format import SEGMENT_ENTRY, IndexEntry, pack_entry, unpack_entry
from antefix_kvstore.owner_numbers import OwnerNumbers, next_number

TOTALS: Final = struct.Struct("<qqq")
# A key of the table `meta` is this prefix, the kind and the fingerprint.
PLAN_PREFIX: Final = b"plan"
_RANK: Final = struct.Struct(">QB")
_U64: Final = struct.Struct("<Q")


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentState:
    """end: offset at which the committed records stop.  live: bytes and records that the index still names."""

    end: int = 0
    live_bytes: int = 0
    live_records: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class FingerprintState:
    id: int
    digest: bytes
    block_tokens: int


class IndexTxn:
    """One write transaction. The transaction is used as a context manager: it commits at the end, and aborts on an
    exception.
    """

    def __init__(
        self,
        index: Index,
        *,
        before_commit: Callable[[], object] | None = None,
        may_drop: Callable[[int], bool] = lambda _number: False,
    ) -> None:
        """before_commit: called when everything is ready to be committed. If this function raises, the transaction is
        aborted.

        may_drop: whether the transaction may forget a segment that has no live record; `dropped` lists those that it
        forgot.
        """
        self._index = index
        self._before_commit = before_commit
        self._may_drop = may_drop
        self.dropped: list[int] = []
        self._txn: Any = index.env.begin(write=True)
        # name -> the entry in the table, and the entry to be written.
        self._old: dict[RecordName, bytes | None] = {}
        self._new: dict[RecordName, IndexEntry | None] = {}
        self._segments: dict[int, SegmentState | None] = {}
        self._changes: list[Change] = []
        # Every record names a fingerprint, and there are few of them, so they are kept here.
        self._fingerprints: dict[bytes, FingerprintState] = {}
        self._owners = OwnerNumbers(index, self._txn)
        self._totals: dict[bytes, list[int]] = defaultdict(lambda: [0, 0, 0])
        self._live: dict[int, list[int]] = defaultdict(lambda: [0, 0])
        self._num_quarantined = self._num_apart = 0

    def __enter__(self) -> IndexTxn:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None:
            self._txn.abort()
            return
        try:
            self._flush()
            if self._before_commit is not None:
                self._before_commit()
        except BaseException:
            self._txn.abort()
            raise
        self._txn.commit()
        if self._changes and self._index.on_change is not None:
            self._index.on_change(self._changes)

    def get(self, name: RecordName) -> IndexEntry | None:
        """The index entry as this transaction sees it. Changes that the caller makes to the entry are written at
        commit.

        Raises:  BlockCorrupt: the index itself is damaged.
        """
        if name in self._new:
            return self._new[name]
        value = self._txn.get(name[1], db=self._index.db[TABLE_OF_KIND[name[0]]])
        self._old[name] = value
        self._new[name] = None if value is None else _entry(value, name)
        return self._new[name]

    def put(self, name: RecordName, entry: IndexEntry) -> None:
        self.get(name)
        self._new[name] = entry

    def delete(self, name: RecordName) -> None:
        self.get(name)
        self._new[name] = None

    def leaves(self) -> Iterator[tuple[int, RecordName]]:
        """Leaves of the forest as they were at the transaction's start, lowest rank first."""
        for key in _keys(self._txn, self._index.db["leaves"]):
            rank_ms, kind = _RANK.unpack_from(key)
            yield rank_ms, (RecordKind(kind), bytes(key[_RANK.size :]))

    def expiring(self, now_ms: int) -> list[RecordName]:
        """Leaves that had expired at the transaction's start."""
        found = []
        for key in _keys(self._txn, self._index.db["expiry"]):
            expires_ms, kind = _RANK.unpack_from(key)
            if expires_ms > now_ms:
                break
            found.append((RecordKind(kind), bytes(key[_RANK.size :])))
        return found

    def names(self, kind: RecordKind) -> Iterator[tuple[RecordName, IndexEntry]]:
        """Every entry of a kind of record, as at the transaction's start. The whole table is read, so this is for
        repair only.
        """
        with self._txn.cursor(db=self._index.db[TABLE_OF_KIND[kind]]) as cursor:
            for key, value in cursor:
                name = (kind, bytes(key))
                yield name, _entry(value, name)

    def fingerprint(self, digest: bytes) -> FingerprintState | None:
        known = self._fingerprints.get(digest)
        if known is None:
            value = self._txn.get(b"f" + digest, db=self._index.db["names"])
            if value is None:
                return None
            known = self._fingerprints[digest] = self.fingerprint_of(int.from_bytes(value, "little"))
        return known

    def fingerprint_of(self, number: int) -> FingerprintState:
        value = self._txn.get(b"F" + number.to_bytes(4, "little"), db=self._index.db["names"])
        if value is None:
            raise BlockCorrupt(f"the store's index has no fingerprint number {number}")
        return FingerprintState(id=number, digest=bytes(value[:32]), block_tokens=int.from_bytes(value[32:], "little"))

    def set_fingerprint(self, digest: bytes, block_tokens: int) -> FingerprintState:
        known = self.fingerprint(digest)
        number = known.id if known else next_number(self._index, self._txn, b"F")
        names = self._index.db["names"]
        self._txn.put(b"f" + digest, number.to_bytes(4, "little"), db=names)
        self._txn.put(b"F" + number.to_bytes(4, "little"), digest + block_tokens.to_bytes(4, "little"), db=names)
        state = self._fingerprints[digest] = FingerprintState(id=number, digest=digest, block_tokens=block_tokens)
        return state

    def owner_id(self, owner: bytes, generation: int) -> int:
        """The number of a record's owner, for a record that is about to be indexed. A new owner gets a number that was
        never used before.
        """
        return self._owners.number(owner, generation)

    def known_owner_id(self, owner: bytes) -> int | None:
        return self._owners.find(owner)

    def owners(self) -> dict[int, bytes]:
        return self._index.owners(self._txn)

    def forget_empty_owners(self) -> None:
        self._owners.forget_all_empty()

    def segment(self, number: int) -> SegmentState | None:
        if number not in self._segments:
            self._segments[number] = read_segment(self._index, self._txn, number)
        return self._segments[number]

    def set_segment(self, number: int, state: SegmentState | None) -> None:
        self._segments[number] = state

    def count(
        self, totals: Mapping[bytes, Sequence[int]], live: Mapping[int, Sequence[int]], *, num_apart: int
    ) -> None:
        """Add records to the totals that were not inserted through this transaction's entries.

        totals: by key: records, extent bytes and payload bytes.  live: by segment: bytes and records.
        """
        for key, row in totals.items():
            self._totals[key] = [a + b for a, b in zip(self._totals[key], row, strict=True)]
        for number, pair in live.items():
            self._live[number] = [a + b for a, b in zip(self._live[number], pair, strict=True)]
        self._num_apart += num_apart

    def set_meta(self, key: bytes, value: bytes) -> None:
        self._txn.put(key, value, db=self._index.db["meta"])

    def _flush(self) -> None:
        db = self._index.db
        for name, entry in self._new.items():
            raw = self._old[name]
            packed = None if entry is None else pack_entry(entry, name[1])
            if packed == raw:
                continue
            old = None if raw is None else _entry(raw, name)
            self._derive(name, old, entry)
            self._note_change(name, old, entry)
            for state, sign in ((old, -1), (entry, 1)):
                if state is not None:
                    count_entry(self._totals, self._live, name[0], state, sign)
                    self._num_quarantined += sign * state.quarantined
                    self._num_apart += sign * state.apart
            if packed is None:
                self._txn.delete(name[1], db=db[TABLE_OF_KIND[name[0]]])
            else:
                self._txn.put(name[1], packed, db=db[TABLE_OF_KIND[name[0]]])
        for key, delta in self._totals.items():
            self._add_totals(key, delta)
        self._owners.forget_empty(int.from_bytes(key[1:], "little") for key in self._totals if key[:1] == b"t")
        for number, (nbytes, records) in self._live.items():
            before = self.segment(number) or SegmentState()
            self._segments[number] = dataclasses.replace(
                before, live_bytes=before.live_bytes + nbytes, live_records=before.live_records + records
            )
            if before.live_records + records == 0 and self._may_drop(number):
                self._segments[number] = None
                self.dropped.append(number)
        self._write_segments()
        if self._num_quarantined:
            known = self._index.num_quarantined(self._txn)
            self._txn.put(QUARANTINED_KEY, _U64.pack(known + self._num_quarantined), db=db["meta"])
        if self._num_apart:
            known = self._index.num_apart(self._txn)
            self._txn.put(APART_KEY, _U64.pack(known + self._num_apart), db=db["meta"])

    def _derive(self, name: RecordName, old: IndexEntry | None, new: IndexEntry | None) -> None:
        """Update the rows for an entry in the tables of leaves and of expiry times."""
        for table, of in (("leaves", leaf_key), ("expiry", expiry_key)):
            before = of(name, old) if old else None
            after = of(name, new) if new else None
            if before != after:
                if before:
                    self._txn.delete(before, db=self._index.db[table])
                if after:
                    self._txn.put(after, b"", db=self._index.db[table])

    def _note_change(self, name: RecordName, old: IndexEntry | None, new: IndexEntry | None) -> None:
        was, is_now = (entry is not None and not entry.quarantined for entry in (old, new))
        known = new or old
        if was != is_now and known is not None:
            self._changes.append(Change(name[0], name[1], known.fingerprint_id, is_now))

    def _add_totals(self, key: bytes, delta: list[int]) -> None:
        table = self._index.db["totals"]
        value = self._txn.get(key, db=table)
        before = TOTALS.unpack(value) if value else (0, 0, 0)
        self._txn.put(key, TOTALS.pack(*(b + d for b, d in zip(before, delta, strict=True))), db=table)

    def _write_segments(self) -> None:
        table = self._index.db["segments"]
        for number, state in self._segments.items():
            key = number.to_bytes(4, "big")
            if state is None:
                self._txn.delete(key, db=table)
            else:
                value = SEGMENT_ENTRY.pack(state.end, state.live_bytes, state.live_records)
                self._txn.put(key, value, db=table)


def read_segment(index: Index, txn: Any, number: int) -> SegmentState | None:
    value = txn.get(number.to_bytes(4, "big"), db=index.db["segments"])
    return None if value is None else _segment_state(value)


def read_segments(index: Index, txn: Any) -> dict[int, SegmentState]:
    with txn.cursor(db=index.db["segments"]) as cursor:
        return {int.from_bytes(key, "big"): _segment_state(value) for key, value in cursor}


def read_totals(index: Index, txn: Any) -> dict[bytes, tuple[int, int, int]]:
    """For each b"k" + kind and each b"t" + owner id: records, extent bytes, payload bytes."""
    with txn.cursor(db=index.db["totals"]) as cursor:
        return {bytes(key): TOTALS.unpack(value) for key, value in cursor}


def _segment_state(value: bytes) -> SegmentState:
    end, live_bytes, live_records = SEGMENT_ENTRY.unpack(value)
    return SegmentState(end=end, live_bytes=live_bytes, live_records=live_records)


def _entry(value: bytes, name: RecordName) -> IndexEntry:
    entry = unpack_entry(value, name[1])
    if entry is None:
        raise BlockCorrupt(f"the index entry of {name[1].hex()[:16]} is damaged")
    return entry


def _keys(txn: Any, table: Any) -> Iterator[bytes]:
    with txn.cursor(db=table) as cursor:
        yield from cursor.iternext(keys=True, values=False)


def leaf_key(name: RecordName, entry: IndexEntry) -> bytes | None:
    """The key of a leaf. A pinned leaf is sorted by the end of its pin, so eviction need not step over it
    repeatedly.
    """
    return None if entry.children else _RANK.pack(max(entry.rank_ms, entry.pinned_ms), name[0]) + name[1]


def expiry_key(name: RecordName, entry: IndexEntry) -> bytes | None:
    if entry.children or not entry.expires_ms:
        return None
    return _RANK.pack(max(entry.expires_ms, entry.pinned_ms), name[0]) + name[1]


def count_entry(
    totals: dict[bytes, list[int]], live: dict[int, list[int]], kind: RecordKind, entry: IndexEntry, sign: int
) -> None:
    for key in (b"k" + bytes([kind]), b"t" + entry.tenant_id.to_bytes(4, "little")):
        totals[key][0] += sign
        totals[key][1] += sign * entry.extent_bytes
        totals[key][2] += sign * entry.payload_bytes
    # A record that failed a check is dead space, although its entry stays, to be updated when the record is put again.
    if not entry.quarantined:
        live[entry.segment][0] += sign * entry.extent_bytes
        live[entry.segment][1] += sign
