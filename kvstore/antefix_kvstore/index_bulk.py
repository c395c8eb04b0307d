"""Writes many records into an index under construction: processed as rows of arrays, inserted in the order of their
keys.

Pages that a transaction writes stay in memory until it commits, and so do pages that are read through LMDB's map. So
each transaction takes a slice of neighbouring keys, and the map's pages are dropped after each transaction.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from antefix.record import RecordKind
from antefix.store_files.index import DATA_FILE, TABLE_OF_KIND, Index
from antefix.store_files.record_format import HASH_BYTES, IndexEntry, RecordFlag, pack_entry, unpack_entry
from antefix_kvstore.eviction import EvictionPolicy
from antefix_kvstore.forest_rows import Forest, follow_parents, hang_together, parent_names
from antefix_kvstore.header_rows import extents_of, first_words, numbers_of, owner_key, short_entries
from antefix_kvstore.index_sums import sums_by
from antefix_kvstore.index_writer import IndexTxn
from antefix_kvstore.mapped_pages import MappedPages
from antefix_kvstore.seen_names import SeenNames

Array = npt.NDArray[Any]

# Each key is on another page, and the kernel maps up to 15 more around it: 32 MiB at most.
_SLICE_RECORDS: Final = 512
_MAPPED_BYTES_MAX: Final = 32 << 20
_PACKED_RECORDS: Final = 8_192
_FIRST: Final = int(RecordFlag.FIRST)
_SEALED: Final = int(RecordFlag.SEALED)
_APART: Final = int(RecordFlag.APART)
# Keys of the leaf and expiry tables: u64, kind, hash.
_KEY_BYTES: Final = 8 + 1 + HASH_BYTES
_ENTRY_FIELDS: Final = tuple(name for name in IndexEntry.__dataclass_fields__ if name != "parent")


class BulkIndex:
    """An index that no other process has open."""

    def __init__(self, open_index: Callable[[], Index], num_records_max: int) -> None:
        """num_records_max: an upper bound of the records that will be added."""
        self._open_index = open_index
        self._open()
        self._policy = EvictionPolicy()
        self.num_indexed = 0
        self._seen = SeenNames(num_records_max)

    def _open(self) -> None:
        self.index = self._open_index()
        self._data = self.index.directory / DATA_FILE
        # LMDB maps the file once, at the same place until it is closed.
        self._mapped = MappedPages(self._data)

    def _drop_pages(self) -> None:
        """Drop the pages that were read through the index's map, if they may be many."""
        if self._data.stat().st_size > _MAPPED_BYTES_MAX and not self._mapped.drop():
            # Where the kernel does not do that, opening the index again drops them too.
            self.index.close()
            self._open()

    def known_copies(self, rows: Array) -> list[tuple[int, IndexEntry]]:
        """The rows whose names are indexed already, with their entries."""
        suspects = np.flatnonzero(self._seen.have(rows))
        found: list[tuple[int, IndexEntry]] = []
        for kind in TABLE_OF_KIND:
            of_kind = suspects[rows["kind"][suspects] == kind]
            row_of = dict(zip(rows["hash"][of_kind].tolist(), of_kind.tolist(), strict=True))
            found += [(row_of[block_hash], entry) for block_hash, entry in self.entries(kind, row_of)]
        return found

    def entries(self, kind: RecordKind, hashes: Iterable[bytes]) -> Iterator[tuple[bytes, IndexEntry]]:
        """The hashes that are indexed already, with their entries."""
        ordered = sorted(hashes) if self.num_indexed else []
        for first in range(0, len(ordered), _SLICE_RECORDS):
            with self.index.txn() as txn, txn.cursor(db=self.index.db[TABLE_OF_KIND[kind]]) as cursor:
                found = cursor.getmulti(ordered[first : first + _SLICE_RECORDS])
            self._drop_pages()
            for key, value in found:
                entry = unpack_entry(value, key)
                if entry is not None:
                    yield key, entry

    def add(self, rows: Array, *, takes_apart: bool) -> Array:
        """Index the rows that may be indexed. Returns the others.

        rows: none of them may be indexed already, and all names must differ.
        """
        if not len(rows):
            return rows
        parents = parent_names(rows)
        outside = set(parents[~follow_parents(rows, parents)].tolist())
        outside.difference_update(numbers_of(rows["hash"][rows["kind"] == RecordKind.BLOCK], outside))
        known = self.entries(RecordKind.BLOCK, outside)
        prefixes = {name: entry.prefix_bytes for name, entry in known}
        forest = hang_together(rows, parents, prefixes, takes_apart=takes_apart)
        self._write(rows, forest)
        self._count_children(Counter(parents[forest.stands & forest.known_parent].tolist()))
        self.num_indexed += int(forest.stands.sum())
        self._seen.add(rows[forest.stands])
        return rows[~forest.stands]

    def _write(self, rows: Array, forest: Forest) -> None:
        of = self._fields(rows, forest)
        stands = np.flatnonzero(forest.stands)
        # Nearly in the order of keys.
        order = stands[np.lexsort((first_words(rows["hash"][stands]), rows["kind"][stands]))]
        of |= {name: rows[name] for name in ("kind", "hash", "parent")}
        of = {name: values[order] for name, values in of.items()}
        for kind, table in TABLE_OF_KIND.items():
            first, last = np.searchsorted(of["kind"], [kind, kind + 1]).tolist()
            for start in range(first, last, _PACKED_RECORDS):
                part = slice(start, min(start + _PACKED_RECORDS, last))
                self._put(table, {name: values[part] for name, values in of.items()})
        is_leaf = of["children"] == 0
        self._put_keys("leaves", of, "rank_ms", is_leaf)
        self._put_keys("expiry", of, "expires_ms", is_leaf & (of["expires_ms"] != 0))

    def _fields(self, rows: Array, forest: Forest) -> dict[str, Array]:
        """The fields of each row's entry. Assigns numbers to new fingerprints and owners, and adds to the totals."""
        extents = extents_of(rows)
        created, expires = rows["created_ms"].astype(np.int64), rows["expires_ms"].astype(np.int64)
        cost_us = rows["cost_us"].astype(np.int64)
        sealed = np.where(rows["version"] == 1, 0, _SEALED)
        of: dict[str, Array] = {
            name: rows[name].astype(np.int64) for name in ("segment", "offset", "stored_bytes", "payload_bytes")
        }
        of |= {name: rows[name].astype(np.int64) for name in ("position", "codec")} | {"expires_ms": expires}
        of["place"] = of["offset"] >> 3
        of["children"], of["prefix_bytes"] = forest.children(), forest.prefix_bytes
        # When it was last used is lost with the index; when it was written is the best guess.
        of["rank_ms"] = self._policy.ranks_ms(used_ms=created, cost_s=cost_us / 1e6, nbytes=extents)
        of["pinned_ms"], of["cost_ms"] = np.zeros_like(extents), cost_us // 1000
        of["ttl_s"] = np.where(expires == 0, 0, np.maximum(0, -((created - expires) // 1000)))
        of["flags"] = rows["flags"] | sealed | np.where(forest.apart, _APART, 0)
        with IndexTxn(self.index) as txn:
            of["fingerprint_id"] = _fingerprint_ids(txn, rows, forest.stands)
            of["tenant_id"] = _owner_ids(txn, rows, forest.stands)
            txn.count(*_counts(rows, of, extents, forest.stands), num_apart=int(forest.apart.sum()))
        return of

    def _put(self, table: str, of: dict[str, Array]) -> None:
        values, fits = short_entries(of, of["hash"], of["parent"])
        keys, packed, parents = of["hash"].tolist(), values.tolist(), of["parent"]
        for at in np.flatnonzero(~fits).tolist():
            fields = {name: int(of[name][at]) for name in _ENTRY_FIELDS}
            packed[at] = pack_entry(IndexEntry(**fields, parent=parents[at].tobytes()), keys[at])
        items = list(zip(keys, packed, strict=True))
        for first in range(0, len(items), _SLICE_RECORDS):
            self._put_items(table, items[first : first + _SLICE_RECORDS])

    def _put_keys(self, table: str, of: dict[str, Array], when: str, chosen: Array) -> None:
        """Insert keys into the leaf or expiry table for the chosen rows. when: the field that the keys begin with."""
        num = int(chosen.sum())
        keys = np.empty((num, _KEY_BYTES), np.uint8)
        keys[:, :8] = of[when][chosen].astype(">u8")[:, None].view(np.uint8)
        keys[:, 8] = of["kind"][chosen]
        keys[:, 9:] = of["hash"][chosen].view(np.uint8).reshape(num, HASH_BYTES)
        ordered = sorted(keys.view(f"V{_KEY_BYTES}")[:, 0].tolist())
        for first in range(0, num, 4 * _SLICE_RECORDS):
            self._put_items(table, [(key, b"") for key in ordered[first : first + 4 * _SLICE_RECORDS]])

    def _put_items(self, table: str, items: list[tuple[bytes, bytes]]) -> None:
        with self.index.env.begin(write=True) as txn, txn.cursor(db=self.index.db[table]) as cursor:
            cursor.putmulti(items, dupdata=False)
        self._drop_pages()

    def _count_children(self, more: Counter[bytes]) -> None:
        """Add to the numbers of children of blocks that were indexed before."""
        ordered = sorted(more)
        for first in range(0, len(ordered), _SLICE_RECORDS):
            with IndexTxn(self.index) as txn:
                for block_hash in ordered[first : first + _SLICE_RECORDS]:
                    entry = txn.get((RecordKind.BLOCK, block_hash))
                    assert entry is not None, "it was read a moment ago"
                    entry.children += more[block_hash]
            self._drop_pages()


def _fingerprint_ids(txn: IndexTxn, rows: Array, stands: Array) -> Array:
    runs, codes = _runs(rows["fingerprint"])
    is_first = stands & ((rows["flags"] & _FIRST) != 0)
    tokens: dict[bytes, int] = {}
    digests = rows["fingerprint"][runs].tolist()
    for code, position in set(zip(codes[is_first].tolist(), rows["position"][is_first].tolist(), strict=True)):
        tokens[digests[code]] = min(position, tokens.get(digests[code], position))
    ids = np.zeros(len(runs), np.int64)
    for code in np.unique(codes[stands]).tolist():
        digest = digests[code]
        state = txn.fingerprint(digest)
        if state is None or (not state.block_tokens and digest in tokens):
            state = txn.set_fingerprint(digest, tokens.get(digest, 0))
        ids[code] = state.id
    return ids[codes]


def _owner_ids(txn: IndexTxn, rows: Array, stands: Array) -> Array:
    runs, codes = _runs(rows["owner"], rows["generation"])
    owners, generations = rows["owner"][runs].tolist(), rows["generation"][runs].tolist()
    ids = np.zeros(len(runs), np.int64)
    for code in np.unique(codes[stands]).tolist():
        ids[code] = txn.owner_id(owner_key(owners[code]), generations[code])
    return ids[codes]


def _runs(*columns: Array) -> tuple[Array, Array]:
    """Where each run of equal values begins, and for each value the number of its run."""
    begins = np.zeros(len(columns[0]), bool)
    begins[0] = True
    for values in columns:
        begins[1:] |= values[1:] != values[:-1]
    return np.flatnonzero(begins), np.cumsum(begins) - 1


def _counts(
    rows: Array, of: dict[str, Array], extents: Array, stands: Array
) -> tuple[dict[bytes, list[int]], dict[int, list[int]]]:
    """How much the rows add to the totals of kinds and owners, and to the segments' totals."""
    totals: dict[bytes, list[int]] = defaultdict(lambda: [0, 0, 0])
    live: dict[int, list[int]] = defaultdict(lambda: [0, 0])
    ones, payload = np.ones_like(extents), of["payload_bytes"]
    for values, prefix, width in ((rows["kind"], b"k", 1), (of["tenant_id"], b"t", 4)):
        for number, row in zip(*sums_by(values[stands], ones[stands], extents[stands], payload[stands]), strict=True):
            totals[prefix + number.to_bytes(width, "little")] = row
    for number, row in zip(*sums_by(of["segment"][stands], extents[stands], ones[stands]), strict=True):
        live[number] = row
    return totals, live
