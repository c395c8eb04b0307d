"""Kernels of attention across tokens: each query with its window and its compressed entries, all in one call.

The keys that a query does not see are left out instead of hidden: in the torch code (`antefix.model.attend`, `steps`)
they have weight 0 and add exactly nothing. Keys and values are read where they are, through a list of addresses. All
arrays are float32 or int64 and addressed by `Tensor.data_ptr()`.

Shapes:  N = queries, H = heads, C = channels, W = n_win, k = far entries of a query, in whole segments.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any

import numpy as np

from antefix.model.compiled.intrinsics import exponentials, f32, floats, integers, kernel, plain
from antefix.model.compiled.listed_tiles import KEYS, mix_listed, multiply_listed
from antefix.model.compiled.stored_rows import NUM_PLACES, list_picked, list_stored, turn_rows
from antefix.model.compiled.sums import row_sum, scratch


class Size(IntEnum):
    """Indices into the array of a layer's sizes. FAR: most far entries of a query.  SEGMENT: how many far entries are
    summed together.  TILE: SUM_TILE.  LANES: of torch's vectors.  EXP: address of MKL's exponential."""

    HEADS = 0
    CHANNELS = 1
    WINDOW = 2
    FAR = 3
    SEGMENT = 4
    TILE = 5
    LANES = 6
    EXP = 7


NUM_SIZES = len(Size)
HEADS, CHANNELS, WINDOW, FAR, SEGMENT, TILE, LANES, EXP = (int(size) for size in Size)


@plain
def _weigh(cells: Any, dots: Any, sinks: Any, num: int, heads: int, step: int, exp: int) -> None:
    """The softmax's exponentials: cells [heads, num], then [heads] of the sinks. dots [num, step]: the logits."""
    for h in range(heads):
        top = sinks[h]
        row = cells[h * num : (h + 1) * num]
        for i in range(num):
            value = dots[i * step + h]
            row[i] = value
            top = max(top, value)
        for i in range(num):
            row[i] -= top
        cells[heads * num + h] = sinks[h] - top
    exponentials(exp, heads * num + heads, cells.ctypes.data, cells.ctypes.data)


@plain
def _total(row: Any, sink: Any, before: int, own: int, slot: int, s: Any, padded: Any, work: Any) -> Any:
    """The sum of a head's weights, with zeros in the places of hidden keys: places decide the order of addition."""
    window, segment = s[WINDOW], s[SEGMENT]
    for j in range(2 * window):
        padded[j] = f32(0)
    for j in range(before):
        padded[window - before + j] = row[j]
    for j in range(own):
        padded[window + slot + 1 - own + j] = row[before + j]
    total = sink + row_sum(padded.ctypes.data, 2 * window, False, s[LANES], work)
    for start in range(before + own, len(row), segment):
        many = min(segment, len(row) - start)
        for j in range(many):
            padded[j] = row[start + j]
        for j in range(many, segment):
            padded[j] = f32(0)
        total += row_sum(padded.ctypes.data, segment, False, s[LANES], work)
    return total


@plain
def _product(out: int, spare: int, cells: int, num: int, listed: int, first: int, place: int, many: int, s: Any,
             adds: int) -> None:  # fmt: skip
    """out [H, C] becomes, or is increased by, the weighted values of `many` keys from number `first` of the list on.
    They have places `place`, `place + 1`, ... in a sum that is cut into tiles."""
    heads, size, tile = s[HEADS], s[CHANNELS], s[TILE]
    if place // tile == (place + many - 1) // tile:
        mix_listed(out, cells + 4 * first, num, listed + 8 * first, heads, size, many, adds)
        return
    done = 0
    while done < many:
        count = min(tile - (place + done) % tile, many - done)
        at = first + done
        mix_listed(spare, cells + 4 * at, num, listed + 8 * at, heads, size, count, done)
        done += count
    made, more = floats(out, 0, heads * size), floats(spare, 0, heads * size)
    for i in range(heads * size):
        made[i] = made[i] + more[i] if adds else more[i]


@plain
def _attend(out: int, q: int, sinks: Any, before: int, own: int, far: int, slot: int, s: Any, listed: Any,
            turned: Any, dots: Any, cells: Any, padded: Any, spare: Any, work: Any) -> None:  # fmt: skip
    """One query's attention. listed: the addresses of its visible keys: of the previous window tile, of its own tile up
    to its own slot, and of far entries."""
    heads, size = s[HEADS], s[CHANNELS]
    num, step = before + own + far, (heads + 3) // 4 * 4
    whole = (num + KEYS - 1) // KEYS * KEYS
    for i in range(num, whole):
        listed[i] = listed[num - 1]
    # 1. Logits, and their exponentials.
    turn_rows(turned, q, heads, size, step)
    keys, weights = listed.ctypes.data, cells.ctypes.data
    multiply_listed(dots.ctypes.data, turned.ctypes.data, keys, whole, step, size, s[TILE])
    _weigh(cells, dots, sinks, num, heads, step, s[EXP])
    # 2. Weighted values: of the previous tile, plus those of the own tile, plus those of each segment.
    extra = spare.ctypes.data
    if before:
        _product(out, extra, weights, num, keys, 0, s[WINDOW] - before, before, s, 0)
    _product(out, extra, weights, num, keys, before, slot + 1 - own, own, s, before)
    for start in range(0, far, s[SEGMENT]):
        many = min(s[SEGMENT], far - start)
        _product(out, extra, weights, num, keys, before + own + start, 0, many, s, 1)
    # 3. Divided by the sum of the weights.
    for h in range(heads):
        row = cells[h * num : (h + 1) * num]
        total = _total(row, cells[heads * num + h], before, own, slot, s, padded, work)
        made = floats(out, h * size, size)
        for c in range(size):
            made[c] /= total


@plain
def _list_far(listed: Any, places: int, picked: int, visible: int, query: int, s: Any) -> int:
    """The addresses of a query's far entries. Returns their number."""
    if not places:
        return 0
    stored = integers(places, 0, NUM_PLACES)
    if picked:
        wanted = integers(picked, query * s[FAR], s[FAR])
        return list_picked(listed, stored, query, wanted, s[CHANNELS])  # type: ignore[no-any-return]
    count: int = min(integers(visible, query, 1)[0], s[FAR])
    list_stored(listed, stored, query, count, s[CHANNELS])
    return count


@kernel("void(int64, int64, int64, int64, int64, int64, int64, int64, int64, int64, int64)")
def attend_line(out: int, q: int, sinks: int, values: int, position: int, cut: int, num: int, sizes: int,
                places: int, picked: int, visible: int) -> None:  # fmt: skip
    """Attention [N, H, C] of neighbouring tokens of one sequence.

    values: `attend.WindowLine.values`; position: of the first query; keys before position `cut` are hidden; sizes:
    `Size`; places: where the far entries are (`stored_rows`; 0: there are none); picked [N, k]: their indices, or 0:
    the first `visible` [N].
    """
    s = integers(sizes, 0, NUM_SIZES)
    heads, size, window = s[HEADS], s[CHANNELS], s[WINDOW]
    step, most = (heads + 3) // 4 * 4, (window + s[FAR] + KEYS - 1) // KEYS * KEYS
    listed, turned = np.empty(most, np.int64), np.zeros(size * step, np.float32)
    dots, cells = np.empty(most * step, np.float32), np.empty(heads * (most + 1), np.float32)
    padded, spare = np.empty(max(2 * window, s[SEGMENT]), np.float32), np.empty(heads * size, np.float32)
    work, votes = scratch(s[LANES]), floats(sinks, 0, heads)
    start = position // window * window
    for n in range(num):
        at = position + n
        slot = at % window
        first = max(at - window + 1, cut, 0)
        own = min(slot + 1, at - first + 1)
        near = at - first + 1
        # The line begins one tile before the tile of the first query.
        begin = values + 4 * (first - start + window) * size
        for i in range(near):
            listed[i] = begin + 4 * i * size
        far = _list_far(listed[near:], places, picked, visible, n, s)
        _attend(out + 4 * n * heads * size, q + 4 * n * heads * size, votes, near - own, own, far, slot, s, listed,
                turned, dots, cells, padded, spare, work)  # fmt: skip


@kernel("void(int64, int64, int64, int64, int64, int64, int64, int64, int64, int64, int64, int64, int64)")
def attend_rings(out: int, q: int, sinks: int, rings: int, offset: int, new: int, positions: int, cuts: int, num: int,
                 sizes: int, places: int, picked: int, visible: int) -> None:  # fmt: skip
    """Attention [N, H, C] of one token of each of N sequences.

    rings [N]: address of each sequence's window state; the layer's ring lies `offset` numbers further. new [N, C]: the
    tokens' own entries, which the rings do not hold yet. positions, cuts [N]. The rest as in `attend_line`.
    """
    s = integers(sizes, 0, NUM_SIZES)
    heads, size, window = s[HEADS], s[CHANNELS], s[WINDOW]
    step, most = (heads + 3) // 4 * 4, (window + s[FAR] + KEYS - 1) // KEYS * KEYS
    listed, turned = np.empty(most, np.int64), np.zeros(size * step, np.float32)
    dots, cells = np.empty(most * step, np.float32), np.empty(heads * (most + 1), np.float32)
    padded, spare = np.empty(max(2 * window, s[SEGMENT]), np.float32), np.empty(heads * size, np.float32)
    work, votes = scratch(s[LANES]), floats(sinks, 0, heads)
    for n in range(num):
        at, cut = integers(positions, n, 1)[0], integers(cuts, n, 1)[0]
        slot = at % window
        first = max(at - window + 1, cut, 0)
        own, near = min(slot + 1, at - first + 1), at - first + 1
        ring = integers(rings, n, 1)[0] + 4 * offset
        for i in range(near - 1):
            listed[i] = ring + 4 * ((first + i) % window) * size
        listed[near - 1] = new + 4 * n * size
        far = _list_far(listed[near:], places, picked, visible, n, s)
        _attend(out + 4 * n * heads * size, q + 4 * n * heads * size, votes, near - own, own, far, slot, s, listed,
                turned, dots, cells, padded, spare, work)  # fmt: skip
