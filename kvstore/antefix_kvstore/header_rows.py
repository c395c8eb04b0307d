"""Record headers and index entries as rows of numpy arrays: handles many at once without an object for each.

Rows       the fields of headers, of either version, that an index needs
entries    index entries in their short form; docs/FORMAT.md has its bits
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from antefix.store_files.header_columns import HEADER, NAMES, PLACE, TIMES, field_at
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
        *((name, "u1") for name in ("codec", "flags", "kind", "version")),
        ("owner", "V48"),
    ]
)
_COPIED: Final = tuple(name for name in ROW.names or () if name not in ("version", "owner"))
# Fields that are neighbours in a header and in a row are copied as one: the first of them, and the bytes of all.
_TOGETHER: Final = {"hash": 96, "segment": 16, "created_ms": 20, "payload_bytes": 10, "codec": 2, "kind": 1}
_OWNER_BYTES: Final = 24
# Before the owner of a header of version 2, a row has the length of the owner's key and the letter of such keys.
_OWNER_BEGINS: Final = bytes([1 + _OWNER_BYTES]) + b"o"
# The bits of each field in a word of the short form, from the lowest bit up.
_WORDS: Final = (
    (("place", 32), ("segment", 24), ("flags", 8)),
    (("rank_ms", 44), ("fingerprint_id", 20)),
    (("expires_ms", 42), ("ttl_s", 22)),
    (("stored_bytes", 30), ("payload_bytes", 30), ("codec", 4)),
    (("position", 28), ("children", 16), ("tenant_id", 20)),
    (("prefix_bytes", 44), ("cost_ms", 20)),
)


def _parts(of: np.dtype[Any], owner_at: int) -> np.dtype[Any]:
    """The parts of a header or a row that are copied together."""
    sizes = [*_TOGETHER.values(), _OWNER_BYTES]
    return np.dtype(
        {
            "names": [*_TOGETHER, "owner"],
            "formats": [f"V{nbytes}" for nbytes in sizes],
            "offsets": [*(field_at(of, name) for name in _TOGETHER), owner_at],
            "itemsize": of.itemsize,
        }
    )


_HEADER_PARTS: Final = _parts(HEADER, field_at(HEADER, "owner"))
_ROW_PARTS: Final = _parts(ROW, field_at(ROW, "owner") + len(_OWNER_BEGINS))


def rows_of(raws: Sequence[bytes], seed: int) -> Array:
    """Rows of sound headers.

    Shapes:  raws: N headers, one or more in each of them; result [N] of ROW.
    """
    joined = b"".join(raws)
    headers = np.frombuffer(joined, HEADER)
    blank = np.zeros(1, ROW)
    blank["version"], blank["owner"] = 2, np.void(_OWNER_BEGINS.ljust(48, b"\0"))
    rows = np.repeat(blank, len(headers))
    for name in _ROW_PARTS.names or ():
        rows.view(_ROW_PARTS)[name] = headers.view(_HEADER_PARTS)[name]
    for at in np.flatnonzero(headers["magic"] != RECORD_MAGIC).tolist():
        header = unpack_record_header(joined[at * RECORD_HEADER_BYTES : (at + 1) * RECORD_HEADER_BYTES], seed)
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


def first_words(hashes: Array) -> Array:
    """The first eight bytes of each hash as a number. These numbers have nearly the order of the hashes.

    Shapes:  hashes [N] V32; result [N] uint64.
    """
    words = np.ascontiguousarray(hashes).view(">u8").reshape(len(hashes), HASH_BYTES // 8)
    return words[:, 0].astype(np.uint64)


def numbers_of(hashes: Array, wanted: Collection[bytes]) -> dict[bytes, int]:
    """Where each of the wanted hashes is among `hashes`, if it is there. Of two places, the later one.

    Shapes:  hashes [N] V32.
    """
    if not wanted or not len(hashes):
        return {}
    among = np.frombuffer(b"".join(wanted), hashes.dtype)
    near = np.flatnonzero(np.isin(first_words(hashes), first_words(among)))
    names = frozenset(wanted)
    return {name: at for name, at in zip(hashes[near].tolist(), near.tolist(), strict=True) if name in names}


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
    rows[:, 112:] = xxh32_of_rows(rows, 112).astype("<u4")[:, None].view(np.uint8)
    return np.ascontiguousarray(rows[:, HASH_BYTES:]).view(f"V{INDEX_ENTRY_SHORT.size}")[:, 0], fits
