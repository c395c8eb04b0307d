"""A record header of version 2 as a numpy dtype, with which many headers are checked at once without an object for
each.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from antefix.store_files.record_format import RECORD_HEADER_BYTES

NAMES: Final = (("hash", "V32"), ("parent", "V32"), ("fingerprint", "V32"))
PLACE: Final = (("segment", "<u4"), ("offset", "<u8"), ("stored_bytes", "<u4"))
TIMES: Final = (("created_ms", "<u8"), ("expires_ms", "<u8"), ("cost_us", "<u4"))
# The same fields as `record_format.RECORD_HEADER`.
HEADER: Final = np.dtype(
    [
        ("magic", "S8"),
        ("header_checksum", "<u8"),
        ("payload_checksum", "V16"),
        *NAMES,
        ("owner", "V24"),
        ("payload_bytes", "<u4"),
        ("position", "<u4"),
        ("generation", "<u2"),
        ("num_cards", "<u2"),
        ("kind", "u1"),
        ("made_by", "V3"),
        ("seal", "V32"),
        ("nonce", "V12"),
        *PLACE,
        ("codec", "u1"),
        ("flags", "u1"),
        ("zero", "V2"),
        *TIMES,
        ("zeros", "V4"),
    ]
)
assert HEADER.itemsize == RECORD_HEADER_BYTES


def field_at(dtype: np.dtype[Any], name: str) -> int:
    """The offset of a field in a row of this dtype."""
    assert dtype.fields is not None
    return int(dtype.fields[name][1])
