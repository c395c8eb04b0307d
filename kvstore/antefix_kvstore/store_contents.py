"""The contents of a store directory. Any process on the host may read these contents, also while a service serves the
store.

Records come as stretches of chains, parents first, so that another store can store them in this order.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from antefix.record import Record, RecordKind, RecordName
from antefix.store.record_source import records_of
from antefix.store_files import codec
from antefix.store_files.index import TABLE_OF_KIND
from antefix.store_files.read_runs import Decrypt
from antefix.store_files.record_format import SEGMENT_DIR, IndexEntry, unpack_entry
from antefix.store_files.segment_reader import StoreReader
from antefix_kvstore.identity import no_store
from antefix_kvstore.index_writer import PLAN_PREFIX

_BATCH_RECORDS: Final = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Stretch:
    """Consecutive blocks of one chain, with their checkpoints. Each record is in exactly one stretch.

    hashes: parents first. Blocks before them are in another stretch, or not stored here.  checkpoints: those of the
    blocks that have one.  owner: the owner's row in the index.  rank_ms, pinned_ms: the largest of any record, as in
    eviction.
    has_blocks: False for a checkpoint whose block is in another store; `hashes` then has the checkpoint's hash.
    ttls_s, costs_ms: time to live and cost of each record, in the order of `names`.
    """

    fingerprint: bytes
    owner: bytes
    hashes: tuple[bytes, ...]
    checkpoints: tuple[int, ...]
    rank_ms: int
    pinned_ms: int
    nbytes: int
    has_blocks: bool = True
    ttls_s: tuple[int, ...] = ()
    costs_ms: tuple[int, ...] = ()

    def part(self, start: int, stop: int) -> Stretch:
        """Blocks [start, stop) with their checkpoints. Other fields are kept; the number of bytes is scaled to the
        part.
        """
        chosen = [number for number, block in enumerate(self.checkpoints) if start <= block < stop]
        kept = [*range(start, stop), *(len(self.hashes) + number for number in chosen)]
        return dataclasses.replace(
            self,
            hashes=self.hashes[start:stop],
            checkpoints=tuple(self.checkpoints[number] - start for number in chosen),
            nbytes=self.nbytes * (stop - start) // len(self.hashes),
            ttls_s=tuple(self.ttls_s[number] for number in kept),
            costs_ms=tuple(self.costs_ms[number] for number in kept),
        )

    @property
    def names(self) -> list[RecordName]:
        """Names of all records in the stretch, in an order in which they can be stored."""
        blocks = [(RecordKind.BLOCK, name) for name in self.hashes if self.has_blocks]
        return blocks + [(RecordKind.CHECKPOINT, self.hashes[number]) for number in self.checkpoints]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayoutOf:
    """What a store knows of one fingerprint's payload layout."""

    fingerprint: bytes
    block_tokens: int
    plans: dict[RecordKind, codec.PlanePlan]
    statement: bytes


@dataclass(slots=True)
class StretchTables:
    """Records by hash, and the meaning of the numbers in their entries (fingerprints, owners)."""

    blocks: dict[bytes, IndexEntry] = field(default_factory=dict)
    checkpoints: dict[bytes, IndexEntry] = field(default_factory=dict)
    fingerprints: dict[int, bytes] = field(default_factory=dict)
    owners: dict[int, bytes] = field(default_factory=dict)


class StoreContents:
    """Reads one directory. Calls block; for tools."""

    def __init__(self, directory: Path, *, decrypt: Decrypt | None = None) -> None:
        """decrypt: decrypts an encrypted store. Raises: ConfigError: no store. Unavailable: the store's index cannot be
        read.
        """
        if not (directory / SEGMENT_DIR).is_dir():
            raise no_store(directory)
        self.directory = directory
        self._reader = StoreReader(directory, decrypt=decrypt)

    @classmethod
    def of_reader(cls, reader: StoreReader) -> Self:
        """The contents of a store that this process has open. Do not close the result."""
        contents = cls.__new__(cls)
        contents.directory, contents._reader = reader.directory, reader
        return contents

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, err: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._reader.close()

    def layouts(self) -> list[LayoutOf]:
        """The layouts of all fingerprints, so that another store can compress and check their records in the same
        way.
        """
        index = self._reader.index
        plans: dict[bytes, dict[RecordKind, codec.PlanePlan]] = defaultdict(dict)
        with index.txn() as txn:
            with txn.cursor(db=index.db["meta"]) as cursor:
                for key, value in cursor:
                    if key.startswith(PLAN_PREFIX):
                        kind, digest = RecordKind(key[len(PLAN_PREFIX)]), bytes(key[len(PLAN_PREFIX) + 1 :])
                        plans[digest][kind] = codec.read_plan(value)[0]
            return [
                LayoutOf(
                    fingerprint=digest,
                    block_tokens=index.block_tokens(txn, digest),
                    plans=plans.get(digest, {}),
                    statement=index.statement(txn, digest),
                )
                for digest in index.fingerprints(txn).values()
            ]

    def stretches(self) -> list[Stretch]:
        """All stretches, the most valuable first: pinned ones, then by eviction rank."""
        return stretches_of(self._tables())

    def records(self, stretch: Stretch, wanted: Sequence[RecordName]) -> Iterator[list[Record]]:
        """The wanted records of a stretch, verified, in batches. Records that cannot be read are left out."""
        for kind in (RecordKind.BLOCK, RecordKind.CHECKPOINT):
            names = [name for each, name in wanted if each is kind]
            for first in range(0, len(names), _BATCH_RECORDS):
                yield from self._read(kind, names[first : first + _BATCH_RECORDS], stretch.fingerprint)

    def _read(self, kind: RecordKind, names: Sequence[bytes], fingerprint: bytes) -> Iterator[list[Record]]:
        index = self._reader.index
        while names:
            located = self._reader.locate(kind, names, fingerprint=fingerprint)
            payloads = [bytearray(nbytes) for nbytes in located.sizes]
            outcome = self._reader.fill(located, lambda number, _, to=payloads: (memoryview(to[number]),))  # type: ignore[misc]
            sealed = [want.sealed for want in located.wanted[: outcome.num_good]]
            records = records_of(sealed, payloads[: outcome.num_good])
            with index.txn() as txn:
                entries = [index.entry(txn, kind, record.hash) for record in records]
            yield [_as_kept(record, entry) for record, entry in zip(records, entries, strict=True)]
            # Continue after a record that is damaged, gone or of version 1.
            names = names[len(records) + 1 :]

    def _tables(self) -> StretchTables:
        index, tables = self._reader.index, StretchTables()
        with index.txn() as txn:
            tables.fingerprints, tables.owners = index.fingerprints(txn), index.owners(txn)
            for kind, rows in ((RecordKind.BLOCK, tables.blocks), (RecordKind.CHECKPOINT, tables.checkpoints)):
                rows.update(_live_entries(txn, index.db[TABLE_OF_KIND[kind]]))
        return tables


def stretches_of(tables: StretchTables) -> list[Stretch]:
    """All stretches, the most valuable first: pinned ones, then by eviction rank."""
    parents = {entry.parent for entry in tables.blocks.values()}
    leaves = [(entry, name) for name, entry in tables.blocks.items() if name not in parents]
    leaves.sort(key=lambda leaf: (leaf[0].pinned_ms, leaf[0].rank_ms), reverse=True)
    seen: set[bytes] = set()
    found = [_stretch_to(name, tables, seen) for _, name in leaves]
    # Checkpoints whose blocks are in another store.
    alone = ((name, entry) for name, entry in tables.checkpoints.items() if name not in tables.blocks)
    found += [dataclasses.replace(_stretch(tables, (name,), (0,), [entry]), has_blocks=False) for name, entry in alone]
    return found


def _live_entries(txn: Any, table: Any) -> Iterator[tuple[bytes, IndexEntry]]:
    with txn.cursor(db=table) as cursor:
        for key, value in cursor:
            entry = unpack_entry(value, bytes(key))
            if entry is not None and not entry.quarantined:
                yield bytes(key), entry


def _stretch_to(leaf: bytes, tables: StretchTables, seen: set[bytes]) -> Stretch:
    """The stretch that ends at this leaf: from the leaf upwards to the first block that another stretch has."""
    names: list[bytes] = []
    name = leaf
    while name in tables.blocks and name not in seen:
        seen.add(name)
        names.append(name)
        name = tables.blocks[name].parent
    names.reverse()
    checkpoints = tuple(number for number, each in enumerate(names) if each in tables.checkpoints)
    entries = [tables.blocks[each] for each in names] + [tables.checkpoints[names[number]] for number in checkpoints]
    return _stretch(tables, tuple(names), checkpoints, entries)


def _stretch(
    tables: StretchTables, names: tuple[bytes, ...], checkpoints: tuple[int, ...], entries: Sequence[IndexEntry]
) -> Stretch:
    return Stretch(
        fingerprint=tables.fingerprints.get(entries[0].fingerprint_id, bytes(32)),
        owner=tables.owners.get(entries[0].tenant_id, b""),
        hashes=names,
        checkpoints=checkpoints,
        rank_ms=max(entry.rank_ms for entry in entries),
        pinned_ms=max(entry.pinned_ms for entry in entries),
        nbytes=sum(entry.extent_bytes for entry in entries),
        ttls_s=tuple(entry.ttl_s for entry in entries),
        costs_ms=tuple(entry.cost_ms for entry in entries),
    )


def _as_kept(record: Record, entry: IndexEntry | None) -> Record:
    """The record with the time to live and the cost from this store's index."""
    if entry is None:
        return record
    return dataclasses.replace(record, ttl_s=float(entry.ttl_s), cost_s=entry.cost_ms / 1000)
