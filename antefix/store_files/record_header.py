"""A record's header: how it is packed and read, and the checks that a reader makes. Knows bytes, never files.

New records have version 2. Records of version 1 are read, and compaction copies them unchanged. Headers of both
versions have 256 bytes, with hash and fingerprint at the same offsets. docs/FORMAT.md has the tables.
"""

from __future__ import annotations

import itertools
import struct
from dataclasses import dataclass
from typing import Final

import xxhash

from antefix.block import HashKind
from antefix.errors import BlockCorrupt, InvalidRequest
from antefix.record import OWNER_BYTES, RecordKind
from antefix.store_files.record_format import (
    CHECK_OFFSET,
    MAC_BYTES,
    NONCE_BYTES,
    RECORD_HEADER,
    RECORD_HEADER_BYTES,
    RECORD_HEADER_V1,
    RECORD_MAGIC,
    RECORD_MAGIC_V1,
    SALT_BYTES,
    TENANT_BYTES_MAX_V1,
    Codec,
    IndexEntry,
    RecordFlag,
    extent_bytes,
    sign,
)

# The bytes that the writer makes and the store never changes, and the part of them that the seal covers.
SEALED_PART: Final = slice(32, 200)
SIGNED_PART: Final = slice(32, 168)
SEALED_BYTES: Final = 200 - 32
_COST_US_MAX: Final = 0xFFFFFFFF
_ENCRYPTED_BIT: Final = int(RecordFlag.ENCRYPTED)

# Where a reader looks. In both versions:
_CHECKSUM_AT: Final = slice(CHECK_OFFSET, CHECK_OFFSET + 16)
_HASH_AT: Final = slice(32, 64)
_FINGERPRINT_AT: Final = slice(96, 128)


@dataclass(frozen=True, slots=True)
class _Places:
    """The offsets in a version of the header that differ between versions. place: segment, offset, stored bytes,
    payload bytes.
    """

    kind: int
    codec: int
    flags: int
    place: struct.Struct
    place_offset: int
    payload_bytes_last: bool


_PLACES: Final = {
    RECORD_MAGIC: _Places(164, 228, 229, struct.Struct("<I56xIQI"), 152, False),
    RECORD_MAGIC_V1: _Places(192, 193, 194, struct.Struct("<QQQQ"), 128, True),
}


# A look-up takes a tenth of the time of a call of the enum, and each header takes four. Unknown bits of flags are kept.
_KINDS: Final = {int(kind): kind for kind in RecordKind}
_HASH_KINDS: Final = {int(kind): kind for kind in HashKind}
_CODECS: Final = {int(codec): codec for codec in Codec}
_FLAGS: Final = tuple(RecordFlag(bits) for bits in range(256))
# Kind, hash kind and codec of a header that this build can read.
CODES: Final = frozenset(itertools.product(_KINDS, _HASH_KINDS, _CODECS))


# Not frozen: making a frozen one of so many fields takes three times as long, and a rebuild makes one per record.
@dataclass(slots=True, kw_only=True)
class RecordHeader:
    """The header of 256 bytes before each payload. Not to be changed.

    tenant: tenant and user digest, 24 bytes; in version 1 the tenant's name in UTF-8. generation: of the secret that
    named and sealed the record; 0: it has no seal. family: `antefix.block.Family.code`.
    """

    payload_checksum: bytes
    hash: bytes
    parent: bytes
    fingerprint: bytes
    segment: int
    offset: int
    stored_bytes: int
    payload_bytes: int
    position: int
    created_ms: int
    expires_ms: int
    cost_us: int
    kind: RecordKind
    codec: Codec
    flags: RecordFlag
    tenant: bytes = bytes(OWNER_BYTES)
    nonce: bytes = bytes(NONCE_BYTES)
    generation: int = 0
    num_cards: int = 1
    hash_kind: HashKind = HashKind.CHAINED_BLAKE2B
    family: int = 0
    salt: bytes = bytes(SALT_BYTES)
    mac: bytes = bytes(MAC_BYTES)
    version: int = 2

    @property
    def extent_bytes(self) -> int:
        """The sum of the bytes of header, stored payload and padding."""
        return extent_bytes(self.stored_bytes)

    @property
    def owner(self) -> bytes:
        """The record's owner, in the form that the index uses."""
        return owner_row(self.version, self.tenant)


def owner_row(version: int, tenant: bytes) -> bytes:
    """The key of an owner in the index's table of names. A name of version 1 is never taken for a digest with the same
    bytes.
    """
    return (b"t" if version == 1 else b"o") + tenant


def pack_record_header(header: RecordHeader, seed: int) -> bytes:
    """Raises:  InvalidRequest: the tenant does not fit into a header of this version."""
    return sign(_pack_v1(header) if header.version == 1 else _pack_v2(header), seed)


def _pack_v2(header: RecordHeader) -> bytes:
    if len(header.tenant) != OWNER_BYTES:
        raise InvalidRequest(f"a record's tenant must be a digest of {OWNER_BYTES} bytes, has {len(header.tenant)}")
    return RECORD_HEADER.pack(
        RECORD_MAGIC,
        0,
        header.payload_checksum,
        header.hash,
        header.parent,
        header.fingerprint,
        header.tenant[:16],
        header.tenant[16:],
        header.payload_bytes,
        header.position,
        header.generation,
        header.num_cards,
        header.kind,
        header.hash_kind,
        header.family,
        0,
        header.salt,
        header.mac,
        header.nonce,
        header.segment,
        header.offset,
        header.stored_bytes,
        header.codec,
        header.flags,
        0,
        header.created_ms,
        header.expires_ms,
        min(header.cost_us, _COST_US_MAX),
        0,
    )


def _pack_v1(header: RecordHeader) -> bytes:
    if len(header.tenant) > TENANT_BYTES_MAX_V1:
        raise InvalidRequest(
            f"record format version 1 has room for {TENANT_BYTES_MAX_V1} bytes of a tenant's name, this name "
            f"has {len(header.tenant)}"
        )
    return RECORD_HEADER_V1.pack(
        RECORD_MAGIC_V1,
        0,
        header.payload_checksum,
        header.hash,
        header.parent,
        header.fingerprint,
        header.segment,
        header.offset,
        header.stored_bytes,
        header.payload_bytes,
        header.position,
        header.created_ms,
        header.expires_ms,
        header.cost_us,
        header.kind,
        header.codec,
        header.flags,
        len(header.tenant),
        header.tenant,
        header.nonce,
        0,
    )


def unpack_record_header(raw: bytes | bytearray | memoryview, seed: int) -> RecordHeader:
    """Raises:  BlockCorrupt: wrong magic, checksum or a field outside its range."""
    data = bytes(raw)
    if len(data) != RECORD_HEADER_BYTES or data[:8] not in _PLACES:
        raise BlockCorrupt("no record header here")
    if xxhash.xxh3_64_intdigest(data[CHECK_OFFSET:], seed) != int.from_bytes(data[8:CHECK_OFFSET], "little"):
        raise BlockCorrupt("record header: wrong checksum")
    try:
        return _unpack_v2(data) if data[:8] == RECORD_MAGIC else _unpack_v1(data)
    except KeyError as err:
        raise BlockCorrupt(f"record header: {err} is not a kind or codec that this build knows") from err


def _unpack_v2(data: bytes) -> RecordHeader:
    f = RECORD_HEADER.unpack(data)
    return RecordHeader(
        payload_checksum=f[2],
        hash=f[3],
        parent=f[4],
        fingerprint=f[5],
        tenant=f[6] + f[7],
        payload_bytes=f[8],
        position=f[9],
        generation=f[10],
        num_cards=f[11],
        kind=_KINDS[f[12]],
        hash_kind=_HASH_KINDS[f[13]],
        family=f[14],
        salt=f[16],
        mac=f[17],
        nonce=f[18],
        segment=f[19],
        offset=f[20],
        stored_bytes=f[21],
        codec=_CODECS[f[22]],
        flags=_FLAGS[f[23]],
        created_ms=f[25],
        expires_ms=f[26],
        cost_us=f[27],
    )


def _unpack_v1(data: bytes) -> RecordHeader:
    f = RECORD_HEADER_V1.unpack(data)
    return RecordHeader(
        version=1,
        payload_checksum=f[2],
        hash=f[3],
        parent=f[4],
        fingerprint=f[5],
        segment=f[6],
        offset=f[7],
        stored_bytes=f[8],
        payload_bytes=f[9],
        position=f[10],
        created_ms=f[11],
        expires_ms=f[12],
        cost_us=f[13],
        kind=_KINDS[f[14]],
        codec=_CODECS[f[15]],
        flags=_FLAGS[f[16]],
        tenant=f[18][: f[17]],
        nonce=f[19],
    )


def signed_part_of(header: RecordHeader) -> bytes:
    """The signed part of a header of version 2."""
    return _pack_v2(header)[SIGNED_PART]


def sealed_part(raw: bytes) -> bytes:
    """The sealed part of a header. In version 1 these bytes are zeros, which match no seal."""
    return raw[SEALED_PART] if raw[:8] == RECORD_MAGIC else bytes(SEALED_BYTES)


def expected_checksum(
    raw: bytes, seed: int, *, kind: int, block_hash: bytes, fingerprint: bytes, entry: IndexEntry
) -> bytes | None:
    """The payload checksum in a header, if the header is exactly the expected one; otherwise None.

    A reader makes only this check for every record, because building a whole RecordHeader would cost more than hashing
    a small payload.
    """
    places = _places_of(raw, seed, kind, block_hash, fingerprint)
    if (
        places is None
        or _place(raw, places) != (entry.segment, entry.offset, entry.stored_bytes, entry.payload_bytes)
        or raw[places.codec] != entry.codec
    ):
        return None
    return raw[_CHECKSUM_AT]


def plain_record(
    raw: bytes, seed: int, *, kind: int, block_hash: bytes, fingerprint: bytes, segment: int, offset: int
) -> tuple[int, bytes] | None:
    """Payload bytes and checksum in a header, if the header is the one expected at this place; otherwise None.

    This check is for readers without an index entry, of records that are neither compressed nor encrypted.
    """
    places = _places_of(raw, seed, kind, block_hash, fingerprint)
    if places is None:
        return None
    found_segment, found_offset, stored_bytes, payload_bytes = _place(raw, places)
    if (
        (found_segment, found_offset, stored_bytes) != (segment, offset, payload_bytes)
        or raw[places.codec] != Codec.RAW
        or raw[places.flags] & _ENCRYPTED_BIT
    ):
        return None
    return payload_bytes, raw[_CHECKSUM_AT]


def _places_of(raw: bytes, seed: int, kind: int, block_hash: bytes, fingerprint: bytes) -> _Places | None:
    """The offsets of the fields in a valid header; None if the header is damaged or belongs to another record."""
    places = _PLACES.get(raw[:8])
    is_its = (
        places is not None
        and len(raw) == RECORD_HEADER_BYTES
        and xxhash.xxh3_64_intdigest(raw[CHECK_OFFSET:], seed) == int.from_bytes(raw[8:CHECK_OFFSET], "little")
        and raw[_HASH_AT] == block_hash
        and raw[_FINGERPRINT_AT] == fingerprint
        and raw[places.kind] == kind
    )
    return places if is_its else None


def _place(raw: bytes, places: _Places) -> tuple[int, int, int, int]:
    """A record's segment, its offset there, its stored bytes and its payload bytes."""
    found = places.place.unpack_from(raw, places.place_offset)
    if places.payload_bytes_last:
        return found
    payload_bytes, segment, offset, stored_bytes = found
    return segment, offset, stored_bytes, payload_bytes
