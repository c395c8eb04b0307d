"""Reads the headers of a segment, one after the other, and skips damaged bytes. This module knows bytes of a file,
never the index.

A rebuild reads every header of the store with this. So a sound header is recognized by one unpack and one checksum,
without making an object, and headers of small records are read many at a time.
"""

from __future__ import annotations

import itertools
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import xxhash

from antefix.errors import BlockCorrupt
from antefix.own_files import open_to_read
from antefix.store_files.header_columns import HEADER, field_at
from antefix.store_files.record_format import (
    BATCH_ALIGN,
    CHECK_OFFSET,
    RECORD_ALIGN,
    RECORD_HEADER_BYTES,
    RECORD_MAGIC,
    RECORD_MAGICS_BEGIN,
    align,
    extent_bytes,
    payload_checksum,
)
from antefix.store_files.record_header import CODES, unpack_record_header
from antefix_kvstore.header_rows import extents_of

Array = npt.NDArray[Any]

# Fields: magic, checksum, kind, hash kind, segment, offset, stored bytes, codec.
_LOOK: Final = struct.Struct("<8sQ148xBB46xIQIB27x")
assert _LOOK.size == RECORD_HEADER_BYTES
# Parts of HEADER. The first byte of `made_by` is the hash kind; the checksum covers all from CHECK_OFFSET on.
_LOOKED_AT: Final = np.dtype(
    {
        "names": ["kind", "hash_kind", "checked"],
        "formats": ["u1", "u1", f"V{RECORD_HEADER_BYTES - CHECK_OFFSET}"],
        "offsets": [field_at(HEADER, "kind"), field_at(HEADER, "made_by"), CHECK_OFFSET],
        "itemsize": RECORD_HEADER_BYTES,
    }
)
# Bytes read at once where records are small, so that the next headers are among them.
_AHEAD_BYTES: Final = 1 << 20
_NEAR_BYTES: Final = 32 << 10
# Fewer records of one size are checked just as fast one by one.
_ALIKE_MIN: Final = 16
_SEARCH_BYTES: Final = 4 << 20


def raw_headers(path: Path, number: int, seed: int, start: int, *, check_payloads: bool) -> Iterator[bytes]:
    """The headers of the whole records from `start` on, as raw bytes: one or more headers at a time.

    check_payloads: verify every payload as well, and leave out records whose payload is damaged.
    """
    size = path.stat().st_size
    fd = open_to_read(path)
    try:
        offset: int | None = start
        window, base, ahead, is_fresh = b"", start, _AHEAD_BYTES, False
        while offset is not None and offset + RECORD_HEADER_BYTES <= size:
            at = offset - base
            raw = window[at : at + RECORD_HEADER_BYTES]
            if len(raw) < RECORD_HEADER_BYTES:
                window, base, at = os.pread(fd, ahead, offset), offset, 0
                raw, is_fresh = window[:RECORD_HEADER_BYTES], True
            stored_bytes = _stored_bytes(raw, number, offset, seed)
            if stored_bytes is None and (boundary := _end_of_padding(fd, offset)) > offset:
                offset, is_fresh = boundary, True
                continue
            if stored_bytes is None or offset + (extent := extent_bytes(stored_bytes)) > size:
                offset = _find_magic(fd, offset + RECORD_ALIGN, size)
                continue
            if check_payloads:
                stored = window[at + RECORD_HEADER_BYTES : at + RECORD_HEADER_BYTES + stored_bytes]
                if len(stored) < stored_bytes:
                    stored = os.pread(fd, stored_bytes, offset + RECORD_HEADER_BYTES)
            if not check_payloads or payload_checksum(stored) == raw[CHECK_OFFSET : CHECK_OFFSET + 16]:
                yield raw
            offset += extent
            if is_fresh:
                # Small records of one size mostly come in a row. Where they do not, one try per window or batch is
                # enough.
                is_fresh = False
                payload_bytes = stored_bytes if check_payloads else None
                heads, good = _alike(window, offset - base, extent, number, offset, seed, payload_bytes)
                if good.any():
                    yield heads[good].tobytes()
                offset += len(heads) * extent
            ahead = _AHEAD_BYTES if extent < _NEAR_BYTES else RECORD_HEADER_BYTES
    finally:
        os.close(fd)


def _alike(
    window: bytes, at: int, extent: int, number: int, offset: int, seed: int, payload_bytes: int | None
) -> tuple[Array, Array]:
    """The headers of the next records of this extent that are wholly in the window, up to the first header that is not
    sound, and which of these records have a sound payload.

    Makes the same checks as `_stored_bytes`, but for all headers at once.

    payload_bytes: check the payloads too, of records that store this many bytes; None: no payload is checked.
    Shapes:  [N] of HEADER, [N] bool.
    """
    num = (len(window) - at) // extent
    if num < _ALIKE_MIN or payload_bytes == 0:
        return np.empty(0, HEADER), np.empty(0, bool)
    heads = np.ndarray(num, HEADER, window, at, (extent,))
    good = (
        (heads["magic"] == RECORD_MAGIC)
        & (heads["segment"] == number)
        & (heads["offset"] == offset + extent * np.arange(num, dtype=np.uint64))
        & (extents_of(heads) == extent)
    )
    if payload_bytes is not None:
        good &= heads["stored_bytes"] == payload_bytes
    heads = heads[: num if good.all() else int(good.argmin())]
    num = len(heads)
    looked_at = heads.view(_LOOKED_AT)
    codes = looked_at["kind"].astype(np.uint32) << 16 | looked_at["hash_kind"].astype(np.uint32) << 8 | heads["codec"]
    if not {(code >> 16, code >> 8 & 0xFF, code & 0xFF) for code in np.unique(codes).tolist()} <= CODES:
        return heads[:0], good[:0]
    found = map(xxhash.xxh3_64_intdigest, looked_at["checked"].tolist(), itertools.repeat(seed))
    right = heads["header_checksum"] == np.fromiter(found, np.uint64, num)
    heads = heads[: num if right.all() else int(right.argmin())]
    num = len(heads)
    if payload_bytes is None or not num:
        return heads, np.ones(num, bool)
    payloads = np.ndarray(num, f"V{payload_bytes}", window, at + RECORD_HEADER_BYTES, (extent,))
    sums = b"".join(map(payload_checksum, payloads.tolist()))
    return heads, heads["payload_checksum"] == np.frombuffer(sums, "V16")


def _stored_bytes(raw: bytes, number: int, offset: int, seed: int) -> int | None:
    """Stored bytes of the record whose sound header is at this place; None if there is no sound header.

    A payload may contain bytes that look like a header. A real header names its own segment and offset.
    """
    if len(raw) < RECORD_HEADER_BYTES:
        return None
    magic, checksum, kind, hash_kind, segment, place, stored_bytes, codec = _LOOK.unpack(raw)
    if magic != RECORD_MAGIC:
        return _stored_bytes_v1(raw, number, offset, seed)
    if (
        segment == number
        and place == offset
        and xxhash.xxh3_64_intdigest(raw[CHECK_OFFSET:], seed) == checksum
        and (kind, hash_kind, codec) in CODES
    ):
        return int(stored_bytes)
    return None


def _stored_bytes_v1(raw: bytes, number: int, offset: int, seed: int) -> int | None:
    try:
        header = unpack_record_header(raw, seed)
    except BlockCorrupt:
        return None
    return header.stored_bytes if (header.segment, header.offset) == (number, offset) else None


def _end_of_padding(fd: int, offset: int) -> int:
    """The start of the next batch if only zeros lie between, else `offset`."""
    boundary = align(offset, BATCH_ALIGN)
    return boundary if not os.pread(fd, boundary - offset, offset).strip(b"\0") else offset


def _find_magic(fd: int, start: int, size: int) -> int | None:
    """The next aligned offset at which a record header might begin."""
    overlap = len(RECORD_MAGICS_BEGIN) - 1
    while start < size:
        try:
            # A file that was extended has a hole, which may be larger than any disk; skip it.
            start = max(start, align(os.lseek(fd, start, os.SEEK_DATA) - RECORD_ALIGN + 1, RECORD_ALIGN))
        except OSError:
            return None  # no byte was written after this offset
        piece = os.pread(fd, _SEARCH_BYTES + overlap, start)
        at = piece.find(RECORD_MAGICS_BEGIN)
        while at >= 0:
            if (start + at) % RECORD_ALIGN == 0:
                return start + at
            at = piece.find(RECORD_MAGICS_BEGIN, at + 1)
        start += _SEARCH_BYTES
    return None
