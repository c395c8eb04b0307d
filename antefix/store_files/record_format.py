"""The bytes of a store: identity file, segment header, index entry, and what a record's header is made of. Knows bytes,
never files. `antefix.store_files.record_header` packs and reads headers.

docs/FORMAT.md has the same numbers as tables, and a test compares them. All integers are little-endian, except in
index keys, which are big-endian so that their byte order is their numeric order.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from typing import Any, Final

import xxhash

from antefix.errors import BlockCorrupt
from antefix.whole_number import whole_number

FORMAT_VERSION: Final = 3
FORMAT_VERSIONS: Final = (1, 2, 3)
# Of records, which version 3 of a store left as they were: what a caller says in `record_format`.
RECORD_VERSION: Final = 2
RECORD_VERSIONS: Final = (1, 2)
STORE_FILE: Final = "STORE"
LOCK_FILE: Final = "LOCK"
INDEX_DIR: Final = "index"
SEGMENT_DIR: Final = "segments"

# A group commit starts at a multiple of this, so that an acknowledged record never shares a sector with a later write.
BATCH_ALIGN: Final = 4096
RECORD_ALIGN: Final = 8
HASH_BYTES: Final = 32
NONCE_BYTES: Final = 12
SALT_BYTES: Final = 16
MAC_BYTES: Final = 16
# Of version 1, where a record had its tenant's name.
TENANT_BYTES_MAX_V1: Final = 44
# Lengths are u32 in the index.
PAYLOAD_BYTES_MAX: Final = 1 << 30

STORE_MAGIC: Final = b"AFXSTORE"
SEGMENT_MAGIC: Final = b"AFXSEGMT"
RECORD_MAGIC: Final = b"AFXRECD2"
RECORD_MAGIC_V1: Final = b"AFXRECRD"
# What a scan looks for.
RECORD_MAGICS_BEGIN: Final = b"AFXREC"

# magic, checksum of the rest, version, zero, store id, created (unix ms)
STORE_HEADER: Final = struct.Struct("<8sQII16sQ")
# magic, checksum of the rest, version, zero, store id, segment, created (unix ms); then zeros up to BATCH_ALIGN
SEGMENT_HEADER: Final = struct.Struct("<8sQII16sQQ")
SEGMENT_HEADER_BYTES: Final = BATCH_ALIGN
# Segments are numbered in u32 from 1 on. No store gets half-way, so a file with a higher number is not a store's.
_SEGMENT_MAX: Final = 1 << 31
# magic, checksum of the rest, payload checksum; the sealed part: hash, parent, fingerprint, tenant, user, payload
# bytes, position, key generation, GPUs, kind, hash kind, family, zero, salt, MAC; then nonce, segment, offset, stored
# bytes, codec, flags, zero, created ms, expires ms, cost us, zero
RECORD_HEADER: Final = struct.Struct("<8sQ16s32s32s32s16s8sIIHHBBBB16s16s12sIQIBBHQQII")
# magic, checksum of the rest, payload checksum, hash, parent, fingerprint, segment, offset, stored bytes,
# payload bytes, position, created ms, expires ms, cost us, kind, codec, flags, tenant bytes, tenant, nonce, zero
RECORD_HEADER_V1: Final = struct.Struct("<8sQ16s32s32s32sQQQQQQQQBBBB44s12sI")
# Of both versions, so that the length of a record does not depend on its version.
RECORD_HEADER_BYTES: Final = 256
assert RECORD_HEADER.size == RECORD_HEADER_V1.size == RECORD_HEADER_BYTES
# segment, offset, stored bytes, payload bytes, position, fingerprint id, tenant id, children, rank ms, expires ms,
# pinned until ms, prefix bytes, cost ms, ttl s, codec, flags, zero, parent, checksum of key and value
INDEX_ENTRY: Final = struct.Struct("<IQIIIIIIQQQQIIBBH32sI")
# The fields of IndexEntry in its order: the same without the zero and the checksum.
_ENTRY_FIELDS: Final = struct.Struct("<IQIIIIIIQQQQIIBB2x32s4x")
assert _ENTRY_FIELDS.size == INDEX_ENTRY.size
_ENTRY_BODY_BYTES: Final = INDEX_ENTRY.size - 4
# The same where everything fits, which is nearly always: place, use, life, bytes, tree, sums (docs/FORMAT.md has their
# bits), parent, checksum of key and value
INDEX_ENTRY_SHORT: Final = struct.Struct("<QQQQQQ32sI")
_SHORT_BODY_BYTES: Final = INDEX_ENTRY_SHORT.size - 4
# committed end, live bytes, live records
SEGMENT_ENTRY: Final = struct.Struct("<QQQ")
CHECK_OFFSET: Final = 16
_APART_BIT: Final = 32
_QUARANTINED_BIT: Final = 128


class Codec(IntEnum):
    """How the payload of a record is stored. The values of this enum are part of the stored format."""

    RAW = 0
    PLANES_ZSTD = 1


class RecordFlag(IntFlag):
    """Flag bits in a record header and in an index entry. The values of these flags are part of the stored format.

    FIRST: the first block of its chain; its parent, the chain's root, is never stored.
    ENCRYPTED: the stored bytes are AES-256-GCM of the coded payload, with a tag of 16 bytes behind them.
    ELSEWHERE: the record's parent may be in another store or tier; if the parent is not here, the record stands for
    itself.
    APART: used only in the index; the record's parent was not in this store when the record was indexed, so the parent
    does not count it among its children. SEALED: used only in the index; the record is of version 2, which has a seal.
    QUARANTINED: used only in the index; the record failed a check, and counts as missing until it is put again.
    """

    NONE = 0
    FIRST = 1
    ENCRYPTED = 2
    ELSEWHERE = 4
    APART = 32
    SEALED = 64
    QUARANTINED = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreIdentity:
    """The contents of the STORE file. version: the format version of the store, or of the segment."""

    store_id: bytes
    created_ms: int
    version: int = FORMAT_VERSION

    @property
    def seed(self) -> int:
        """The seed of header checksums, which makes a header from another store fail like a damaged one."""
        return int.from_bytes(self.store_id[:8], "little")


@dataclass(slots=True)
class IndexEntry:
    """Where a record is stored, and what eviction must know about the record. An entry can be changed: the writer
    updates its counts and times in place.

    ttl_s: how long the record stays after its last use, 0 for ever; expires_ms follows from it. children: the number of
    blocks that continue this block, and of its checkpoint. prefix_bytes: payload bytes from the start of the chain to
    here.
    """

    segment: int
    offset: int
    stored_bytes: int
    payload_bytes: int
    position: int
    fingerprint_id: int
    tenant_id: int
    children: int
    rank_ms: int
    expires_ms: int
    pinned_ms: int
    prefix_bytes: int
    cost_ms: int
    ttl_s: int
    codec: int
    flags: int
    parent: bytes

    @property
    def extent_bytes(self) -> int:
        return extent_bytes(self.stored_bytes)

    @property
    def end(self) -> int:
        """The offset in the segment at which the stored bytes end; padding follows."""
        return self.offset + RECORD_HEADER_BYTES + self.stored_bytes

    @property
    def quarantined(self) -> bool:
        return bool(self.flags & _QUARANTINED_BIT)

    @property
    def apart(self) -> bool:
        return bool(self.flags & _APART_BIT)

    def live(self, now_ms: int) -> bool:
        """Whether a record can be read: it is not quarantined, and has not expired, unless records that depend on it
        keep it.
        """
        return not self.flags & _QUARANTINED_BIT and (
            self.children > 0 or not self.expires_ms or self.expires_ms > now_ms
        )


def align(nbytes: int, step: int) -> int:
    return -(-nbytes // step) * step


def extent_bytes(stored_bytes: int) -> int:
    """How many bytes of a segment a record with so many stored bytes takes."""
    return RECORD_HEADER_BYTES + (stored_bytes + RECORD_ALIGN - 1) // RECORD_ALIGN * RECORD_ALIGN


def payload_checksum(*stored: bytes | bytearray | memoryview) -> bytes:
    """The checksum of the stored bytes, which may lie in several parts."""
    if len(stored) == 1:
        return xxhash.xxh3_128_digest(stored[0])
    state = xxhash.xxh3_128()
    for part in stored:
        state.update(part)
    return state.digest()


def pack_identity(identity: StoreIdentity) -> bytes:
    raw = STORE_HEADER.pack(STORE_MAGIC, 0, identity.version, 0, identity.store_id, identity.created_ms)
    return sign(raw, 0)


def unpack_identity(raw: bytes) -> StoreIdentity:
    """Raises:  BlockCorrupt: not an identity file, or damaged."""
    if len(raw) != STORE_HEADER.size or raw[:8] != STORE_MAGIC or sign(raw, 0) != raw:
        raise BlockCorrupt("the STORE file is not an Antefix store's, or damaged")
    _, _, version, _, store_id, created_ms = STORE_HEADER.unpack(raw)
    return StoreIdentity(store_id=store_id, created_ms=created_ms, version=version)


def pack_segment_header(identity: StoreIdentity, segment: int, created_ms: int) -> bytes:
    raw = SEGMENT_HEADER.pack(SEGMENT_MAGIC, 0, identity.version, 0, identity.store_id, segment, created_ms)
    return sign(raw, 0).ljust(SEGMENT_HEADER_BYTES, b"\0")


def unpack_segment_header(raw: bytes) -> tuple[StoreIdentity, int]:
    """The store that the segment belongs to, and its number.

    Raises:  BlockCorrupt: not a segment's header, or damaged.
    """
    head = bytes(raw[: SEGMENT_HEADER.size])
    if len(head) != SEGMENT_HEADER.size or head[:8] != SEGMENT_MAGIC or sign(head, 0) != head:
        raise BlockCorrupt("the segment file does not begin with a segment header, or the header is damaged")
    _, _, version, _, store_id, segment, created_ms = SEGMENT_HEADER.unpack(head)
    return StoreIdentity(store_id=store_id, created_ms=created_ms, version=version), segment


def pack_entry(entry: IndexEntry, key: bytes) -> bytes:
    """An index entry is packed in the short form if all its values fit into that form."""
    if (
        entry.pinned_ms
        or entry.offset & 7
        or (entry.offset >> 35 | entry.segment >> 24 | entry.rank_ms >> 44 | entry.fingerprint_id >> 20)
        or (entry.expires_ms >> 42 | entry.ttl_s >> 22 | entry.stored_bytes >> 30 | entry.payload_bytes >> 30)
        or (entry.position >> 28 | entry.children >> 16 | entry.tenant_id >> 20 | entry.prefix_bytes >> 44)
        or (entry.cost_ms >> 20 | entry.codec >> 4)
    ):
        return _pack_long(entry, key)
    body = INDEX_ENTRY_SHORT.pack(
        entry.offset >> 3 | entry.segment << 32 | entry.flags << 56,
        entry.rank_ms | entry.fingerprint_id << 44,
        entry.expires_ms | entry.ttl_s << 42,
        entry.stored_bytes | entry.payload_bytes << 30 | entry.codec << 60,
        entry.position | entry.children << 28 | entry.tenant_id << 44,
        entry.prefix_bytes | entry.cost_ms << 44,
        entry.parent,
        0,
    )[:_SHORT_BODY_BYTES]
    return body + xxhash.xxh32_intdigest(key + body).to_bytes(4, "little")


def _pack_long(entry: IndexEntry, key: bytes) -> bytes:
    body = INDEX_ENTRY.pack(
        entry.segment,
        entry.offset,
        entry.stored_bytes,
        entry.payload_bytes,
        entry.position,
        entry.fingerprint_id,
        entry.tenant_id,
        entry.children,
        entry.rank_ms,
        entry.expires_ms,
        entry.pinned_ms,
        entry.prefix_bytes,
        entry.cost_ms,
        entry.ttl_s,
        entry.codec,
        entry.flags,
        0,
        entry.parent,
        0,
    )[:_ENTRY_BODY_BYTES]
    return body + xxhash.xxh32_intdigest(key + body).to_bytes(4, "little")


def unpack_entry(value: bytes, key: bytes) -> IndexEntry | None:
    """The index entry, or None if the value in the index does not carry the right checksum: LMDB itself checks none of
    the bytes that it returns.
    """
    size = len(value)
    if size not in (INDEX_ENTRY_SHORT.size, INDEX_ENTRY.size):
        return None
    if xxhash.xxh32_intdigest(key + value[: size - 4]) != int.from_bytes(value[size - 4 :], "little"):
        return None
    if size == INDEX_ENTRY.size:
        return IndexEntry(*_ENTRY_FIELDS.unpack(value))
    place, use, life, nbytes, tree, sums, parent, _ = INDEX_ENTRY_SHORT.unpack(value)
    return IndexEntry(*(*short_fields(place, use, life, nbytes, tree, sums), parent))


def position_in(value: bytes) -> int:
    """The position (in tokens) in an index entry, without a check of the entry."""
    if len(value) == INDEX_ENTRY.size:
        return int.from_bytes(value[20:24], "little")
    return int.from_bytes(value[32:36], "little") & 0xFFFFFFF


def short_fields(place: Any, use: Any, life: Any, nbytes: Any, tree: Any, sums: Any) -> tuple[Any, ...]:
    """The fields of IndexEntry except its parent, in order, from the words of the short form, or from arrays of such
    words.
    """
    return (
        place >> 32 & 0xFFFFFF,
        (place & 0xFFFFFFFF) << 3,
        nbytes & 0x3FFFFFFF,
        nbytes >> 30 & 0x3FFFFFFF,
        tree & 0xFFFFFFF,
        use >> 44,
        tree >> 44,
        tree >> 28 & 0xFFFF,
        use & 0xFFFFFFFFFFF,
        life & 0x3FFFFFFFFFF,
        place & 0,
        sums & 0xFFFFFFFFFFF,
        sums >> 44,
        life >> 42,
        nbytes >> 60,
        place >> 56,
    )


def short_places(place: Any, use: Any, life: Any, nbytes: Any, tree: Any) -> tuple[Any, ...]:
    """Of arrays of words of the short form, only what a reader needs: the segment, offset, stored and payload bytes,
    fingerprint's id, children, expiry time, codec and flags.
    """
    return (
        place >> 32 & 0xFFFFFF,
        (place & 0xFFFFFFFF) << 3,
        nbytes & 0x3FFFFFFF,
        nbytes >> 30 & 0x3FFFFFFF,
        use >> 44,
        tree >> 28 & 0xFFFF,
        life & 0x3FFFFFFFFFF,
        nbytes >> 60,
        place >> 56,
    )


def segment_name(segment: int) -> str:
    return f"{segment:012d}.seg"


def segment_number(name: str) -> int | None:
    """The number in a segment's file name; None for the name of any other file."""
    stem, _, suffix = name.partition(".")
    return whole_number(stem, _SEGMENT_MAX) if suffix == "seg" and len(stem) == 12 else None


def sign(raw: bytes, seed: int) -> bytes:
    """`raw` with the XXH3-64 checksum of its bytes from 16 on, written to bytes 8 to 16."""
    return raw[:8] + xxhash.xxh3_64_intdigest(raw[CHECK_OFFSET:], seed).to_bytes(8, "little") + raw[CHECK_OFFSET:]
