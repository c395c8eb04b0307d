"""Kernels that round values as KV records do (`antefix.model.quant`), without packing. float32, contiguous.

Shapes:  N = rows, C = channels, R = RoPE dims.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from antefix.layout import FP4_GROUP, FP8_GROUP
from antefix.model.compiled.intrinsics import bits_of, f32, float_of, floats, i32, inline, kernel, plain, rint
from antefix.model.quant import FP4_FLOOR, FP4_MAX, FP8_FLOOR, FP8_MAX

_FP8_FLOOR, _FP8_MAX, _FP8_SHARE = f32(FP8_FLOOR), f32(FP8_MAX), f32(1.0 / FP8_MAX)
_FP4_FLOOR, _FP4_MAX, _FP4_SHARE = f32(FP4_FLOOR), f32(FP4_MAX), f32(1.0 / FP4_MAX)
# Number of rows whose Hadamard transforms are computed side by side.
SIDE = 8


@inline
def power_above(largest: Any, share: Any) -> Any:
    """The scale of a group of numbers in a KV record (`quant._scales`)."""
    return float_of(i32((i32(bits_of(largest * share)) + i32(0x7FFFFF)) & i32(0x7F800000)))


@inline
def to_fp8(value: Any) -> Any:
    """A number in [-448, 448] rounded to E4M3."""
    bits = bits_of(value)
    # Below 2^-6 the codes are 2^-9 apart. From 2^-6 on, three bits of the mantissa are kept, ties to even.
    small = float_of(i32(bits_of(rint(value * f32(512)) * f32(1 / 512)) | (bits & i32(-0x80000000))))
    large = float_of(i32((bits + i32(0x7FFFF) + ((bits >> i32(20)) & i32(1))) & i32(-0x100000)))
    return small if (bits & i32(0x7FFFFFFF)) < i32(0x3C800000) else large


@plain
def transform(work: Any, size: int, shrink: Any) -> None:
    """The butterflies of SIDE rows' Hadamard transforms at once: work [C, SIDE]."""
    reach = 1
    while reach < size:
        for start in range(0, size, 2 * reach):
            low = work[start * SIDE : (start + reach) * SIDE]
            high = work[(start + reach) * SIDE : (start + 2 * reach) * SIDE]
            for k in range(reach * SIDE):
                a, b = low[k], high[k]
                low[k], high[k] = a + b, a - b
        reach *= 2
    for k in range(size * SIDE):
        work[k] *= shrink


@plain
def _round_group(group: Any) -> None:
    """Round the same group of SIDE rows, each row by its own scale: group [32, SIDE]."""
    scales = np.full(SIDE, _FP4_FLOOR, np.float32)
    for start in range(0, len(group), SIDE):
        row = group[start : start + SIDE]
        for i in range(SIDE):
            scales[i] = max(scales[i], abs(row[i]))
    for i in range(SIDE):
        scales[i] = power_above(scales[i], _FP4_SHARE)
    for start in range(0, len(group), SIDE):
        row = group[start : start + SIDE]
        for i in range(SIDE):
            value = min(max(row[i] / scales[i], -_FP4_MAX), _FP4_MAX)
            power = float_of(i32(max(bits_of(value) & i32(0x7F800000), i32(0x3F800000))))
            row[i] = rint((value / power) * f32(2)) * power * f32(0.5) * scales[i]


@kernel("void(int64, int64, int64, int64)")
def round_entries(x: int, num: int, size: int, rope: int) -> None:
    """`quant.round_entries` in place: FP8 in groups of 64, RoPE dims to bfloat16."""
    nope = size - rope
    for n in range(num):
        for start in range(0, nope, FP8_GROUP):
            group = floats(x, n * size + start, min(FP8_GROUP, nope - start))
            largest = _FP8_FLOOR
            for k in range(len(group)):
                largest = max(largest, abs(group[k]))
            scale = power_above(largest, _FP8_SHARE)
            for k in range(len(group)):
                group[k] = to_fp8(min(max(group[k] / scale, -_FP8_MAX), _FP8_MAX)) * scale
        turned = floats(x, n * size + nope, rope)
        for k in range(rope):
            bits = bits_of(turned[k])
            turned[k] = float_of(i32((bits + i32(0x7FFF) + ((bits >> i32(16)) & i32(1))) & i32(-0x10000)))


@kernel("void(int64, int64, int64, int64)")
def round_queries(out: int, x: int, num: int, size: int) -> None:
    """`quant.round_queries` in the FP8 format: Hadamard transform of x [N, C], then FP4 in groups of 32."""
    work, shrink = np.zeros(size * SIDE, np.float32), f32(size**-0.5)
    for first in range(0, num, SIDE):
        many = min(SIDE, num - first)
        for i in range(many):
            given = floats(x, (first + i) * size, size)
            for c in range(size):
                work[c * SIDE + i] = given[c]
        transform(work, size, shrink)
        for start in range(0, size, FP4_GROUP):
            _round_group(work[start * SIDE : min(start + FP4_GROUP, size) * SIDE])
        for i in range(many):
            made = floats(out, (first + i) * size, size)
            for c in range(size):
                made[c] = work[c * SIDE + i]
