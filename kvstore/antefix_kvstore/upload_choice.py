"""Chooses which records of a store are uploaded to the object store: those that are named, and all records that they
depend on.

Choosing reads the store's index, never its payloads. The catalog of the object store tells which records are there
already.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Final

from antefix.errors import AntefixError
from antefix.objects.catalog import Catalog
from antefix.record import RecordKind, RecordName
from antefix.store_files.record_format import RECORD_HEADER_BYTES, IndexEntry, RecordFlag
from antefix.store_files.record_header import unpack_record_header
from antefix_kvstore.space import LIVE_SHARE_MAX
from antefix_kvstore.storage_engine import StorageEngine

# So many records are looked up in the tier at once, from a leaf towards the root.
_ASKED_AT_ONCE: Final = 64
_SEALED: Final = int(RecordFlag.SEALED)
# A store evicts in small steps. Records to be evicted next are looked for when the store is filled this far.
_NEAR_FULL: Final = LIVE_SHARE_MAX - 0.1
_NEXT_SHARE: Final = 1 / 32


@dataclass(frozen=True, slots=True)
class Chosen:
    """A record to upload. nbytes: size of its payload.  cost_s: time that computing it took."""

    name: RecordName
    fingerprint: bytes
    nbytes: int
    cost_s: float


def stored_before(engine: StorageEngine, names: Iterable[RecordName], before_ms: int) -> list[RecordName]:
    """The records that were stored before `before_ms`."""
    found = []
    with engine.index.txn() as txn:
        entries = [(name, engine.index.entry(txn, *name)) for name in names if name[0] in _KINDS]
    for name, entry in entries:
        if entry is not None and _created_ms(engine, entry) <= before_ms:
            found.append(name)
    return found


_KINDS: Final = (RecordKind.BLOCK, RecordKind.CHECKPOINT)


def _created_ms(engine: StorageEngine, entry: IndexEntry) -> int:
    """When the record was written; 0 if its header cannot be read, which the upload will notice."""
    try:
        raw = engine.segments.read(entry.segment, entry.offset, RECORD_HEADER_BYTES)
        return unpack_record_header(raw, engine.identity.seed).created_ms
    except (AntefixError, OSError):
        return 0


def next_evicted(engine: StorageEngine) -> list[RecordName]:
    """The leaves that eviction takes next, if the store is nearly full."""
    space = engine.space
    if space.used_bytes < _NEAR_FULL * space.limit_bytes:
        return []
    left, names = round(space.limit_bytes * _NEXT_SHARE), []
    with engine.index.txn() as txn:
        for name in _leaves(engine, txn):
            entry = engine.index.entry(txn, *name)
            left -= entry.extent_bytes if entry is not None else 0
            names.append(name)
            if left <= 0:
                break
    return names


def pinned(engine: StorageEngine, now_ms: int) -> list[RecordName]:
    """Leaves of the forest that are pinned; after a restart nothing else is known of pins."""
    with engine.index.txn() as txn:
        names = list(_leaves(engine, txn, from_ms=now_ms))
        entries = [engine.index.entry(txn, *name) for name in names]
    return [name for name, entry in zip(names, entries, strict=True) if entry is not None and entry.pinned_ms > now_ms]


def _leaves(engine: StorageEngine, txn: Any, from_ms: int = 0) -> Iterator[RecordName]:
    with txn.cursor(db=engine.index.db["leaves"]) as cursor:
        if cursor.set_range(from_ms.to_bytes(8, "big")):
            for key in cursor.iternext(keys=True, values=False):
                yield RecordKind(key[8]), bytes(key[9:])


def choose(
    engine: StorageEngine, catalog: Catalog, names: Iterable[RecordName], *, alive_ms: Mapping[RecordKind, int]
) -> list[Chosen]:
    """These records and their ancestors, up to those that the object store has, parents first.

    alive_ms: by kind, the time until which a copy must live to count as present. Records of version 1 are not uploaded,
    because outside this store nobody can tell their owner.
    """
    found: dict[RecordName, Chosen] = {}
    with engine.index.txn() as txn:
        fingerprints = engine.index.fingerprints(txn)
        for name in _lacking(catalog, names, alive_ms):
            for step, entry in reversed(list(_up(engine, txn, catalog, name, found, alive_ms))):
                digest = fingerprints.get(entry.fingerprint_id)
                if digest is not None and entry.flags & _SEALED and not entry.quarantined:
                    found[step] = Chosen(step, digest, entry.payload_bytes, entry.cost_ms / 1000)
    return list(found.values())


def _lacking(catalog: Catalog, names: Iterable[RecordName], alive_ms: Mapping[RecordKind, int]) -> Iterator[RecordName]:
    """Those of the records that the object store does not have. All names of a kind are looked up in one search,
    because the object store has most records that are named repeatedly.
    """
    by_kind: dict[RecordKind, list[bytes]] = {}
    for kind, hash in names:
        by_kind.setdefault(kind, []).append(hash)
    for kind, hashes in by_kind.items():
        places = catalog.find(kind, hashes, alive_ms=alive_ms[kind])
        yield from ((kind, hash) for hash, place in zip(hashes, places, strict=True) if place is None)


def _up(
    engine: StorageEngine,
    txn: Any,
    catalog: Catalog,
    name: RecordName,
    taken: dict[RecordName, Chosen],
    alive_ms: Mapping[RecordKind, int],
) -> Iterator[tuple[RecordName, IndexEntry]]:
    """From a record towards its root, until a record that is not stored here, is chosen already, or is in the tier."""
    block = name[1]
    if name[0] is RecordKind.CHECKPOINT:
        entry = engine.index.entry(txn, *name)
        if entry is None:
            return
        if name not in taken:
            yield name, entry
    while True:
        steps: list[tuple[RecordName, IndexEntry]] = []
        while len(steps) < _ASKED_AT_ONCE:
            step = (RecordKind.BLOCK, block)
            entry = engine.index.entry(txn, *step)
            if entry is None or step in taken:
                break
            steps.append((step, entry))
            block = entry.parent
        places = catalog.find(RecordKind.BLOCK, [hash for (_, hash), _ in steps], alive_ms=alive_ms[RecordKind.BLOCK])
        for each, place in zip(steps, places, strict=True):
            if place is not None:
                return
            yield each
        if len(steps) < _ASKED_AT_ONCE:
            return


def by_kind_and_fingerprint(chosen: Sequence[Chosen]) -> Iterator[tuple[RecordKind, bytes, list[Chosen]]]:
    """Group the records so that each group can be read in one call."""

    def group(each: Chosen) -> tuple[int, bytes]:
        return each.name[0], each.fingerprint

    for (kind, fingerprint), members in groupby(sorted(chosen, key=group), key=group):
        yield RecordKind(kind), fingerprint, list(members)
