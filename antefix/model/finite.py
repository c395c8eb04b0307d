"""Values that no computation may meet: NaN, infinity, and numbers so large that their products would be infinite.

A checksum says that bytes are the ones that were written, not that what was written makes sense. So stored KV is
looked at where it enters a worker, in packed form: a code or a scale that stands for no number, or for one beyond the
limit, is found by the largest byte of its field, without decoding. What a worker stores is looked at in the same way.

Rows of global KV [N, block_bytes] uint8; knows nothing of where they came from.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from antefix.layout import BlockLayout, Field, KVFormat, Part, PartKind

# Normalised KV stays far below; two such numbers multiplied, and 2^30 of those added, are still within float32's range.
MAGNITUDE_LOG2_MAX: Final = 48
MAGNITUDE_MAX: Final = 2.0**MAGNITUDE_LOG2_MAX
_E4M3_NAN: Final = 0x7F
# The largest E4M3 code is 448, the largest E2M1 code 6; a scale's byte is its exponent and 127.
_FP8_SCALE_MAX: Final = 127 + MAGNITUDE_LOG2_MAX - 9
_FP4_SCALE_MAX: Final = 127 + MAGNITUDE_LOG2_MAX - 3
# As bits without the sign, in which order is the order of magnitudes, and infinities and NaN come last.
_BF16_MAX: Final = (127 + MAGNITUDE_LOG2_MAX) << 7
_F32_MAX: Final = (127 + MAGNITUDE_LOG2_MAX) << 23
_F64_MAX: Final = (1023 + MAGNITUDE_LOG2_MAX) << 52

Bytes = npt.NDArray[np.uint8]
Flags = npt.NDArray[np.bool_]


def unusable_rows(rows: Bytes, layout: BlockLayout) -> Flags:
    """[N]: whether a row holds anything but numbers up to the limit."""
    bad = np.zeros(len(rows), np.bool_)
    for part in layout.parts:
        records = rows[:, part.offset : part.offset + part.nbytes].reshape(len(rows), part.num_rows, -1)
        bad |= _unusable_records(records, part, layout)
    return bad


def is_usable(values: Tensor) -> bool:
    """Whether all of some floats are numbers up to the limit. One pass: NaN makes both ends NaN."""
    if not values.numel():
        return True
    low, high = torch.aminmax(values)
    return bool(low >= -MAGNITUDE_MAX) and bool(high <= MAGNITUDE_MAX)


def are_numbers(values: npt.NDArray[np.float32]) -> bool:
    """Whether all of some logits are finite."""
    return bool(np.isfinite(values.min(initial=0)) and np.isfinite(values.max(initial=0)))


def _unusable_records(records: Bytes, part: Part, layout: BlockLayout) -> Flags:
    """[N] of records [N, num_rows, record bytes]."""
    bad = np.zeros(len(records), np.bool_)
    for field in part.record.fields:
        items, mask, largest = _bound(field, part, layout)
        numbers = records[..., field.offset : field.offset + field.nbytes].view(items)
        if numbers.shape[-1]:
            bad |= (numbers & items.type(mask)).reshape(len(records), -1).max(axis=1) > largest
    return bad


def _bound(field: Field, part: Part, layout: BlockLayout) -> tuple[np.dtype[Any], int, int]:
    """Of a field's items: their type, the bits that say how large they are, and the largest value of those."""
    if layout.kv_format is KVFormat.FLOAT32:
        return np.dtype("<u4"), 0x7FFFFFFF, _F32_MAX
    if layout.kv_format is KVFormat.FLOAT64:
        return np.dtype("<u8"), 0x7FFFFFFFFFFFFFFF, _F64_MAX
    if field.name == "rope":
        return np.dtype("<u2"), 0x7FFF, _BF16_MAX
    is_key = part.kind is PartKind.INDEXER_KEYS
    if field.name == "scales":
        return np.dtype("u1"), 0xFF, _FP4_SCALE_MAX if is_key else _FP8_SCALE_MAX
    # Every FP4 code is a number.
    return np.dtype("u1"), 0 if is_key else 0x7F, _E4M3_NAN - 1
