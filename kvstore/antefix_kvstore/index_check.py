"""Is an index, sound in structure, what its entries say? What a crash left has no checksum over all of it.

Entries carry their own checksums. All other tables follow from them, so they are derived once more and compared, keys
as sums of their hashes, which takes no memory however many there are.
"""

from __future__ import annotations

import struct
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final

import xxhash

from antefix.record import RecordKind, RecordName
from antefix.store_files import codec
from antefix.store_files.index import TABLE_OF_KIND, Index, owner_of
from antefix.store_files.record_format import HASH_BYTES, IndexEntry, RecordFlag, unpack_entry
from antefix_kvstore.index_writer import PLAN_PREFIX, count_entry, expiry_key, leaf_key, read_segments, read_totals

_FIRST: Final = int(RecordFlag.FIRST)


@dataclass(slots=True)
class _KeySum:
    """How many keys, and the sum of their hashes: in any order."""

    count: int = 0
    total: int = 0

    def add(self, key: bytes | None) -> None:
        if key is not None:
            self.count += 1
            self.total += xxhash.xxh3_64_intdigest(key)


@dataclass(slots=True)
class _Derived:
    """What the entries imply."""

    leaves: _KeySum = field(default_factory=_KeySum)
    expiry: _KeySum = field(default_factory=_KeySum)
    totals: dict[bytes, list[int]] = field(default_factory=lambda: defaultdict(lambda: [0, 0, 0]))
    live: dict[int, list[int]] = field(default_factory=lambda: defaultdict(lambda: [0, 0]))
    fingerprint_ids: set[int] = field(default_factory=set)
    tenant_ids: set[int] = field(default_factory=set)
    # Fingerprint id to the positions of first blocks.
    first_positions: dict[int, set[int]] = field(default_factory=lambda: defaultdict(set))
    num_quarantined: int = 0
    num_apart: int = 0

    def add(self, name: RecordName, entry: IndexEntry) -> None:
        self.leaves.add(leaf_key(name, entry))
        self.expiry.add(expiry_key(name, entry))
        count_entry(self.totals, self.live, name[0], entry, 1)
        self.fingerprint_ids.add(entry.fingerprint_id)
        self.tenant_ids.add(entry.tenant_id)
        if entry.flags & _FIRST:
            self.first_positions[entry.fingerprint_id].add(entry.position)
        self.num_quarantined += entry.quarantined
        self.num_apart += entry.apart


def content_fault(index: Index) -> str | None:
    """What is wrong, or None.  Raises:  lmdb.Error: LMDB itself cannot make sense of it."""
    with index.txn() as txn:
        derived = _Derived()
        for kind in (RecordKind.BLOCK, RecordKind.CHECKPOINT):
            with txn.cursor(db=index.db[TABLE_OF_KIND[kind]]) as cursor:
                for key, value in cursor:
                    entry = unpack_entry(value, key)
                    if entry is None:
                        return "an entry is damaged"
                    derived.add((kind, key), entry)
        faults = (
            *_key_faults(index, txn, derived),
            *_segment_faults(index, txn, derived),
            *_total_faults(index, txn, derived),
            *_name_faults(index, txn, derived),
            *_plan_faults(index, txn),
        )
        return faults[0] if faults else None


def _key_faults(index: Index, txn: Any, derived: _Derived) -> Iterator[str]:
    for table, expected in (("leaves", derived.leaves), ("expiry", derived.expiry)):
        found = _KeySum()
        with txn.cursor(db=index.db[table]) as cursor:
            for key in cursor.iternext(keys=True, values=False):
                found.add(key)
        if found != expected:
            yield f"its table of {table} does not follow from its entries"


def _segment_faults(index: Index, txn: Any, derived: _Derived) -> Iterator[str]:
    try:
        states = read_segments(index, txn)
    except struct.error:
        yield "its table of segments is damaged"
        return
    # Quarantined records are not live: their segment may be gone. Where a segment ends is not derived: recovery sets it
    # after it has indexed what lay behind, and may be killed in between.
    if derived.live.keys() - states.keys():
        yield "an entry names an unknown segment"
    for number, state in states.items():
        if [state.live_bytes, state.live_records] != derived.live.get(number, [0, 0]):
            yield f"it counts segment {number} wrongly"


def _total_faults(index: Index, txn: Any, derived: _Derived) -> Iterator[str]:
    try:
        found = {key: list(row) for key, row in read_totals(index, txn).items() if any(row)}
    except struct.error:
        yield "its totals are damaged"
        return
    if found != {key: row for key, row in derived.totals.items() if any(row)}:
        yield "its totals do not follow from its entries"
    if index.num_quarantined(txn) != derived.num_quarantined:
        yield "it counts quarantined records wrongly"
    if index.num_apart(txn) != derived.num_apart:
        yield "it counts records apart from their parents wrongly"


def _name_faults(index: Index, txn: Any, derived: _Derived) -> Iterator[str]:
    """Names and ids must lead to each other, and every id that is used must be among them."""
    with txn.cursor(db=index.db["names"]) as cursor:
        rows = {bytes(key): bytes(value) for key, value in cursor}
    # Owners have two kinds of names, and one row of ids.
    for letters, used in (((b"f",), derived.fingerprint_ids), ((b"t", b"o"), derived.tenant_ids)):
        to_id = {key: value for key, value in rows.items() if key[:1] in letters}
        names = {
            key[1:]: letter + value[:HASH_BYTES] if letter == b"f" else owner_of(letter, value)
            for letter in letters
            for key, value in rows.items()
            if key[:1] == letter.upper()
        }
        if {number: name for name, number in to_id.items()} != names or len(to_id) != len(names):
            yield "its names and ids do not lead to each other"
        last = int.from_bytes(rows.get(b"#" + letters[0].upper(), b""), "little")
        if any(len(number) != 4 or int.from_bytes(number, "little") > last for number in names):
            yield "it gave out an id that it does not know of"
        if used - {int.from_bytes(number, "little") for number in names}:
            yield "an entry has an id without a name"
    for number, positions in derived.first_positions.items():
        row = rows.get(b"F" + number.to_bytes(4, "little"), b"")
        if len(row) != HASH_BYTES + 4 or positions != {int.from_bytes(row[HASH_BYTES:], "little")}:
            yield "a first block does not end where one of its fingerprint does"


def _plan_faults(index: Index, txn: Any) -> Iterator[str]:
    with txn.cursor(db=index.db["meta"]) as cursor:
        for key, value in cursor:
            if not key.startswith(PLAN_PREFIX):
                continue
            try:
                RecordKind(key[len(PLAN_PREFIX)])
                readable = codec.read_plan(value)[0].encoded == value
            except (ValueError, IndexError, struct.error):
                readable = False
            if not readable or len(key) != len(PLAN_PREFIX) + 1 + HASH_BYTES:
                yield "a plan of compression is damaged"
