"""Sums up what the entries of an index imply about its other tables, many entries at a time. The other tables of an
undamaged index have the same sums.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from antefix.record import RecordKind
from antefix.store_files.record_format import (
    HASH_BYTES,
    INDEX_ENTRY,
    INDEX_ENTRY_SHORT,
    RECORD_ALIGN,
    RECORD_HEADER_BYTES,
    RecordFlag,
    short_fields,
)
from antefix_kvstore.index_leaves import Fault, LeafBatch, distinct_of

Array = npt.NDArray[Any]
Columns = dict[str, Array]

# The fields of INDEX_ENTRY without its parent and checksum.
_LONG: Final = np.dtype(
    [
        ("segment", "<u4"),
        ("offset", "<u8"),
        *((name, "<u4") for name in ("stored_bytes", "payload_bytes", "position")),
        *((name, "<u4") for name in ("fingerprint_id", "tenant_id", "children")),
        *((name, "<u8") for name in ("rank_ms", "expires_ms", "pinned_ms", "prefix_bytes")),
        ("cost_ms", "<u4"),
        ("ttl_s", "<u4"),
        ("codec", "u1"),
        ("flags", "u1"),
        ("rest", "V38"),
    ]
)
_FIELDS: Final = tuple(name for name in _LONG.names or () if name != "rest")
# Keys of the leaf and expiry tables: u64, kind, hash.
_KEY_BYTES: Final = 8 + 1 + HASH_BYTES
# For so few distinct keys, one sum per key is faster than sorting.
_SUMMED_ALONE_MAX: Final = 8
_PRIMES: Final = (0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D)
_WEIGHTS: Final = np.array([0x9E3779B185EBCA87 * (2 * n + 1) % 2**64 | 1 for n in range(6)], np.uint64)


@dataclass(slots=True)
class KeySum:
    """The number of keys and the sum of their hashes, whatever their order. Detects damage, not malice."""

    count: int = 0
    total: int = 0

    def add(self, keys: Array) -> None:
        """Shapes:  keys [N, _KEY_BYTES] uint8."""
        if not len(keys):
            return
        words = np.zeros((len(keys), 48), np.uint8)
        words[:, :_KEY_BYTES] = keys
        mixed = (words.view("<u8") * _WEIGHTS).sum(axis=1, dtype=np.uint64)
        mixed ^= mixed >> np.uint64(29)
        mixed *= _WEIGHTS[1]
        mixed ^= mixed >> np.uint64(32)
        self.count += len(keys)
        self.total = (self.total + int(mixed.sum(dtype=np.uint64))) % 2**64


@dataclass(slots=True)
class Derived:
    """What the entries imply, and what the leaf and expiry tables hold."""

    leaves: KeySum = field(default_factory=KeySum)
    expiry: KeySum = field(default_factory=KeySum)
    found_leaves: KeySum = field(default_factory=KeySum)
    found_expiry: KeySum = field(default_factory=KeySum)
    totals: dict[bytes, list[int]] = field(default_factory=lambda: defaultdict(lambda: [0, 0, 0]))
    live: dict[int, list[int]] = field(default_factory=lambda: defaultdict(lambda: [0, 0]))
    fingerprint_ids: set[int] = field(default_factory=set)
    tenant_ids: set[int] = field(default_factory=set)
    # For each fingerprint id, the positions of first blocks.
    first_positions: dict[int, set[int]] = field(default_factory=lambda: defaultdict(set))
    num_quarantined: int = 0
    num_apart: int = 0

    def add(self, table: str, batch: LeafBatch) -> None:
        """Raises:  Fault: an entry is damaged, or is not an entry."""
        if table in ("leaves", "expiry"):
            if (batch.key_bytes != _KEY_BYTES).any() or batch.value_bytes.any():
                raise Fault(f"its table of {table} is damaged")
            keys = batch.gather(np.arange(batch.num_nodes), 0, _KEY_BYTES)
            (self.found_leaves if table == "leaves" else self.found_expiry).add(keys)
        elif table in ("blocks", "checkpoints"):
            kind = RecordKind.BLOCK if table == "blocks" else RecordKind.CHECKPOINT
            if (batch.key_bytes != HASH_BYTES).any():
                raise Fault("an entry is damaged")
            known = 0
            for layout in (INDEX_ENTRY_SHORT, INDEX_ENTRY):
                nodes = np.flatnonzero(batch.value_bytes == layout.size)
                known += len(nodes)
                if len(nodes):
                    self._add_entries(kind, batch.gather(nodes, 0, HASH_BYTES + layout.size))
            if known < batch.num_nodes:
                raise Fault("an entry is damaged")

    def _add_entries(self, kind: RecordKind, rows: Array) -> None:
        """Shapes:  rows [N, hash and entry of one form] uint8."""
        checked = np.ascontiguousarray(rows)
        said = checked[:, -4:].copy().view("<u4")[:, 0]
        if (xxh32_of_rows(checked, checked.shape[1] - 4) != said).any():
            raise Fault("an entry is damaged")
        is_short = rows.shape[1] == HASH_BYTES + INDEX_ENTRY_SHORT.size
        of = _short_columns(checked) if is_short else _long_columns(checked)
        flags = of["flags"]
        self._add_leaves(kind, checked[:, :HASH_BYTES], of)
        self._add_counts(kind, of)
        self.fingerprint_ids |= set(distinct_of(of["fingerprint_id"]).tolist())
        self.num_quarantined += int(((flags & RecordFlag.QUARANTINED) != 0).sum())
        self.num_apart += int(((flags & RecordFlag.APART) != 0).sum())
        is_first = (flags & RecordFlag.FIRST) != 0
        pairs = np.stack([of["fingerprint_id"][is_first], of["position"][is_first]], axis=1)
        for number, position in np.unique(pairs, axis=0).tolist():
            self.first_positions[number].add(position)

    def _add_leaves(self, kind: RecordKind, hashes: Array, of: Columns) -> None:
        is_leaf = of["children"] == 0
        for keys, when in ((self.leaves, "rank_ms"), (self.expiry, "expires_ms")):
            chosen = is_leaf if keys is self.leaves else is_leaf & (of[when] != 0)
            rows = np.empty((int(chosen.sum()), _KEY_BYTES), np.uint8)
            until = np.maximum(of[when][chosen], of["pinned_ms"][chosen])
            rows[:, :8] = until.astype(">u8")[:, None].view(np.uint8)
            rows[:, 8] = kind
            rows[:, 9:] = hashes[chosen]
            keys.add(rows)

    def _add_counts(self, kind: RecordKind, of: Columns) -> None:
        stored, payload = of["stored_bytes"].astype(np.int64), of["payload_bytes"].astype(np.int64)
        extents = RECORD_HEADER_BYTES + (stored + RECORD_ALIGN - 1) // RECORD_ALIGN * RECORD_ALIGN
        ones = np.ones_like(extents)
        tenants, sums = sums_by(of["tenant_id"], ones, extents, payload)
        self.tenant_ids |= set(tenants)
        for tenant, row in zip(tenants, sums, strict=True):
            for key in (b"k" + bytes([kind]), b"t" + tenant.to_bytes(4, "little")):
                self.totals[key] = [a + b for a, b in zip(self.totals[key], row, strict=True)]
        good = (of["flags"] & RecordFlag.QUARANTINED) == 0
        for segment, row in zip(*sums_by(of["segment"][good], extents[good], ones[good]), strict=True):
            self.live[segment] = [a + b for a, b in zip(self.live[segment], row, strict=True)]


def sums_by(keys: Array, *columns: Array) -> tuple[list[int], list[list[int]]]:
    """The distinct keys, and for each key the sums of the columns."""
    distinct = distinct_of(keys)
    if len(distinct) <= _SUMMED_ALONE_MAX:
        chosen = [keys == key for key in distinct] if len(distinct) > 1 else [slice(None)] * len(distinct)
        sums = [[int(column[which].sum()) for column in columns] for which in chosen]
        return distinct.tolist(), sums
    order = np.argsort(keys, kind="stable")
    begins = np.searchsorted(keys[order], distinct)
    return distinct.tolist(), np.stack([np.add.reduceat(column[order], begins) for column in columns], axis=1).tolist()


def _short_columns(rows: Array) -> Columns:
    words = rows[:, HASH_BYTES : HASH_BYTES + 48].copy().view("<u8")
    # Each field is computed from one word, so each word's column lies together.
    fields = (column.astype(np.int64) for column in short_fields(*np.ascontiguousarray(words.T)))
    return dict(zip(_FIELDS, fields, strict=True))


def _long_columns(rows: Array) -> Columns:
    fields = rows[:, HASH_BYTES:].copy().view(_LONG)[:, 0]
    return {name: fields[name].astype(np.int64) for name in _FIELDS}


def xxh32_of_rows(rows: Array, nbytes: int) -> Array:
    """XXH32 (seed 0) of the first bytes of each row. Source: xxHash specification, "XXH32 algorithm".

    nbytes: a multiple of 16.  Shapes:  rows [N, a multiple of 4] uint8, contiguous; result [N] uint32.
    """
    one, two, three = (np.uint32(prime) for prime in _PRIMES)
    # Each word of all rows lies together, which is several times as fast.
    words = rows.view("<u4")[:, : nbytes // 4].T.copy()
    words *= two
    lanes = []
    for lane, start in enumerate((0x9E3779B1 + 0x85EBCA77, 0x85EBCA77, 0, -0x9E3779B1)):
        sums = np.full(len(rows), start % 2**32, np.uint32)
        for word in words[lane::4]:
            sums += word
            sums = _rotated(sums, 13)
            sums *= one
        lanes.append(sums)
    mixed = sum((_rotated(lanes[n], by) for n, by in ((0, 1), (1, 7), (2, 12))), _rotated(lanes[3], 18))
    mixed = mixed + np.uint32(nbytes)
    mixed ^= mixed >> np.uint32(15)
    mixed *= two
    mixed ^= mixed >> np.uint32(13)
    mixed *= three
    mixed ^= mixed >> np.uint32(16)
    return mixed


def _rotated(words: Array, by: int) -> Array:
    rotated = words << np.uint32(by)
    rotated |= words >> np.uint32(32 - by)
    return rotated
