"""Kernels of the lightning indexer: scores of all visible keys of a query, then the best of them.

All arrays are float32 or int64 and addressed by `Tensor.data_ptr()`. The torch code that these kernels replace is in
`antefix.model.indexer`.

Shapes:  N = queries, I = indexer heads, C = channels of a key, E = visible keys of a query, k = entries a query keeps.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from antefix.model.compiled.intrinsics import bits_of, f32, floats, i32, integers, kernel, plain
from antefix.model.compiled.listed_tiles import KEYS, add_votes, multiply_listed
from antefix.model.compiled.stored_rows import NUM_PLACES, list_stored, turn_rows


@plain
def _kth(x: Any, k: int) -> Any:
    """The k-th largest of the integers, bit by bit from the sign on: passes without branches, which run vectorised."""
    found = i32(-0x80000000)
    count = i32(0)
    for e in range(len(x)):
        count += i32(x[e] >= i32(0))
    if count >= k:
        found = i32(0)
    for bit in range(30, -1, -1):
        tried = i32(found | i32(1 << bit))
        count = i32(0)
        for e in range(len(x)):
            count += i32(x[e] >= tried)
        if count >= k:
            found = tried
    return found


@plain
def _choose(made: Any, scores: Any, ordered: Any, spare: Any) -> None:
    """`indexer.top_entries`: the indices of the best of more scores than `made` has places, in ascending order. Of
    equal scores the lowest index wins.  spare: one place more than `made`."""
    k = len(made)
    for e in range(len(scores)):
        # Integers in the order of the floats. Adding 0 turns -0 into 0.
        bits = bits_of(scores[e] + f32(0))
        ordered[e] = i32(bits ^ i32((bits >> i32(31)) & i32(0x7FFFFFFF)))
    worst = _kth(ordered[: len(scores)], k)
    better = 0
    for e in range(len(scores)):
        better += ordered[e] > worst
    equal, filled = k - better, 0
    for e in range(len(scores)):
        is_equal = ordered[e] == worst
        spare[filled] = e
        filled += (ordered[e] > worst) | (is_equal & (equal > 0))
        equal -= is_equal
    for i in range(k):
        made[i] = spare[i]


@kernel("void(int64, int64, int64, int64, int64, int64, int64, int64, int64, int64, int64)")
def pick(picked: int, queries: int, weights: int, stored: int, visible: int, num: int, most: int, I: int, C: int,  # noqa: E741
         k: int, tile: int) -> None:  # fmt: skip
    """Each query's k best visible entries [N, k], ascending, then -1. Scores are those of `indexer.index_scores`.

    queries [N, I, C], weights [N, I]; stored: where the keys are (`stored_rows`); visible [N]: how many entries a query
    sees, at most `most`.
    """
    heads, rows = (I + KEYS - 1) // KEYS * KEYS, (most + KEYS - 1) // KEYS * KEYS
    turned, votes = np.zeros(C * heads, np.float32), np.zeros(heads, np.float32)
    hits, scores = np.empty(rows * heads, np.float32), np.empty(rows, np.float32)
    ordered, listed, spare = np.empty(most, np.int32), np.empty(rows, np.int64), np.empty(k + 1, np.int64)
    places = integers(stored, 0, NUM_PLACES)
    for n in range(num):
        count, made = min(integers(visible, n, 1)[0], most), integers(picked, n * k, k)
        if count <= k:
            for i in range(k):
                made[i] = i if i < count else -1
            continue
        list_stored(listed, places, n, count, C)
        whole = (count + KEYS - 1) // KEYS * KEYS
        for i in range(count, whole):
            listed[i] = listed[count - 1]
        turn_rows(turned, queries + 4 * n * I * C, I, C, heads)
        multiply_listed(hits.ctypes.data, turned.ctypes.data, listed.ctypes.data, whole, heads, C, tile)
        weight = floats(weights, n * I, I)
        for i in range(I):
            votes[i] = weight[i]
        for e in range(0, whole, KEYS):
            for j in range(e, e + KEYS):
                scores[j] = f32(0)
            for i in range(0, heads, KEYS):
                add_votes(scores.ctypes.data + 4 * e, hits.ctypes.data + 4 * (e * heads + i), heads,
                          votes.ctypes.data + 4 * i)  # fmt: skip
        _choose(made, scores[:count], ordered, spare)
