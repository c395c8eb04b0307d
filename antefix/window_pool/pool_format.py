"""A checkpoint as one Redis value: a record header of version 2 (docs/FORMAT.md), then the raw payload.

The header is that of a pooled checkpoint outside any segment: segment, offset and the checksum's seed are 0. The header
contains fingerprint and hash, so a value under the wrong key is detected like a damaged one. Anyone with the Redis
password can write values with right checksums, but not with a valid seal.
"""

from __future__ import annotations

import dataclasses

from antefix.errors import BlockCorrupt
from antefix.record import Record, RecordKind
from antefix.secret import TENANT_BYTES, USER_BYTES
from antefix.store_files.record_draft import draft_of
from antefix.store_files.record_format import RECORD_HEADER_BYTES, payload_checksum
from antefix.store_files.record_header import pack_record_header, plain_record, sealed_part, unpack_record_header
from antefix.store_files.seal import SealBroken, Seals

HEADER_BYTES = RECORD_HEADER_BYTES
_SEED = 0


def pack(record: Record) -> bytes:
    header, payload = draft_of(record, None, None, created_ms=0, expires_ms=0)
    header = dataclasses.replace(
        header, kind=RecordKind.POOLED, cost_us=0, version=2, payload_checksum=payload_checksum(payload)
    )
    return b"".join((pack_record_header(header, _SEED), payload))


def unpack(value: bytes, *, name: bytes, fingerprint: bytes, tenant: bytes = b"", seals: Seals | None = None) -> bytes:
    """The payload of the checkpoint after block `name`. seals, tenant: if given, the checkpoint must be sealed, and
    belong to this tenant.

    Raises:  BlockCorrupt: the value is damaged, or it is another checkpoint's.  SealBroken: it is forged.
    """
    head, payload = value[:HEADER_BYTES], memoryview(value)[HEADER_BYTES:]
    kind = RecordKind.POOLED
    found = plain_record(head, _SEED, kind=kind, block_hash=name, fingerprint=fingerprint, segment=0, offset=0)
    if found is None or found != (payload.nbytes, payload_checksum(payload)):
        raise BlockCorrupt(
            f"the pooled checkpoint after block {name.hex()[:16]} is damaged, or belongs to another block"
        )
    if seals is not None and not seals.holds(
        sealed_part(head), payload, kind=kind, block_hash=name, fingerprint=fingerprint, tenant=tenant
    ):
        raise SealBroken(f"the pooled checkpoint after block {name.hex()[:16]} has no valid seal")
    return bytes(payload)


def is_owned(head: bytes, owner: bytes) -> bool:
    """Whether a value in Redis must be deleted when this owner's values are deleted. head: the value's first
    HEADER_BYTES bytes.

    owner: as in a record; without a user, all users of the tenant are meant. A damaged value does not tell its owner,
    and no reader accepts it, so it is deleted as well.
    """
    try:
        header = unpack_record_header(head, _SEED)
    except BlockCorrupt:
        return True
    return header.tenant.startswith(owner[:TENANT_BYTES] if owner.endswith(bytes(USER_BYTES)) else owner)
