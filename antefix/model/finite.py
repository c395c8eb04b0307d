"""Finds values that must not enter a computation: NaN, infinity, and numbers so large that their products overflow.

A checksum proves that the bytes are those that were written, but not that the written values made sense. So stored KV
is checked when it enters a worker, while it is still packed. A code or scale that stands for no number, or for a number
beyond the limit, can be seen in the largest byte of its field, so nothing need be decoded. KV that a worker is going to
store is checked in the same way.

Input is rows of global KV [N, block_bytes] uint8. The check does not depend on where the rows come from.
"""

from __future__ import annotations

import functools
from typing import Any, Final, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from antefix.layout import BlockLayout, Field, KVFormat, Part, PartKind, entry_record
from antefix.model.numerics import has_triton

# Normalised KV stays far below 2^48. The sum of 2^30 products of two numbers below 2^48 is within float32's range.
MAGNITUDE_LOG2_MAX: Final = 48
MAGNITUDE_MAX: Final = 2.0**MAGNITUDE_LOG2_MAX
_E4M3_NAN: Final = 0x7F
# The largest E4M3 code is 448, the largest E2M1 code 6. A scale's byte is its exponent plus 127.
FP8_SCALE_MAX: Final = 127 + MAGNITUDE_LOG2_MAX - 9
_FP4_SCALE_MAX: Final = 127 + MAGNITUDE_LOG2_MAX - 3
# BF16 bits without the sign: they are ordered like the magnitudes, with infinity and NaN above all numbers.
_BF16_MAX: Final = (127 + MAGNITUDE_LOG2_MAX) << 7
_F32_MAX: Final = (127 + MAGNITUDE_LOG2_MAX) << 23
_F64_MAX: Final = (1023 + MAGNITUDE_LOG2_MAX) << 52

# Rows that are checked at once on a GPU. The check takes up to eight times their bytes of the GPU's memory.
_ROWS_AT_ONCE: Final = 32

Bytes = npt.NDArray[np.uint8]
Pairs = npt.NDArray[np.uint16]
Flags = npt.NDArray[np.bool_]


def unusable_rows(rows: Bytes, layout: BlockLayout) -> Flags:
    """[N]: whether a row holds NaN, infinity or a number beyond the limit."""
    bounds = _bounds_of_pairs(layout)
    if bounds is not None and rows.flags.c_contiguous:
        pairs, (masks, limits) = rows.view("<u2"), bounds
        over = (pairs & masks[0]) > limits[0]
        over |= (pairs & masks[1]) > limits[1]
        return cast(Flags, over.any(axis=1))
    bad = np.zeros(len(rows), np.bool_)
    for part in layout.parts:
        records = rows[:, part.offset : part.offset + part.nbytes].reshape(len(rows), part.num_rows, -1)
        bad |= _unusable_records(records, part, layout)
    return bad


def unusable_on_card(rows: Tensor, ids: Tensor, layout: BlockLayout) -> Tensor | None:
    """The same check for the rows `ids` [N] of a pool's rows on a GPU; the result is [N] bool. The host does not wait
    for the result of this check.

    Returns None if the layout has BF16 numbers at odd addresses, so that rows have to be checked on the host.
    """
    bounds = _pairs(layout, rows.device)
    if bounds is None:
        return None
    masks, limits = bounds
    if rows.is_cuda and has_triton():
        # One launch instead of nine for every 32 rows, which took 10 of a restore's 104 ms.
        from antefix_kernels.check_rows import rows_over

        return rows_over(rows, ids, masks, limits)
    found = []
    for some in ids.split(_ROWS_AT_ONCE):
        pairs = rows[some].view(torch.int16).to(torch.int32)
        over = ((pairs & masks[0]) > limits[0]).logical_or_((pairs & masks[1]) > limits[1])
        found.append(over.any(1))
    return torch.cat(found)


def are_usable_windows(records: Bytes, layout: BlockLayout) -> bool:
    """Whether packed window records [N, record bytes] hold only numbers up to the limit. A scale may be refused
    slightly before its values reach the limit.
    """
    part = Part(
        layer=0, kind=PartKind.HCA_MAIN, offset=0, num_rows=1, record=entry_record(layout.geometry, layout.kv_format)
    )
    return not _unusable_records(records[:, None], part, layout).any()


def is_usable(values: Tensor) -> bool:
    """Whether all these floats are numbers up to the limit. One pass: a NaN makes both minimum and maximum NaN."""
    if not values.numel():
        return True
    low, high = torch.aminmax(values)
    return bool(low >= -MAGNITUDE_MAX) and bool(high <= MAGNITUDE_MAX)


def are_numbers(values: npt.NDArray[np.float32]) -> bool:
    """Whether all these logits are finite."""
    return bool(np.isfinite(values.min(initial=0)) and np.isfinite(values.max(initial=0)))


def _unusable_records(records: Bytes, part: Part, layout: BlockLayout) -> Flags:
    """Whether each record of one part is unusable [N]. records: [N, num_rows, record bytes]."""
    bad = np.zeros(len(records), np.bool_)
    for field in part.record.fields:
        items, mask, largest = _bound(field, part, layout)
        numbers = records[..., field.offset : field.offset + field.nbytes].view(items)
        if numbers.shape[-1]:
            bad |= (numbers & items.type(mask)).reshape(len(records), -1).max(axis=1) > largest
    return bad


@functools.lru_cache(maxsize=8)
def _pairs(layout: BlockLayout, device: torch.device) -> tuple[Tensor, Tensor] | None:
    """`_bounds_of_pairs` on a GPU, [2, block_bytes / 2] int32 each."""
    bounds = _bounds_of_pairs(layout)
    if bounds is None:
        return None
    masks, limits = (torch.from_numpy(each.astype(np.int32)).to(device) for each in bounds)
    return masks, limits


@functools.lru_cache(maxsize=8)
def _bounds_of_pairs(layout: BlockLayout) -> tuple[Pairs, Pairs] | None:
    """Masks and limits [2, block_bytes / 2] of two checks per pair of bytes, read as one little-endian number: the
    masked bits must not exceed the limit. BF16 numbers are checked as a whole, other fields byte by byte.

    None: the layout is not of the FP8 format, or has BF16 numbers at odd addresses."""
    if layout.block_bytes % 2 or layout.kv_format is not KVFormat.FP8:
        return None
    masks, limits = np.zeros((2, layout.block_bytes), np.int32)
    for part in layout.parts:
        for field in part.record.fields:
            items, mask, largest = _bound(field, part, layout)
            first = part.offset + np.arange(part.num_rows)[:, None] * part.record.nbytes + field.offset
            at = (first + np.arange(0, field.nbytes, items.itemsize)).ravel()
            if items.itemsize == 2 and (at % 2).any():
                return None
            # The low byte's check is of the whole pair, if the pair is one number.
            masks[at], limits[at] = mask, largest
    masks[1::2] <<= 8
    limits[1::2] <<= 8
    of_masks, of_limits = (each.reshape(-1, 2).T.astype("<u2", order="C") for each in (masks, limits))
    return of_masks, of_limits


def _bound(field: Field, part: Part, layout: BlockLayout) -> tuple[np.dtype[Any], int, int]:
    """For the items of a field: their type, a mask of the bits that give the magnitude, and the largest allowed value
    of these bits.
    """
    if layout.kv_format is KVFormat.FLOAT32:
        return np.dtype("<u4"), 0x7FFFFFFF, _F32_MAX
    if layout.kv_format is KVFormat.FLOAT64:
        return np.dtype("<u8"), 0x7FFFFFFFFFFFFFFF, _F64_MAX
    if field.name == "rope":
        return np.dtype("<u2"), 0x7FFF, _BF16_MAX
    is_key = part.kind is PartKind.INDEXER_KEYS
    if field.name == "scales":
        return np.dtype("u1"), 0xFF, _FP4_SCALE_MAX if is_key else FP8_SCALE_MAX
    # Every FP4 code is a number.
    return np.dtype("u1"), 0 if is_key else 0x7F, _E4M3_NAN - 1
