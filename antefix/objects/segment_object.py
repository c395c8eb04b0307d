"""The bytes of a segment in the object tier: its name, its records, footer and trailer. Knows bytes, never a bucket.

docs/OBJECT_STORE.md has the layout; docs/FORMAT.md says what a record is.
"""

from __future__ import annotations

import dataclasses
import re
import secrets
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import xxhash

from antefix.errors import BlockCorrupt
from antefix.record import OWNER_BYTES, Buffer, Record, RecordKind
from antefix.secret import TENANT_BYTES
from antefix.store_files import codec
from antefix.store_files.encryption import KeyRing
from antefix.store_files.record_draft import draft_of
from antefix.store_files.record_format import (
    RECORD_ALIGN,
    RECORD_HEADER_BYTES,
    SEGMENT_HEADER_BYTES,
    Codec,
    RecordFlag,
    StoreIdentity,
    align,
    pack_segment_header,
    payload_checksum,
    sign,
    unpack_segment_header,
)
from antefix.store_files.record_header import RecordHeader, pack_record_header, unpack_record_header

SEGMENTS: Final = "segments/"
# Its number in each record's place: an object is a segment of its own, told apart by its id.
SEGMENT_NUMBER: Final = 1
TRAILER_MAGIC: Final = b"AFXTRAIL"
# magic, checksum of the rest, footer offset, records
TRAILER: Final = struct.Struct("<8sQQQ")
_KIND_LETTERS: Final = {RecordKind.BLOCK: "b", RecordKind.CHECKPOINT: "c"}
_KINDS: Final = {letter: kind for kind, letter in _KIND_LETTERS.items()}
_NAME: Final = re.compile(r"segments/([0-9a-f]{12})-([0-9a-f]{12})-([bc])-([0-9a-f]{32})-([0-9a-f]{32})\.seg")

Plans = Mapping[tuple[bytes, RecordKind], codec.PlanePlan]


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentRef:
    """The facts in an object's name, and its length. tenant: the tenant's digest. id: random, the segment's
    store id.
    """

    created_ms: int
    expires_ms: int
    kind: RecordKind
    tenant: bytes
    id: bytes
    nbytes: int

    @property
    def name(self) -> str:
        letter = _KIND_LETTERS[self.kind]
        times = f"{self.created_ms:012x}-{self.expires_ms:012x}"
        return f"{SEGMENTS}{times}-{letter}-{self.tenant.hex()}-{self.id.hex()}.seg"

    @property
    def seed(self) -> int:
        """Of its headers' checksums."""
        return StoreIdentity(store_id=self.id, created_ms=0).seed

    def expired(self, now_ms: int) -> bool:
        return bool(self.expires_ms) and self.expires_ms <= now_ms

    @classmethod
    def of_name(cls, name: str, nbytes: int) -> SegmentRef | None:
        """None: not a segment's name."""
        match = _NAME.fullmatch(name)
        if match is None:
            return None
        created, expires, letter, tenant, id = match.groups()
        return cls(
            created_ms=int(created, 16),
            expires_ms=int(expires, 16),
            kind=_KINDS[letter],
            tenant=bytes.fromhex(tenant),
            id=bytes.fromhex(id),
            nbytes=nbytes,
        )


def segments_from(created_ms: int) -> str:
    """The first part of a name; all segments created from that time on have names that sort after it."""
    return f"{SEGMENTS}{max(0, created_ms):012x}"


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacedRecord:
    """A record of a segment, as the index knows it. extent_bytes: header, stored bytes and padding together."""

    hash: bytes
    offset: int
    extent_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class BuiltSegment:
    ref: SegmentRef
    parts: list[Buffer]
    records: list[PlacedRecord]


def build_segment(
    records: Sequence[Record],
    *,
    created_ms: int,
    ttl_s: float,
    plans: Plans,
    keys: KeyRing | None = None,
    statements: Iterable[bytes] = (),
) -> BuiltSegment:
    """A segment of records of one tenant and one kind.

    ttl_s: 0: for ever.  plans: how payloads may be coded; others are stored raw.  keys: with them all is encrypted.
    statements: of the fingerprints that occur.
    Raises:  KeyError: there are keys, and none for the tenant.
    """
    expires_ms = created_ms + round(ttl_s * 1000) if ttl_s else 0
    drafts = (_draft(record, created_ms, expires_ms, plans, keys) for record in records)
    return pack_segment(drafts, created_ms=created_ms, expires_ms=expires_ms, statements=statements)


def pack_segment(
    drafts: Iterable[tuple[RecordHeader, Buffer]], *, created_ms: int, expires_ms: int, statements: Iterable[bytes] = ()
) -> BuiltSegment:
    """A segment of at least one record, as the records are stored; each record gets a new place, wherever it lay
    before.
    """
    object_id = secrets.token_bytes(16)
    identity = StoreIdentity(store_id=object_id, created_ms=created_ms)
    parts: list[Buffer] = [pack_segment_header(identity, SEGMENT_NUMBER, created_ms)]
    headers: list[RecordHeader] = []
    at = SEGMENT_HEADER_BYTES

    def add(header: RecordHeader, stored: Buffer) -> RecordHeader:
        nonlocal at
        checksum = payload_checksum(stored)
        placed = dataclasses.replace(header, segment=SEGMENT_NUMBER, offset=at, payload_checksum=checksum)
        parts.append(pack_record_header(placed, identity.seed))
        parts.append(stored)
        parts.append(bytes(align(placed.stored_bytes, RECORD_ALIGN) - placed.stored_bytes))
        at += placed.extent_bytes
        return placed

    for header, stored in drafts:
        headers.append(add(header, stored))
    for text in statements:
        add(_inner_header(RecordKind.STATEMENT, text, created_ms), text)
    footer_offset = at
    footer = b"".join(pack_record_header(header, identity.seed) for header in headers)
    add(_inner_header(RecordKind.FOOTER, footer, created_ms), footer)
    parts.append(sign(TRAILER.pack(TRAILER_MAGIC, 0, footer_offset, len(headers)), 0))
    ref = SegmentRef(
        created_ms=created_ms,
        expires_ms=expires_ms,
        kind=headers[0].kind,
        tenant=headers[0].tenant[:TENANT_BYTES],
        id=object_id,
        nbytes=at + TRAILER.size,
    )
    return BuiltSegment(ref=ref, parts=parts, records=[placed_of(header) for header in headers])


def placed_of(header: RecordHeader) -> PlacedRecord:
    return PlacedRecord(hash=header.hash, offset=header.offset, extent_bytes=header.extent_bytes)


def _draft(
    record: Record, created_ms: int, expires_ms: int, plans: Plans, keys: KeyRing | None
) -> tuple[RecordHeader, Buffer]:
    """The record compressed, where that makes it smaller, and encrypted; its place is not set yet."""
    plan = plans.get((record.fingerprint, record.kind))
    coded = codec.encode(record.payload, plan) if plan is not None else None
    flags = RecordFlag.ELSEWHERE
    return draft_of(record, coded, keys, created_ms=created_ms, expires_ms=expires_ms, flags=flags)


def _inner_header(kind: RecordKind, payload: bytes, created_ms: int) -> RecordHeader:
    """The record of a statement, named by its digest, or the record of a footer."""
    return RecordHeader(
        payload_checksum=bytes(16),
        hash=xxhash.xxh3_128_digest(payload) + bytes(16),
        parent=bytes(32),
        fingerprint=bytes(32),
        segment=0,
        offset=0,
        stored_bytes=len(payload),
        payload_bytes=len(payload),
        position=0,
        created_ms=created_ms,
        expires_ms=0,
        cost_us=0,
        kind=kind,
        codec=Codec.RAW,
        flags=RecordFlag.NONE,
        tenant=bytes(OWNER_BYTES),
    )


def read_trailer(raw: Buffer, nbytes: int) -> tuple[int, int]:
    """The offset of the footer and the number of records, from the last bytes of an object. nbytes: the object's
    length.

    Raises:  BlockCorrupt: there is no trailer, or it is damaged.
    """
    data = bytes(raw)
    if len(data) != TRAILER.size or data[:8] != TRAILER_MAGIC or sign(data, 0) != data:
        raise BlockCorrupt("the segment in the object store has no valid trailer at its end")
    _, _, footer_offset, num_records = TRAILER.unpack(data)
    if not SEGMENT_HEADER_BYTES <= footer_offset <= nbytes - TRAILER.size - RECORD_HEADER_BYTES:
        raise BlockCorrupt("the segment's footer lies outside of the segment's bytes")
    return footer_offset, num_records


def read_footer(raw: Buffer, ref: SegmentRef, footer_offset: int, num_records: int) -> list[RecordHeader]:
    """The headers of a segment's records. raw: the bytes from the footer's offset to the trailer.

    Raises:  BlockCorrupt: damaged, or another segment's.
    """
    data = memoryview(raw)
    header = unpack_record_header(bytes(data[:RECORD_HEADER_BYTES]), ref.seed)
    body = bytes(data[RECORD_HEADER_BYTES : RECORD_HEADER_BYTES + header.stored_bytes])
    if header.kind is not RecordKind.FOOTER or header.offset != footer_offset:
        raise BlockCorrupt("the record at the place of the segment's footer is not a footer")
    if payload_checksum(body) != header.payload_checksum or len(body) != num_records * RECORD_HEADER_BYTES:
        raise BlockCorrupt("a damaged footer")
    return [
        unpack_record_header(body[first : first + RECORD_HEADER_BYTES], ref.seed)
        for first in range(0, len(body), RECORD_HEADER_BYTES)
    ]


def scan_segment(data: Buffer, ref: SegmentRef) -> Iterator[tuple[RecordHeader, memoryview]]:
    """All valid records of a whole segment, including statements, with or without a footer; damaged records are left
    out.

    Raises:  BlockCorrupt: it is not this segment.
    """
    view = memoryview(data).cast("B")
    identity, _ = unpack_segment_header(bytes(view[:SEGMENT_HEADER_BYTES]))
    if identity.store_id != ref.id:
        raise BlockCorrupt("these are another segment's bytes")
    yield from scan_records(view[SEGMENT_HEADER_BYTES:], ref, SEGMENT_HEADER_BYTES)


def scan_records(data: Buffer, ref: SegmentRef, start: int) -> Iterator[tuple[RecordHeader, memoryview]]:
    """The valid records in a part of a segment. start: the offset in the segment at which the part begins."""
    view = memoryview(data).cast("B")
    at = 0
    while at + RECORD_HEADER_BYTES <= view.nbytes:
        try:
            header = unpack_record_header(bytes(view[at : at + RECORD_HEADER_BYTES]), ref.seed)
        except BlockCorrupt:
            # A damaged header says nothing of where the next one is: it is looked for.
            at += RECORD_ALIGN
            continue
        stored = view[at + RECORD_HEADER_BYTES : at + RECORD_HEADER_BYTES + header.stored_bytes]
        whole = header.offset == at + start and stored.nbytes == header.stored_bytes
        if whole and payload_checksum(stored) == header.payload_checksum and header.kind is not RecordKind.FOOTER:
            yield header, stored
        at += header.extent_bytes if whole else RECORD_ALIGN
