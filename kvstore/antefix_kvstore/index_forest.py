"""The tree of records in the index: inserts a record under its parent, drops whole subtrees."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Final

from antefix.record import RecordKind, RecordName
from antefix.store_files.record_format import IndexEntry, RecordFlag
from antefix.store_files.record_header import RecordHeader
from antefix_kvstore.eviction import EvictionPolicy
from antefix_kvstore.index_writer import IndexTxn
from antefix_kvstore.space import Space, parent_of

_FIRST: Final = int(RecordFlag.FIRST)
_SEALED: Final = int(RecordFlag.SEALED)
_ELSEWHERE: Final = int(RecordFlag.ELSEWHERE)
_APART: Final = int(RecordFlag.APART)


def insert_entry(txn: IndexTxn, header: RecordHeader, policy: EvictionPolicy, *, used_ms: int) -> bool:
    """Index a record of a segment. Returns False, and changes nothing, if the record needs a parent that is not
    indexed.

    An entry that exists already is updated: it keeps its place in the forest and points to the new record. If the
    record was stored apart and its parent has been indexed since, the record depends on that parent from then on.
    """
    name = (header.kind, header.hash)
    parent_name = parent_of(name, header.parent)
    # Plain integers: arithmetic with enum members takes a fifth of a rebuild's time.
    flags = int(header.flags)
    is_first = bool(flags & _FIRST)
    parent = None if is_first else txn.get(parent_name)
    is_apart = parent is None and not is_first and bool(flags & _ELSEWHERE)
    if parent is None and not is_first and not is_apart:
        return False
    old = txn.get(name)
    fingerprint = txn.fingerprint(header.fingerprint) or txn.set_fingerprint(header.fingerprint, 0)
    if is_first and fingerprint.block_tokens == 0:
        txn.set_fingerprint(header.fingerprint, header.position)
    if parent is not None and (old is None or old.flags & _APART):
        parent.children += 1
    above = parent.prefix_bytes if parent is not None and header.kind is RecordKind.BLOCK else 0
    cost_s = header.cost_us / 1e6
    txn.put(
        name,
        IndexEntry(
            segment=header.segment,
            offset=header.offset,
            stored_bytes=header.stored_bytes,
            payload_bytes=header.payload_bytes,
            position=header.position,
            fingerprint_id=fingerprint.id,
            tenant_id=txn.owner_id(header.owner, header.generation),
            children=old.children if old else 0,
            rank_ms=policy.rank_ms(used_ms=used_ms, cost_s=cost_s, nbytes=header.extent_bytes),
            expires_ms=header.expires_ms,
            pinned_ms=old.pinned_ms if old else 0,
            prefix_bytes=above + header.payload_bytes,
            cost_ms=min(header.cost_us // 1000, 0xFFFFFFFF),
            ttl_s=-(-(header.expires_ms - header.created_ms) // 1000) if header.expires_ms else 0,
            codec=int(header.codec),
            flags=flags | (0 if header.version == 1 else _SEALED) | (_APART if is_apart else 0),
            parent=header.parent,
        ),
    )
    return True


def drop_subtrees(txn: IndexTxn, space: Space, roots: Iterable[RecordName]) -> int:
    """Remove records and all records that depend on them. Reads the whole index, so use it for repair only. Returns the
    number removed.
    """
    waiting = list(roots)
    if not waiting:
        return 0
    below: dict[RecordName, list[RecordName]] = defaultdict(list)
    depth: dict[RecordName, tuple[int, RecordKind]] = {}
    for kind in (RecordKind.BLOCK, RecordKind.CHECKPOINT):
        for name, entry in txn.names(kind):
            below[parent_of(name, entry.parent)].append(name)
            depth[name] = (entry.position, kind)
    doomed: set[RecordName] = set()
    waiting = [name for name in waiting if name in depth]
    while waiting:
        name = waiting.pop()
        if name not in doomed:
            doomed.add(name)
            waiting.extend(below.get(name, ()))
    # A dependent record has a larger position, or is the block's checkpoint. Only leaves may be removed, so go deepest
    # first.
    for name in sorted(doomed, key=depth.__getitem__, reverse=True):
        space.remove(txn, name)
    return len(doomed)


def drop_false_roots(txn: IndexTxn, space: Space, fingerprint_id: int, block_tokens: int) -> int:
    """Remove chains that do not begin at token 0, stored before the block size was known. Returns the number
    removed.
    """
    roots = [
        name
        for name, entry in txn.names(RecordKind.BLOCK)
        if entry.fingerprint_id == fingerprint_id and entry.flags & RecordFlag.FIRST and entry.position != block_tokens
    ]
    return drop_subtrees(txn, space, roots)
