"""A record that is about to be written: its header without a place, and the bytes that are stored behind it."""

from __future__ import annotations

from antefix.record import Buffer, Record
from antefix.store_files.encryption import TAG_BYTES, KeyRing, fresh_nonce
from antefix.store_files.record_format import NONCE_BYTES, Codec, RecordFlag
from antefix.store_files.record_header import RecordHeader


def draft_of(
    record: Record,
    coded: Buffer | None,
    keys: KeyRing | None,
    *,
    created_ms: int,
    expires_ms: int,
    flags: RecordFlag = RecordFlag.NONE,
) -> tuple[RecordHeader, Buffer]:
    """The header, without place and payload checksum, and the stored bytes.

    coded: the payload compressed with codec 1; None: the payload is stored uncompressed. keys: if given, the payload is
    encrypted.
    """
    body = memoryview(record.payload if coded is None else coded).cast("B")
    header = RecordHeader(
        payload_checksum=bytes(16),
        hash=record.hash,
        parent=record.parent,
        fingerprint=record.fingerprint,
        segment=0,
        offset=0,
        stored_bytes=body.nbytes + (TAG_BYTES if keys else 0),
        payload_bytes=memoryview(record.payload).nbytes,
        position=record.position,
        created_ms=created_ms,
        expires_ms=expires_ms,
        cost_us=max(0, round(record.cost_s * 1e6)),
        kind=record.kind,
        codec=Codec.RAW if coded is None else Codec.PLANES_ZSTD,
        flags=flags | (RecordFlag.ENCRYPTED if keys else RecordFlag.NONE),
        tenant=record.tenant,
        generation=record.generation,
        num_cards=record.labels.num_cards,
        hash_kind=record.labels.hash_kind,
        family=record.labels.family,
        salt=record.salt,
        mac=record.mac,
        version=record.version,
        nonce=fresh_nonce() if keys else bytes(NONCE_BYTES),
    )
    return header, body if keys is None else memoryview(keys.encrypt(header, body))
