"""Decides which records of a put are written, which are stored already and which are refused, and why. Writes
nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from antefix.errors import InvalidRequest
from antefix.record import OWNER_BYTES, STORED_KINDS, PutResult, Record, RecordKind, RecordName, Refusal, RefusalReason
from antefix.store_files.index import Index
from antefix.store_files.record_format import (
    HASH_BYTES,
    MAC_BYTES,
    SALT_BYTES,
    TENANT_BYTES_MAX_V1,
    extent_bytes,
)
from antefix_kvstore.kvstore_config import KvStoreConfig
from antefix_kvstore.space import parent_of

# Seven weeks: in milliseconds this still fits the 32 bits that an index entry has for it.
COST_S_MAX: Final = 4_294_967


@dataclass(slots=True)
class Admission:
    """How the records of one put were sorted.

    new: records to write, parents first; names: their names.  first: those that begin a chain.  apart: those whose
    parent may be in another store.
    anchors: stored records that the new ones depend on, or that were put again. Eviction spares these anchors during
    the put.
    """

    new: list[Record] = field(default_factory=list)
    names: set[RecordName] = field(default_factory=set)
    first: set[RecordName] = field(default_factory=set)
    existing: list[RecordName] = field(default_factory=list)
    anchors: set[RecordName] = field(default_factory=set)
    refused: dict[RecordName, Refusal] = field(default_factory=dict)
    apart: set[RecordName] = field(default_factory=set)
    block_tokens: dict[bytes, int] = field(default_factory=dict)


def check_record(record: Record, record_bytes_max: int, registered_bytes: int | None) -> None:
    """Check the fields and the payload's size.

    registered_bytes: size of such a payload by the layout registered for its fingerprint; None if no layout is
    registered.
    Raises:  InvalidRequest: a field that is wrong whatever the store holds, or a payload of another size.
    """
    for name in ("hash", "parent", "fingerprint"):
        value = getattr(record, name)
        if not isinstance(value, bytes) or len(value) != HASH_BYTES:
            raise InvalidRequest(f"{name} must be {HASH_BYTES} bytes")
    nbytes = memoryview(record.payload).nbytes
    if not 0 < nbytes <= record_bytes_max:
        raise InvalidRequest(f"a payload must have 1 to {record_bytes_max} bytes, has {nbytes}")
    if registered_bytes is not None and nbytes != registered_bytes and not _has_draft_state(record, registered_bytes):
        raise InvalidRequest(
            f"a {record.kind.name.lower()} of fingerprint {record.fingerprint.hex()[:16]} has {registered_bytes}"
            f" bytes by its registered layout, but this payload has {nbytes}"
        )
    if not 0 <= record.position < 1 << 32:
        raise InvalidRequest(f"position must fit 32 bits, is {record.position}")
    if record.kind not in STORED_KINDS:
        raise InvalidRequest(f"records of kind {record.kind.name.lower()} are not kept on disk")
    (_check_v1 if record.version == 1 else _check_v2)(record)
    if not 0 <= record.cost_s < COST_S_MAX:
        raise InvalidRequest(f"cost_s must be in [0, {COST_S_MAX}), is {record.cost_s}")
    if record.ttl_s is not None and not 0 <= record.ttl_s < 1 << 31:
        raise InvalidRequest(f"ttl_s must be in [0, 2^31), is {record.ttl_s}")


def _has_draft_state(record: Record, registered_bytes: int) -> bool:
    """Whether the payload is longer than its layout because a draft layer's state follows. The draft state consists of
    numbers of four bytes each; readers of the checkpoint check whether the values make sense.
    """
    more = memoryview(record.payload).nbytes - registered_bytes
    return record.kind is RecordKind.CHECKPOINT and more > 0 and more % 4 == 0


def _check_v1(record: Record) -> None:
    if len(record.tenant) > TENANT_BYTES_MAX_V1:
        raise InvalidRequest(f"record format version 1 has room for {TENANT_BYTES_MAX_V1} bytes of a tenant's name")


def _check_v2(record: Record) -> None:
    for name, value, nbytes in (
        ("tenant", record.tenant, OWNER_BYTES),
        ("salt", record.salt, SALT_BYTES),
        ("mac", record.mac, MAC_BYTES),
    ):
        if len(value) != nbytes:
            raise InvalidRequest(f"{name} must be {nbytes} bytes, is {len(value)}")
    for name, number, most in (
        ("generation", record.generation, 0xFFFF),
        ("num_cards", record.labels.num_cards, 0xFFFF),
        ("family", record.labels.family, 0xFF),
    ):
        if not 0 <= number <= most:
            raise InvalidRequest(f"{name} must be in [0, {most}], is {number}")


def admit(
    index: Index, txn: Any, records: Sequence[Record], *, refusal: Callable[[Record], Refusal | None] = lambda _: None
) -> Admission:
    """Sort the records of one put, in order.

    txn: the index snapshot that decides what is stored.  refusal: another reason to refuse a record, or None.
    """
    out = Admission()
    for number, record in enumerate(records):
        name = (record.kind, record.hash)
        entry = index.entry(txn, record.kind, record.hash)
        if name in out.names:
            out.existing.append(name)
            continue
        if entry is not None and not entry.quarantined:
            out.existing.append(name)
            out.anchors.add(name)
            continue
        reason = refusal(record) or _refusal(index, txn, record, records[number + 1 : number + 2], out)
        if reason:
            out.refused[name] = reason
        else:
            out.new.append(record)
            out.names.add(name)
    return out


def _refusal(index: Index, txn: Any, record: Record, following: Sequence[Record], out: Admission) -> Refusal | None:
    """Why a record may not be stored; None if it may. The record that it depends on is noted, or that it begins a
    chain.
    """
    name = (record.kind, record.hash)
    parent = parent_of(name, record.parent)
    if parent in out.names:
        return None
    entry = index.entry(txn, *parent)
    if entry is not None:
        if entry.quarantined:
            return _no_parent("its parent is quarantined; put the parent again first")
        out.anchors.add(parent)
        return None
    if parent in out.refused:
        return _PARENT_REFUSED
    if record.parent_elsewhere and (record.kind is RecordKind.CHECKPOINT or not _is_first(index, txn, record, out)):
        out.apart.add(name)
        return None
    if record.kind is RecordKind.CHECKPOINT:
        return _no_parent("its block is not stored")
    if record.position > _block_tokens(index, txn, record, following, out):
        return _no_parent("its parent is not stored")
    # The position is below the block size learned before: so the first block put was not the beginning of a chain, and
    # the number learned from it was wrong.
    out.block_tokens[record.fingerprint] = record.position
    out.first.add(name)
    return None


def _is_first(index: Index, txn: Any, record: Record, out: Admission) -> bool:
    """Whether a block begins its chain, although it might also continue another store's chain. Where a chain begins can
    be told only if the block size is known.
    """
    known = out.block_tokens.get(record.fingerprint) or index.block_tokens(txn, record.fingerprint)
    return 0 < record.position <= known


def _no_parent(text: str) -> Refusal:
    return Refusal(RefusalReason.NO_PARENT, text)


# Hashes are spread over the index, so each record of a commit rewrites a page of its own, and LMDB keeps the old pages
# for two more commits. Committing a 1M-token prompt's 7,813 records at once made a small store's index three times as
# large.
_BATCH_RECORDS_MAX: Final = 128
_PARENT_REFUSED: Final = _no_parent("its parent was refused")


def _block_tokens(index: Index, txn: Any, record: Record, following: Sequence[Record], out: Admission) -> int:
    """Tokens per block of this fingerprint: registered by a worker, or learned from the first block that was put.

    A store must tell a chain's first block from one whose parent was evicted, and a record does not say which it is.
    """
    if record.fingerprint not in out.block_tokens:
        known = index.block_tokens(txn, record.fingerprint)
        if not known:
            known = record.position
            if following and following[0].kind is RecordKind.BLOCK and following[0].parent == record.hash:
                known = following[0].position - record.position
        out.block_tokens[record.fingerprint] = known
    return out.block_tokens[record.fingerprint]


def batches_of(records: Sequence[Record], config: KvStoreConfig) -> list[list[Record]]:
    """Cut a put into batches, each of which fits a segment and the memory that a commit may take."""
    limit = min(config.batch_bytes_max, config.record_bytes_max)
    batches: list[list[Record]] = []
    room = 0
    for record in records:
        nbytes = extent_bytes(memoryview(record.payload).nbytes)
        if nbytes > room or len(batches[-1]) == _BATCH_RECORDS_MAX:
            batches.append([])
            room = limit
        batches[-1].append(record)
        room -= nbytes
    return batches


def without_orphans(batch: Sequence[Record], admission: Admission) -> list[Record]:
    """Leave out records that depend on a record that an earlier batch could not store."""
    kept = []
    for record in batch:
        if parent_of((record.kind, record.hash), record.parent) in admission.refused:
            admission.refused[record.kind, record.hash] = _PARENT_REFUSED
        else:
            kept.append(record)
    return kept


def refuse(batch: Sequence[Record], admission: Admission, reason: Refusal) -> None:
    admission.refused.update({(record.kind, record.hash): reason for record in batch})


def results_of(puts: Sequence[Sequence[Record]], admission: Admission) -> list[PutResult]:
    """Split the outcome among the puts. A record that is in two puts counts as stored by the first of them."""
    unclaimed = admission.names - admission.refused.keys()
    results = []
    for records in puts:
        stored = existing = 0
        refused = {}
        for record in records:
            name = (record.kind, record.hash)
            if name in admission.refused:
                refused[record.hash] = admission.refused[name]
            elif name in unclaimed:
                unclaimed.discard(name)
                stored += 1
            else:
                existing += 1
        results.append(PutResult(num_stored=stored, num_existing=existing, refused=refused))
    return results
