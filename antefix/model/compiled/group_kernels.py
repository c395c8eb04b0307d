"""Kernels that pool closed groups of a compressor into entries, and write the entries to the pool as KV records.

They replace `compressor.finish_entries` of pooled rows and `pool.BlockPool.write` in the FP8 format. Arrays are
addressed by `Tensor.data_ptr()`: float32 and int64, records as bytes.

Shapes:  G = groups, m = rows of a group, S = a compressor's columns, C = entry width, R = RoPE dims.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any

import numpy as np

from antefix.layout import FP4_GROUP, FP8_GROUP
from antefix.model.compiled import rounding_kernels as rounding
from antefix.model.compiled.intrinsics import (
    bits_of,
    exponentials,
    f32,
    float_of,
    floats,
    i32,
    inline,
    integers,
    kernel,
    octets,
    plain,
    rint,
)
from antefix.model.compiled.token_kernels import norm_rotate
from antefix.model.quant import FP4_FLOOR, FP4_MAX, FP8_FLOOR, FP8_MAX

_FP8_FLOOR, _FP8_MAX, _FP8_SHARE = f32(FP8_FLOOR), f32(FP8_MAX), f32(1.0 / FP8_MAX)
_FP4_FLOOR, _FP4_MAX, _FP4_SHARE = f32(FP4_FLOOR), f32(FP4_MAX), f32(1.0 / FP4_MAX)


class Group(IntEnum):
    """Indices into the array about the groups of one compressor. ROWS: address of rows [2, G, m, S].  HALF: numbers
    between its kv and its gates.  OVERLAPS: address of the Ca rows [2, m, C] before the first group, or of [2, G, m, C]
    before each one; 0 for HCA.  OVERLAP_HALF, OVERLAP_STEP: numbers between kv and gates, and between two groups (0:
    each group follows the one before it).  RECORDS, BLOCK_BYTES, RECORD_BYTES: address of the part's first record,
    bytes of a block, bytes of a record.  VALUES, BLOCK_STEP: address of the part's decoded rows, numbers between two
    blocks.  EXP: address of MKL's exponential.  LANES: of torch's vectors."""

    ROWS = 0
    HALF = 1
    NUM = 2
    RATIO = 3
    COLUMNS = 4
    WIDTH = 5
    OVERLAPS = 6
    OVERLAP_HALF = 7
    OVERLAP_STEP = 8
    ROPE = 9
    RECORDS = 10
    BLOCK_BYTES = 11
    RECORD_BYTES = 12
    VALUES = 13
    BLOCK_STEP = 14
    IS_KEYS = 15
    EXP = 16
    LANES = 17


NUM_FIELDS = len(Group)
(ROWS, HALF, NUM, RATIO, COLUMNS, WIDTH, OVERLAPS, OVERLAP_HALF, OVERLAP_STEP, ROPE, RECORDS, BLOCK_BYTES,
 RECORD_BYTES, VALUES, BLOCK_STEP, IS_KEYS, EXP, LANES) = (int(field) for field in Group)  # fmt: skip


@plain
def _list_rows(listed: Any, g: Any, number: int) -> int:
    """The addresses of kv and gate of each row that a group pools. Returns the number of these rows."""
    ratio, size, columns = g[RATIO], g[WIDTH], g[COLUMNS]
    own = g[ROWS] + 4 * number * ratio * columns
    many = 0
    if g[OVERLAPS]:
        first, step, half = own - 4 * ratio * columns, columns, g[HALF]
        if number == 0 or g[OVERLAP_STEP]:
            first, step, half = g[OVERLAPS] + 4 * number * g[OVERLAP_STEP], size, g[OVERLAP_HALF]
        for i in range(ratio):
            listed[2 * i] = first + 4 * i * step
            listed[2 * i + 1] = first + 4 * (i * step + half)
        many, own = ratio, own + 4 * size
    for i in range(ratio):
        listed[2 * (many + i)] = own + 4 * i * columns
        listed[2 * (many + i) + 1] = own + 4 * (i * columns + g[HALF])
    return many + ratio  # type: ignore[no-any-return]


@plain
def _fold(x: Any, many: int, size: int) -> None:
    """`numerics.sum_middle` of x [many, size], to its first row."""
    while many > 1:
        half = many // 2
        for i in range(half):
            low, high = x[i * size : (i + 1) * size], x[(half + i) * size : (half + i + 1) * size]
            for c in range(size):
                low[c] += high[c]
        if many % 2:
            moved, last = x[half * size : (half + 1) * size], x[(many - 1) * size : many * size]
            for c in range(size):
                moved[c] = last[c]
        many = half + many % 2


@plain
def _pool(made: Any, listed: Any, many: int, size: int, exp: int, weights: Any, weighted: Any) -> None:
    """`compressor._pool` of one group: made [C].  listed: each row's addresses of kv and gate."""
    top = weighted[:size]
    for c in range(size):
        top[c] = f32(-np.inf)
    for i in range(many):
        gate = floats(listed[2 * i + 1], 0, size)
        for c in range(size):
            top[c] = max(top[c], gate[c])
    for i in range(many):
        gate, weight = floats(listed[2 * i + 1], 0, size), weights[i * size : (i + 1) * size]
        for c in range(size):
            weight[c] = gate[c] - top[c]
    exponentials(exp, many * size, weights.ctypes.data, weights.ctypes.data)
    for i in range(many):
        kv, weight, product = floats(listed[2 * i], 0, size), weights[i * size :], weighted[i * size :]
        for c in range(size):
            product[c] = kv[c] * weight[c]
    _fold(weights, many, size)
    _fold(weighted, many, size)
    for c in range(size):
        made[c] = weighted[c] / weights[c]


@plain
def _are_finite(x: Any) -> bool:
    largest = i32(0)
    for i in range(len(x)):
        largest = max(largest, bits_of(x[i]) & i32(0x7FFFFFFF))
    return bool(largest < i32(0x7F800000))


@inline
def _fp8_code(rounded: Any) -> Any:
    """The E4M3 code of a number that has one."""
    bits = bits_of(rounded)
    magnitude = bits & i32(0x7FFFFFFF)
    small, large = i32(abs(rounded) * f32(512)), i32((magnitude >> i32(20)) - i32(960))
    return (small if magnitude < i32(0x3C800000) else large) | ((bits >> i32(24)) & i32(0x80))


@plain
def _write_entry(record: int, values: int, x: int, size: int, rope: int, nbytes: int) -> None:
    """`quant.pack_entries` of one entry x [C] to its record, and the decoded values [C]."""
    nope, number = size - rope, 0
    for start in range(0, nope, FP8_GROUP):
        many = min(FP8_GROUP, nope - start)
        group, made, codes = floats(x, start, many), floats(values, start, many), octets(record, start, many)
        largest = _FP8_FLOOR
        for k in range(many):
            largest = max(largest, abs(group[k]))
        scale = rounding.power_above(largest, _FP8_SHARE)
        for k in range(many):
            rounded = rounding.to_fp8(min(max(group[k] / scale, -_FP8_MAX), _FP8_MAX))
            codes[k] = np.uint8(_fp8_code(rounded))
            made[k] = rounded * scale
        octets(record, nope + 2 * rope + number, 1)[0] = np.uint8(bits_of(scale) >> i32(23))
        number += 1
    turned, made, halves = floats(x, nope, rope), floats(values, nope, rope), octets(record, nope, 2 * rope)
    for k in range(rope):
        bits = bits_of(turned[k])
        bits = i32((bits + i32(0x7FFF) + ((bits >> i32(16)) & i32(1))) & i32(-0x10000))
        made[k] = float_of(bits)
        halves[2 * k] = np.uint8((bits >> i32(16)) & i32(0xFF))
        halves[2 * k + 1] = np.uint8((bits >> i32(24)) & i32(0xFF))
    used = nope + 2 * rope + number
    rest = octets(record, used, nbytes - used)
    for k in range(len(rest)):
        rest[k] = np.uint8(0)


@inline
def _fp4_code(value: Any) -> Any:
    """`quant._fp4_codes` of a number in [-6, 6]."""
    bits = bits_of(value)
    magnitude = bits & i32(0x7FFFFFFF)
    small = i32(rint(abs(value) * f32(2)))
    large = i32(((magnitude + i32(0x1FFFFF) + ((magnitude >> i32(22)) & i32(1))) >> i32(22)) - i32(252))
    return (small if magnitude < i32(0x3F800000) else large) | ((bits >> i32(28)) & i32(8))


@inline
def _fp4_value(code: Any) -> Any:
    """The number that an E2M1 code stands for."""
    magnitude = code & i32(7)
    # From code 2 on, the upper bits are an exponent and the lowest one a mantissa.
    large = float_of(i32((magnitude + i32(252)) << i32(22)))
    value = f32(magnitude) * f32(0.5) if magnitude < i32(2) else large
    return float_of(i32(bits_of(value) | ((code & i32(8)) << i32(28))))


@plain
def _write_key(record: int, values: int, x: Any, size: int) -> None:
    """`quant.pack_keys` of one transformed key x [C] to its record, and the decoded values [C]."""
    for number in range((size + FP4_GROUP - 1) // FP4_GROUP):
        start = number * FP4_GROUP
        many = min(FP4_GROUP, size - start)
        group, made, codes = x[start : start + many], floats(values, start, many), octets(record, start // 2, many // 2)
        largest = _FP4_FLOOR
        for k in range(many):
            largest = max(largest, abs(group[k]))
        scale = rounding.power_above(largest, _FP4_SHARE)
        for k in range(many // 2):
            low = _fp4_code(min(max(group[2 * k] / scale, -_FP4_MAX), _FP4_MAX))
            high = _fp4_code(min(max(group[2 * k + 1] / scale, -_FP4_MAX), _FP4_MAX))
            codes[k] = np.uint8(low | (high << i32(4)))
            made[2 * k], made[2 * k + 1] = _fp4_value(low) * scale, _fp4_value(high) * scale
        octets(record, size // 2 + number, 1)[0] = np.uint8(bits_of(scale) >> i32(23))


@plain
def _write_keys(records: Any, values: Any, x: int, num: int, size: int) -> None:
    """Transform keys x [G, C] and write them to their records; some keys are transformed side by side."""
    side = rounding.SIDE
    work, key, shrink = np.zeros(size * side, np.float32), np.empty(size, np.float32), f32(size**-0.5)
    for first in range(0, num, side):
        many = min(side, num - first)
        for i in range(many):
            given = floats(x, (first + i) * size, size)
            for c in range(size):
                work[c * side + i] = given[c]
        rounding.transform(work, size, shrink)
        for i in range(many):
            for c in range(size):
                key[c] = work[c * side + i]
            _write_key(records[first + i], values[first + i], key, size)


@kernel("int64(int64, int64, int64, int64, int64, int64, float32)")
def close_groups(fields: int, blocks: int, places: int, cos: int, sin: int, weight: int, eps: float) -> int:
    """Pool groups into entries, norm and rotate the entries, and write them to rows `places` [G] of blocks `blocks`
    [G].  fields: `Group`; cos, sin [G, R / 2]; weight [C]: of the norm.

    Returns 0, or 1 if an entry is not finite: then nothing was written.
    """
    g = integers(fields, 0, NUM_FIELDS)
    num, size, rope = g[NUM], g[WIDTH], g[ROPE]
    listed = np.empty(4 * g[RATIO], np.int64)
    weights, weighted = np.empty(2 * g[RATIO] * size, np.float32), np.empty(2 * g[RATIO] * size, np.float32)
    pooled, made = np.empty(num * size, np.float32), np.empty(num * size, np.float32)
    for i in range(num):
        many = _list_rows(listed, g, i)
        used = many * size
        _pool(pooled[i * size : (i + 1) * size], listed, many, size, g[EXP], weights[:used], weighted[:used])
    norm_rotate(made.ctypes.data, pooled.ctypes.data, weight, cos, sin, num, 1, size, size, rope, g[LANES], eps, f32(1))
    if not _are_finite(made):
        return 1
    records, values = np.empty(num, np.int64), np.empty(num, np.int64)
    blocks_, places_ = integers(blocks, 0, num), integers(places, 0, num)
    for i in range(num):
        records[i] = g[RECORDS] + blocks_[i] * g[BLOCK_BYTES] + places_[i] * g[RECORD_BYTES]
        values[i] = g[VALUES] + 4 * (blocks_[i] * g[BLOCK_STEP] + places_[i] * size)
    if g[IS_KEYS]:
        _write_keys(records, values, made.ctypes.data, num, size)
        return 0
    for i in range(num):
        _write_entry(records[i], values[i], made.ctypes.data + 4 * i * size, size, rope, g[RECORD_BYTES])
    return 0
