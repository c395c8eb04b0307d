"""Kernels around the experts' products: choice of experts, rows sorted by expert, activation, weighted sums.

All arrays are float32 or int64, contiguous, and addressed by `Tensor.data_ptr()`. The kernels replace torch code in
`antefix.model.moe`.

Shapes:  N = tokens, E = experts, K = experts per token, D = hidden size, I = intermediate size, R = rows.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from antefix.model.compiled.intrinsics import f32, floats, fma, integers, kernel, plain
from antefix.model.compiled.sums import row_sum, scratch


@plain
def _best(ranked: Any, picked: Any) -> None:
    """The highest ranked experts, ascending by id. Of experts with equal scores, the first one wins; NaN ranks highest,
    as in torch.
    """
    for k in range(len(picked)):
        best = -1
        for e in range(len(ranked)):
            taken = False
            for j in range(k):
                taken |= picked[j] == e
            if not taken and (
                best < 0 or ranked[e] > ranked[best] or (ranked[e] != ranked[e] and ranked[best] == ranked[best])
            ):
                best = e
        picked[k] = best


@plain
def _sort(picked: Any) -> None:
    for k in range(1, len(picked)):
        value, j = picked[k], k - 1
        while j >= 0 and picked[j] > value:
            picked[j + 1] = picked[j]
            j -= 1
        picked[j + 1] = value


@kernel("void(int64, int64, int64, int64, int64, int64, int64, int64, int64, int64, float32)")
def pick(experts: int, weights: int, scores: int, bias: int, table: int, tokens: int, num: int, E: int, K: int,
         lanes: int, scaling: float) -> None:  # fmt: skip
    """`ExpertRouter.forward` from the experts' scores [N, E]: experts [N, K] and weights [N, K].

    bias [E] where scores decide; table [V, K] and tokens [N] where token ids decide.
    """
    ranked, work = np.empty(E, np.float32), scratch(lanes)
    for n in range(num):
        scored, picked = floats(scores, n * E, E), integers(experts, n * K, K)
        if table:
            given = integers(table, integers(tokens, n, 1)[0] * K, K)
            for k in range(K):
                picked[k] = given[k]
        else:
            added = floats(bias, 0, E)
            for e in range(E):
                ranked[e] = scored[e] + added[e]
            _best(ranked, picked)
        _sort(picked)
        made = floats(weights, n * K, K)
        for k in range(K):
            made[k] = scored[picked[k]]
        total = row_sum(weights + 4 * n * K, K, False, lanes, work) + f32(1e-20)
        for k in range(K):
            made[k] = made[k] / total * f32(scaling)


@kernel("void(int64, int64, int64, int64, int64, int64, int64, int64, int64, int64)")
def spread(rows: int, places: int, counts: int, x: int, experts: int, num: int, E: int, K: int, D: int,
           tile: int) -> None:  # fmt: skip
    """Copy each pick's row of x [N, D] into the run of rows of the picked expert. Runs are whole tiles, padded with
    zeros. places [N, K]: the row of each pick. counts [E]: rows of each run.
    """
    counts_, picks, places_ = integers(counts, 0, E), integers(experts, 0, num * K), integers(places, 0, num * K)
    starts = np.zeros(E + 1, np.int64)
    for e in range(E):
        counts_[e] = 0
    for i in range(num * K):
        counts_[picks[i]] += 1
    for e in range(E):
        starts[e + 1] = starts[e] + (counts_[e] + tile - 1) // tile * tile
    filled = starts.copy()
    for i in range(num * K):
        expert = picks[i]
        places_[i] = filled[expert]
        given, made = floats(x, i // K * D, D), floats(rows, filled[expert] * D, D)
        for d in range(D):
            made[d] = given[d]
        filled[expert] += 1
    for e in range(E):
        empty = floats(rows, filled[e] * D, (starts[e + 1] - filled[e]) * D)
        for d in range(len(empty)):
            empty[d] = f32(0)
        counts_[e] = starts[e + 1] - starts[e]


@kernel("void(int64, int64, int64, int64, float32)")
def gates(out: int, gate_up: int, num: int, inner: int, limit: float) -> None:
    """The clamped gates [R, I] of gate_up [R, 2I], negated: the arguments of the activation's exponentials."""
    top = f32(limit)
    for n in range(num):
        given, made = floats(gate_up, 2 * n * inner, inner), floats(out, n * inner, inner)
        for i in range(inner):
            made[i] = -(top if given[i] > top else given[i])


@kernel("void(int64, int64, int64, int64, float32)")
def activate(out: int, gate_up: int, num: int, inner: int, limit: float) -> None:
    """`moe.clamped_swiglu` of gate_up [R, 2I]. `out` holds the exponentials [R, I] at the start, and is overwritten."""
    top = f32(limit)
    for n in range(num):
        gate, up = floats(gate_up, 2 * n * inner, inner), floats(gate_up, (2 * n + 1) * inner, inner)
        made = floats(out, n * inner, inner)
        for i in range(inner):
            g = top if gate[i] > top else gate[i]
            u = top if up[i] > top else (-top if up[i] < -top else up[i])
            made[i] = g * (f32(1) / (made[i] + f32(1))) * u


@kernel("void(int64, int64, int64, int64, int64, int64, int64)")
def combine(out: int, rows: int, places: int, weights: int, num: int, K: int, D: int) -> None:
    """Add each token's expert rows, weighted, in order of expert id, to out [N, D], which holds the shared expert's
    rows.
    """
    total = np.empty(D, np.float32)
    for n in range(num):
        place, weight, made = integers(places, n * K, K), floats(weights, n * K, K), floats(out, n * D, D)
        first = floats(rows, place[0] * D, D)
        for d in range(D):
            total[d] = weight[0] * first[d]
        for k in range(1, K):
            w, row = weight[k], floats(rows, place[k] * D, D)
            for d in range(D):
                total[d] = fma(w, row[d], total[d])
        for d in range(D):
            made[d] += total[d]


@kernel("void(int64, int64, int64, int64, int64, int64)")
def add_places(rows: int, bias: int, positions: int, num: int, ratio: int, width: int) -> None:
    """Add to a compressor's gate rows [N, S] the bias [m, S] for each token's place in its group."""
    for n in range(num):
        added = floats(bias, integers(positions, n, 1)[0] % ratio * width, width)
        made = floats(rows, n * width, width)
        for c in range(width):
            made[c] += added[c]
