"""Bytes of a ledger segment. This module knows no files and no fields of records; docs/BILLING.md has the same tables.

    segment header   magic 8 | version u32 | zero u32 | first sequence u64 | previous hash 32 | source 16 | crc u32
    entry            magic u32 | payload length u32 | crc u32 | sequence u64 | kind u8 | flags u8 | zero u16 | hash 32
                     | payload

All little-endian. An entry's hash is BLAKE2b-256 over the previous entry's hash, sequence, kind and payload: an edit, a
removal or a swap anywhere changes every hash after it. The crc of an entry covers everything after it, and detects an
incomplete write.
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from antefix.errors import AntefixError

SEGMENT_MAGIC: Final = b"AFXUSAGE"
FORMAT_VERSION: Final = 1
ENTRY_MAGIC: Final = 0x1E584641
HASH_BYTES: Final = 32
SOURCE_BYTES: Final = 16
GENESIS: Final = bytes(HASH_BYTES)

_SEGMENT_HEADER: Final = struct.Struct("<8sIIQ32s16s")
SEGMENT_HEADER_BYTES: Final = _SEGMENT_HEADER.size + 4
_ENTRY_HEAD: Final = struct.Struct("<III")
_ENTRY_BODY: Final = struct.Struct("<QBBH32s")
ENTRY_HEADER_BYTES: Final = _ENTRY_HEAD.size + _ENTRY_BODY.size
# A record takes under 2 KiB even with ids of maximum length. A longer length field is damage.
PAYLOAD_BYTES_MAX: Final = 64 << 10
# Set in the first entry of a batch. Batches are synced one after the other, so an entry that begins a later batch
# proves that everything before it was durable. A fault before such an entry is damage, not an incomplete last write.
FLAG_BATCH_START: Final = 1


class LedgerCorrupt(AntefixError):
    """The ledger was damaged or edited. A damaged ledger is not truncated; the operator restores it from a copy."""


class EntryKind(IntEnum):
    """The values of this enum are part of the stored format, so they must never be renumbered."""

    OPEN = 1
    SETTLE = 2
    # These kinds exist from version 0.2 on (`adjustment.py`). An older reader reports them as damage.
    ADJUST = 3
    CHANGE = 4


_KINDS: Final = frozenset(int(kind) for kind in EntryKind)


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentHeader:
    first_sequence: int
    previous_hash: bytes
    source: bytes

    def pack(self) -> bytes:
        head = _SEGMENT_HEADER.pack(
            SEGMENT_MAGIC, FORMAT_VERSION, 0, self.first_sequence, self.previous_hash, self.source
        )
        return head + zlib.crc32(head).to_bytes(4, "little")


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One entry as read. `offset` is the byte in the segment at which the entry starts."""

    sequence: int
    kind: EntryKind
    flags: int
    hash: bytes
    payload: bytes
    offset: int

    @property
    def end(self) -> int:
        return self.offset + ENTRY_HEADER_BYTES + len(self.payload)


def unpack_segment_header(data: bytes) -> SegmentHeader:
    """Raises:  LedgerCorrupt: the data is too short, or is not a segment of this version."""
    head, crc = data[: _SEGMENT_HEADER.size], data[_SEGMENT_HEADER.size : SEGMENT_HEADER_BYTES]
    if len(data) < SEGMENT_HEADER_BYTES or zlib.crc32(head) != int.from_bytes(crc, "little"):
        raise LedgerCorrupt("a segment's header is damaged")
    magic, version, _, first_sequence, previous_hash, source = _SEGMENT_HEADER.unpack(head)
    if magic != SEGMENT_MAGIC or version != FORMAT_VERSION:
        raise LedgerCorrupt(f"not a ledger segment of version {FORMAT_VERSION}")
    return SegmentHeader(first_sequence=first_sequence, previous_hash=previous_hash, source=source)


def chain_hash(previous: bytes, sequence: int, kind: int, payload: bytes) -> bytes:
    state = hashlib.blake2b(previous, digest_size=HASH_BYTES, person=b"antefix-ledger")
    state.update(struct.pack("<QB", sequence, kind))
    state.update(payload)
    return state.digest()


def pack_entry(sequence: int, kind: EntryKind, flags: int, hash: bytes, payload: bytes) -> bytes:
    body = _ENTRY_BODY.pack(sequence, kind, flags, 0, hash) + payload
    return _ENTRY_HEAD.pack(ENTRY_MAGIC, len(payload), zlib.crc32(body)) + body


def unpack_entry(data: bytes | memoryview, offset: int) -> Entry | None:
    """The entry at `offset`; None if there is no intact entry."""
    if offset + ENTRY_HEADER_BYTES > len(data):
        return None
    magic, length, crc = _ENTRY_HEAD.unpack_from(data, offset)
    stop = offset + ENTRY_HEADER_BYTES + length
    if magic != ENTRY_MAGIC or length > PAYLOAD_BYTES_MAX or stop > len(data):
        return None
    if zlib.crc32(data[offset + _ENTRY_HEAD.size : stop]) != crc:
        return None
    sequence, kind, flags, _, hash = _ENTRY_BODY.unpack_from(data, offset + _ENTRY_HEAD.size)
    if kind not in _KINDS:
        return None
    payload = bytes(data[offset + ENTRY_HEADER_BYTES : stop])
    return Entry(sequence=sequence, kind=EntryKind(kind), flags=flags, hash=hash, payload=payload, offset=offset)


def entries_of(data: bytes | memoryview, offset: int = SEGMENT_HEADER_BYTES) -> Iterator[Entry]:
    """The intact entries from `offset` on, up to the first damaged one."""
    while (entry := unpack_entry(data, offset)) is not None:
        yield entry
        offset = entry.end


def has_later_batch(data: bytes, offset: int) -> bool:
    """Whether a batch of entries starts somewhere after `offset`. If so, the entry at `offset` was durable once, so a
    fault in it is damage.
    """
    magic = ENTRY_MAGIC.to_bytes(4, "little")
    while (offset := data.find(magic, offset + 1)) >= 0:
        entry = unpack_entry(data, offset)
        if entry is not None and entry.flags & FLAG_BATCH_START:
            return True
    return False
