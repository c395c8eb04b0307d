"""Record headers and index entries as rows of numpy arrays: handles many at once without an object for each.

Rows       the fields of headers, of either version, that an index needs
entries    index entries in their short form; docs/FORMAT.md has its bits
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from antefix.store_files.header_columns import HEADER, NAMES, PLACE, TIMES
from antefix.store_files.record_format import (
    HASH_BYTES,
    INDEX_ENTRY_SHORT,
    RECORD_ALIGN,
    RECORD_HEADER_BYTES,
    RECORD_MAGIC,
)
from antefix.store_files.record_header import unpack_record_header
from antefix_kvstore.index_sums import xxh32_of_rows

Array = npt.NDArray[Any]

# owner: the length of the owner's key in the index (`owner_row`), then that key, which in version 1 is a name.
ROW: Final = np.dtype(
    [
        *NAMES,
        *PLACE,
        *TIMES,
        ("payload_bytes", "<u4"),
        ("position", "<u4"),
        ("generation", "<u2"),
        *((name, "u1") for name in ("version", "kind", "codec", "flags")),
        ("owner", "V48"),
    ]
)
_COPIED: Final = tuple(name for name in ROW.names or () if name not in ("version", "owner"))
# The bits of each field in a word of the short form, from the lowest bit up.
_WORDS: Final = (
    (("place", 32), ("segment", 24), ("flags", 8)),
    (("rank_ms", 44), ("fingerprint_id", 20)),
    (("expires_ms", 42), ("ttl_s", 22)),
    (("stored_bytes", 30), ("payload_bytes", 30), ("codec", 4)),
    (("position", 28), ("children", 16), ("tenant_id", 20)),
    (("prefix_bytes", 44), ("cost_ms", 20)),
)


def rows_of(raws: Sequence[bytes], seed: int) -> Array:
    """Rows of sound headers.  Shapes:  [N] of ROW."""
    headers = np.frombuffer(b"".join(raws), HEADER)
    rows = np.empty(len(headers), ROW)
    for name in _COPIED:
        rows[name] = headers[name]
    rows["version"] = 2
    owners = np.zeros((len(headers), ROW["owner"].itemsize), np.uint8)
    owners[:, 0], owners[:, 1] = 25, ord("o")
    owners[:, 2:26] = np.ascontiguousarray(headers["owner"]).view(np.uint8).reshape(-1, 24)
    rows["owner"] = owners.view("V48")[:, 0]
    for at in np.flatnonzero(headers["magic"] != RECORD_MAGIC).tolist():
        header = unpack_record_header(raws[at], seed)
        for name in _COPIED:
            rows[name][at] = getattr(header, name)
        rows["version"][at] = header.version
        rows["owner"][at] = (bytes([len(header.owner)]) + header.owner).ljust(48, b"\0")
    return rows


def owner_key(owner: bytes) -> bytes:
    """A row's owner as the key that the index uses."""
    return owner[1 : 1 + owner[0]]


def extents_of(rows: Array) -> Array:
    """Bytes that each record takes in its segment.  Shapes:  [N] int64."""
    stored = rows["stored_bytes"].astype(np.int64)
    return RECORD_HEADER_BYTES + (stored + RECORD_ALIGN - 1) // RECORD_ALIGN * RECORD_ALIGN


def short_entries(of: Mapping[str, Array], hashes: Array, parents: Array) -> tuple[Array, Array]:
    """Index entries in the short form, and which of the entries fit that form. Other entries must use the long form.

    of: the fields of IndexEntry, int64; `place` is the offset / 8.
    Shapes:  hashes, parents [N] V32; result [N] V84 and [N] bool.
    """
    num = len(hashes)
    rows = np.zeros((num, HASH_BYTES + INDEX_ENTRY_SHORT.size), np.uint8)
    rows[:, :HASH_BYTES] = np.ascontiguousarray(hashes).view(np.uint8).reshape(num, HASH_BYTES)
    fits = np.ones(num, bool)
    for number, fields in enumerate(_WORDS):
        word, shift = np.zeros(num, np.uint64), 0
        for name, bits in fields:
            values = of[name].astype(np.int64)
            fits &= (values >> bits) == 0
            word |= values.astype(np.uint64) << np.uint64(shift)
            shift += bits
        at = HASH_BYTES + 8 * number
        rows[:, at : at + 8] = word.astype("<u8")[:, None].view(np.uint8)
    rows[:, 80:112] = np.ascontiguousarray(parents).view(np.uint8).reshape(num, HASH_BYTES)
    rows[:, 112:] = xxh32_of_rows(rows[:, :112]).astype("<u4")[:, None].view(np.uint8)
    return np.ascontiguousarray(rows[:, HASH_BYTES:]).view(f"V{INDEX_ENTRY_SHORT.size}")[:, 0], fits
