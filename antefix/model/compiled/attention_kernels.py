"""Kernels around attention's products: window rings, gathering of entries, softmax, sums, index scores and top-k.

All arrays are float32 or int64, contiguous, and addressed by `Tensor.data_ptr()`. The torch code that these kernels
replace is in `antefix.model.steps`, `attend` and `indexer`.

Shapes:  S = queries or sequences, H = heads, C = channels, W = n_win, k = far entries, E = keys, I = indexer heads.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from antefix.model.compiled.intrinsics import f32, floats, fma, integers, kernel, plain
from antefix.model.compiled.sums import row_sum, scratch

_HIDDEN = f32(-np.inf)


@kernel("void(int64, int64, int64, int64, int64, int64, int64, int64)")
def gather_rings(out: int, windows: int, offset: int, new: int, slots: int, num: int, W: int, C: int) -> None:
    """Copy each sequence's ring [S, W, C] to `out`, with its new row [S, C] in its slot. windows [S]: address of each
    sequence's window state; the layer's ring lies `offset` numbers further.
    """
    for s in range(num):
        given = floats(integers(windows, s, 1)[0], offset, W * C)
        made = floats(out, s * W * C, W * C)
        for c in range(W * C):
            made[c] = given[c]
        row, added = floats(out, (s * W + integers(slots, s, 1)[0]) * C, C), floats(new, s * C, C)
        for c in range(C):
            row[c] = added[c]


@kernel("void(int64, int64, int64, int64, int64, int64, int64, int64, int64, int64)")
def gather_entries(out: int, decoded: int, block_step: int, per_block: int, tables: int, table_size: int,
                   indices: int, num: int, k: int, C: int) -> None:  # fmt: skip
    """Copy entries [S, k, C] of the pool by index, indices [S, k] (a negative index gives entry 0). Row r of a block
    lies C * r numbers after the block's start; blocks are `block_step` numbers apart. tables [S, table_size].
    """
    for s in range(num):
        table, wanted = integers(tables, s * table_size, table_size), integers(indices, s * k, k)
        for i in range(k):
            index = max(wanted[i], 0)
            block = table[index // per_block]
            given = floats(decoded, block * block_step + index % per_block * C, C)
            made = floats(out, (s * k + i) * C, C)
            for c in range(C):
                made[c] = given[c]


@kernel("void(int64, int64, int64, int64, int64, int64, int64, int64, int64, int64)")
def gather_first(out: int, decoded: int, block_step: int, per_block: int, tables: int, table_size: int,
                 visible: int, num: int, E: int, C: int) -> None:  # fmt: skip
    """Copy the first `visible` [S] entries of each sequence, followed by zeros up to E: [S, E, C]."""
    for s in range(num):
        table, count = integers(tables, s * table_size, table_size), min(integers(visible, s, 1)[0], E)
        for start in range(0, count, per_block):
            many = min(per_block, count - start) * C
            given = floats(decoded, table[start // per_block] * block_step, many)
            made = floats(out, (s * E + start) * C, many)
            for c in range(many):
                made[c] = given[c]
        rest = floats(out, (s * E + count) * C, (E - count) * C)
        for c in range(len(rest)):
            rest[c] = f32(0)


@kernel("void(int64, int64, int64, int64, int64, int64, int64, int64, int64, int64, int64)")
def soften(out: int, near: int, far: int, sinks: int, positions: int, cuts: int, live: int, num: int, H: int, W: int,
           k: int) -> None:  # fmt: skip
    """The arguments of the softmax's exponentials: logits minus their row's largest; minus infinity for hidden ones.

    near [S, H, W]: logits of the ring; far [S, H, k]: logits of far entries, of which the first `live` [S] count.
    out: for the previous tile [S, H, W], the own tile [S, H, W], the far entries [S, H, k], and the sinks [S, H].
    """
    own_at, far_at, sink_at = num * H * W, 2 * num * H * W, num * H * (2 * W + k)
    for s in range(num):
        position, cut, count = integers(positions, s, 1)[0], integers(cuts, s, 1)[0], integers(live, s, 1)[0]
        slot = position % W
        # Slot j of the ring holds a token of this tile, or of the previous one.
        first = position - slot
        for h in range(H):
            row = s * H + h
            logits, others = floats(near, row * W, W), floats(far, row * k, k)
            before, own = floats(out, row * W, W), floats(out, own_at + row * W, W)
            distant = floats(out, far_at + row * k, k)
            sink = floats(sinks, h, 1)[0]
            top = sink
            for j in range(W):
                own[j] = logits[j] if j <= slot and first + j >= cut else _HIDDEN
                before[j] = logits[j] if j > slot and first - W + j >= cut else _HIDDEN
                top = max(top, max(own[j], before[j]))
            for j in range(k):
                distant[j] = others[j] if j < count else _HIDDEN
                top = max(top, distant[j])
            for j in range(W):
                own[j] -= top
                before[j] -= top
            for j in range(k):
                distant[j] -= top
            floats(out, sink_at + row, 1)[0] = sink - top


@kernel("void(int64, int64, int64, int64, int64, int64, int64, int64, int64, int64)")
def divide(out: int, values: int, weights: int, num: int, H: int, W: int, k: int, segment: int, C: int,
           lanes: int) -> None:  # fmt: skip
    """Attention's output [S, H, C]: the sum of weighted values divided by the sum of weights.

    weights: laid out as `soften` does. values [2 + k / segment, S, H, C]: weighted values of the previous tile, the own
    tile, and each segment of far entries.
    """
    own_at, far_at, sink_at = num * H * W, 2 * num * H * W, num * H * (2 * W + k)
    both, work = np.empty(2 * W, np.float32), scratch(lanes)
    for row in range(num * H):
        before, own = floats(weights, row * W, W), floats(weights, own_at + row * W, W)
        first, second = both[:W], both[W:]
        for j in range(W):
            first[j], second[j] = before[j], own[j]
        total = floats(weights, sink_at + row, 1)[0] + row_sum(both.ctypes.data, 2 * W, False, lanes, work)
        made = floats(out, row * C, C)
        a, b = floats(values, row * C, C), floats(values, (num * H + row) * C, C)
        for c in range(C):
            made[c] = a[c] + b[c]
        for start in range(0, k, segment):
            total += row_sum(weights + 4 * (far_at + row * k + start), segment, False, lanes, work)
            more = floats(values, ((2 + start // segment) * num * H + row) * C, C)
            for c in range(C):
                made[c] += more[c]
        for c in range(C):
            made[c] /= total


@kernel("void(int64, int64, int64, int64, int64, int64, int64, int64)")
def score(out: int, hits: int, weights: int, num: int, heads: int, E: int, step: int, offset: int) -> None:
    """Index scores: the weighted sum over heads of max(hits [N, I, E], 0), to out [N, step] from number `offset` on."""
    for n in range(num):
        made, weight = floats(out, n * step + offset, E), floats(weights, n * heads, heads)
        row = floats(hits, n * heads * E, E)
        for e in range(E):
            made[e] = weight[0] * max(row[e], f32(0))
        for i in range(1, heads):
            w, row = weight[i], floats(hits, (n * heads + i) * E, E)
            for e in range(E):
                made[e] = fma(w, max(row[e], f32(0)), made[e])


@plain
def _kth(x: Any, k: int) -> Any:
    """The k-th largest number. Reorders x."""
    low, high, place = 0, len(x) - 1, k - 1
    while low < high:
        pivot = x[(low + high) // 2]
        i, j = low, high
        while i <= j:
            while x[i] > pivot:
                i += 1
            while x[j] < pivot:
                j -= 1
            if i <= j:
                x[i], x[j] = x[j], x[i]
                i += 1
                j -= 1
        if place <= j:
            high = j
        elif place >= i:
            low = i
        else:
            break
    return x[place]


@kernel("void(int64, int64, int64, int64, int64, int64)")
def choose(picked: int, scores: int, visible: int, num: int, E: int, k: int) -> None:
    """`indexer.top_entries`: the k best of each row's `visible` scores [N, E], in ascending order, then -1. Of entries
    with equal scores, the one with the lowest index wins.
    """
    work = np.empty(E, np.float32)
    for n in range(num):
        count, made = min(integers(visible, n, 1)[0], E), integers(picked, n * k, k)
        if count <= k:
            for i in range(k):
                made[i] = i if i < count else -1
            continue
        row = floats(scores, n * E, count)
        for e in range(count):
            work[e] = row[e]
        worst = _kth(work[:count], k)
        better = 0
        for e in range(count):
            better += row[e] > worst
        equal, filled = k - better, 0
        for e in range(count):
            is_equal = row[e] == worst
            if row[e] > worst or (is_equal and equal > 0):
                made[filled] = e
                filled += 1
                equal -= is_equal
        for i in range(filled, k):
            made[i] = -1


@kernel("void(int64, int64, int64, int64)")
def copy_rows(targets: int, sources: int, sizes: int, num: int) -> None:
    """Copy `sizes` [M] numbers from each source address to its target address."""
    to, given, many = integers(targets, 0, num), integers(sources, 0, num), integers(sizes, 0, num)
    for i in range(num):
        made, row = floats(to[i], 0, many[i]), floats(given[i], 0, many[i])
        for c in range(many[i]):
            made[c] = row[c]
