"""Sums over a row in torch's order, so that a kernel and torch's operations give the same bits.

torch adds contiguous float32 numbers in vectors of LANES numbers, four vectors at a time, in levels of 16 (cascade sum
in ATen's SumKernel.cpp). Fewer numbers than a vector are added one by one.  LANES: `tokens.lanes`, 8 or 16.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from antefix.model.compiled.intrinsics import f32, floats, inline, plain

_STEP = 16


@inline
def scratch(lanes: int) -> Any:
    """The work array of `row_sum`: three levels."""
    return np.empty(12 * lanes, np.float32)


@plain
def row_sum(address: int, size: int, squares: bool, lanes: int, work: Any) -> Any:
    """Sum of the `size` numbers at an address, or of their squares."""
    if size < lanes:
        return _few(floats(address, 0, size), squares)
    width = 4 * lanes
    low, middle, high = work[:width], work[width : 2 * width], work[2 * width : 3 * width]
    for k in range(width):
        low[k], middle[k], high[k] = f32(0), f32(0), f32(0)
    num_vectors = size // lanes
    num_blocks = num_vectors // 4
    for i in range(num_blocks):
        block = floats(address, i * width, width)
        if squares:
            for k in range(width):
                low[k] += block[k] * block[k]
        else:
            for k in range(width):
                low[k] += block[k]
        if (i + 1) % _STEP == 0:
            for k in range(width):
                middle[k] += low[k]
                low[k] = f32(0)
            if (i + 1) % (_STEP * _STEP) == 0:
                for k in range(width):
                    high[k] += middle[k]
                    middle[k] = f32(0)
    for k in range(width):
        low[k] = (low[k] + middle[k]) + high[k]
    for v in range(num_blocks * 4, num_vectors):
        block = floats(address, v * lanes, lanes)
        for k in range(lanes):
            low[k] += block[k] * block[k] if squares else block[k]
    for j in range(1, 4):
        more = low[j * lanes : (j + 1) * lanes]
        for k in range(lanes):
            low[k] += more[k]
    total = f32(0)
    rest = floats(address, num_vectors * lanes, size - num_vectors * lanes)
    for k in range(len(rest)):
        total += rest[k] * rest[k] if squares else rest[k]
    for k in range(lanes):
        total += low[k]
    return total


@plain
def _few(x: Any, squares: bool) -> Any:
    """The sum of fewer numbers than a vector: four sums side by side; the remaining numbers go to the first one."""
    sums = np.zeros(4, np.float32)
    whole = len(x) - len(x) % 4
    for k in range(len(x)):
        value = x[k] * x[k] if squares else x[k]
        sums[k % 4 if k < whole else 0] += value
    return ((sums[0] + sums[1]) + sums[2]) + sums[3]
