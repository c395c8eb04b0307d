"""A checkpoint as one Redis value.

    offset  size  field
    0       4     magic "AFW1"
    4       4     position in tokens, u32
    8       8     payload bytes, u64
    16      32    fingerprint
    48      32    hash of the block before the checkpoint
    80      8     XXH3-64 of bytes 0 to 79 and the payload
    88      ...   payload: window state (see `antefix.model.window_state`)

Little-endian. Fingerprint and hash are inside, so a value under the wrong key is caught like a damaged one.
"""

from __future__ import annotations

import struct

import xxhash

from antefix.errors import BlockCorrupt
from antefix.record import Record

MAGIC = b"AFW1"
_HEADER = struct.Struct("<4sIQ32s32s")
_CHECKSUM = struct.Struct("<Q")
HEADER_BYTES = _HEADER.size + _CHECKSUM.size


def pack(record: Record) -> bytes:
    payload = memoryview(record.payload).cast("B")
    head = _HEADER.pack(MAGIC, record.position, payload.nbytes, record.fingerprint, record.hash)
    return b"".join((head, _CHECKSUM.pack(_checksum(head, payload)), payload))


def unpack(value: bytes, *, name: bytes, fingerprint: bytes) -> bytes:
    """The payload of the checkpoint after block `name`.

    Raises:  BlockCorrupt: the value is damaged, or it is another checkpoint's.
    """
    if len(value) < HEADER_BYTES:
        raise BlockCorrupt(f"a pooled checkpoint has at least {HEADER_BYTES} bytes, this has {len(value)}")
    head, payload = value[: _HEADER.size], memoryview(value)[HEADER_BYTES:]
    magic, _, nbytes, kept_fingerprint, kept_name = _HEADER.unpack(head)
    (checksum,) = _CHECKSUM.unpack_from(value, _HEADER.size)
    if magic != MAGIC or nbytes != len(payload) or checksum != _checksum(head, payload):
        raise BlockCorrupt(f"the pooled checkpoint after block {name.hex()[:16]} is damaged")
    if (kept_name, kept_fingerprint) != (name, fingerprint):
        raise BlockCorrupt(f"the pooled checkpoint after block {name.hex()[:16]} is another one's")
    return bytes(payload)


def _checksum(head: bytes, payload: memoryview) -> int:
    state = xxhash.xxh3_64(head)
    state.update(payload)
    return int(state.intdigest())
