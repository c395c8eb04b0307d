"""Operations on stored records by name, each within one index transaction: pin, find by owner, verify."""

from __future__ import annotations

from collections.abc import Iterable

from antefix.errors import BlockCorrupt
from antefix.record import STORED_KINDS, RecordName
from antefix.store_files.owners import account_of, without_user
from antefix.store_files.record_format import RECORD_HEADER_BYTES, IndexEntry, payload_checksum
from antefix.store_files.record_header import unpack_record_header
from antefix.store_files.segment_reader import verify
from antefix_kvstore.index_writer import IndexTxn
from antefix_kvstore.segments import Segments


def pin_records(txn: IndexTxn, names: Iterable[RecordName], until_ms: int, *, owner: bytes | None) -> list[RecordName]:
    """Keep records from being evicted until `until_ms`. Returns the records that are stored and belong to the owner.

    owner: as the index has it (`antefix.store_files.record_header.owner_row`); None: any owner.
    """
    pinned = []
    for name in owned_records(txn, names, owner):
        entry = txn.get(name)
        if entry is not None and not entry.quarantined:
            entry.pinned_ms = until_ms
            pinned.append(name)
    return pinned


def owned_records(txn: IndexTxn, names: Iterable[RecordName], owner: bytes | None) -> list[RecordName]:
    """The records that are stored and belong to the owner.  owner: as for `pin_records`."""
    found = []
    for name in names:
        entry = txn.get(name)
        if entry is not None and (owner is None or txn.known_owner_id(owner) == entry.tenant_id):
            found.append(name)
    return found


def records_of_owner(txn: IndexTxn, owner: bytes) -> list[RecordName]:
    """All records of an owner; of the whole tenant if the owner names no user. The whole index is read if the owner has
    any records.
    """
    meant = {number for number, row in txn.owners().items() if without_user(owner) in (row, account_of(row))}
    if not meant:
        return []
    return [name for kind in STORED_KINDS for name, entry in txn.names(kind) if entry.tenant_id in meant]


def is_sound(txn: IndexTxn, segments: Segments, name: RecordName, entry: IndexEntry) -> bool:
    """Whether the segment holds the record that the index describes, with the right checksums."""
    try:
        raw = segments.read(entry.segment, entry.offset, RECORD_HEADER_BYTES + entry.stored_bytes)
        header = unpack_record_header(raw[:RECORD_HEADER_BYTES], segments.identity.seed)
        verify(header, name[0], name[1], txn.fingerprint_of(entry.fingerprint_id).digest, entry)
    except (BlockCorrupt, OSError):
        return False
    return payload_checksum(raw[RECORD_HEADER_BYTES:]) == header.payload_checksum
