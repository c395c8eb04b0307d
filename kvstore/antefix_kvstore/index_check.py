"""Checks after a crash, when no checksum covers the whole index, whether the index is consistent.

The index's structure is checked first (`index_structure`), then each entry by its own checksum. All other tables
follow from the entries, so they are derived again (`index_sums`) and compared. Keys are compared as sums of their
hashes, so memory does not grow with the index.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lmdb

from antefix.errors import Unavailable
from antefix.record import RecordKind
from antefix.store_files import codec
from antefix.store_files.index import DATA_FILE, TABLES, Index, owner_of
from antefix.store_files.record_format import HASH_BYTES
from antefix_kvstore.index_structure import structure_fault
from antefix_kvstore.index_sums import Derived
from antefix_kvstore.index_writer import PLAN_PREFIX, read_segments, read_totals


def index_fault(directory: Path) -> str | None:
    """What is wrong with the index in a directory to which nobody writes now. None: the index may be opened and
    trusted.
    """
    derived = Derived()
    if fault := structure_fault(directory / DATA_FILE, TABLES, derived.add):
        return fault
    try:
        index = Index(directory, mapped=True)
    except Unavailable as err:
        return str(err)
    try:
        return _content_fault(index, derived)
    except lmdb.Error as err:
        return str(err)
    finally:
        index.close()


def _content_fault(index: Index, derived: Derived) -> str | None:
    """What is wrong, or None.  Raises:  lmdb.Error: LMDB itself cannot read it."""
    with index.txn() as txn:
        faults = (
            *_key_faults(derived),
            *_segment_faults(index, txn, derived),
            *_total_faults(index, txn, derived),
            *_name_faults(index, txn, derived),
            *_plan_faults(index, txn),
        )
        return faults[0] if faults else None


def _key_faults(derived: Derived) -> Iterator[str]:
    pairs = {"leaves": (derived.leaves, derived.found_leaves), "expiry": (derived.expiry, derived.found_expiry)}
    for table, (implied, found) in pairs.items():
        if implied != found:
            yield f"its table of {table} does not follow from its entries"


def _segment_faults(index: Index, txn: Any, derived: Derived) -> Iterator[str]:
    try:
        states = read_segments(index, txn)
    except struct.error:
        yield "its table of segments is damaged"
        return
    # Quarantined records are not live: their segment may be gone. The end of a segment is not derived: recovery sets it
    # after indexing the records behind it, and may be killed in between.
    if derived.live.keys() - states.keys():
        yield "an entry names an unknown segment"
    for number, state in states.items():
        if [state.live_bytes, state.live_records] != derived.live.get(number, [0, 0]):
            yield f"it counts segment {number} wrongly"


def _total_faults(index: Index, txn: Any, derived: Derived) -> Iterator[str]:
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
        yield "it counts records without a parent wrongly"


def _name_faults(index: Index, txn: Any, derived: Derived) -> Iterator[str]:
    """Names and numbers of owners and fingerprints must map to each other, and every number in use must be
    among them.
    """
    with txn.cursor(db=index.db["names"]) as cursor:
        rows = {bytes(key): bytes(value) for key, value in cursor}
    # Owners have two kinds of names, but one set of ids.
    for letters, used in (((b"f",), derived.fingerprint_ids), ((b"t", b"o"), derived.tenant_ids)):
        to_id = {key: value for key, value in rows.items() if key[:1] in letters}
        names = {
            key[1:]: letter + value[:HASH_BYTES] if letter == b"f" else owner_of(letter, value)
            for letter in letters
            for key, value in rows.items()
            if key[:1] == letter.upper()
        }
        if {number: name for name, number in to_id.items()} != names or len(to_id) != len(names):
            yield "its names and ids do not match"
        last = int.from_bytes(rows.get(b"#" + letters[0].upper(), b""), "little")
        if any(len(number) != 4 or int.from_bytes(number, "little") > last for number in names):
            yield "it gave out an id that it does not know of"
        if used - {int.from_bytes(number, "little") for number in names}:
            yield "an entry has an id without a name"
    for number, positions in derived.first_positions.items():
        row = rows.get(b"F" + number.to_bytes(4, "little"), b"")
        if len(row) != HASH_BYTES + 4 or positions != {int.from_bytes(row[HASH_BYTES:], "little")}:
            yield "a first block ends at another position than the first blocks of its fingerprint"


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
