"""Computes a layer, except its attention across tokens, in three calls of any number of rows; they run other kernels.

A layer's weights and sizes are passed as one array of addresses and numbers (`Field`), which `layers` makes.
Exponentials are computed by MKL's `vmsExp`, called at its address; torch calls the same function. float32, contiguous.

Shapes:  N = rows, M = streams, D = hidden size, J = (2 + M) * M, H = heads, C = head dim,
         G = output groups, O = columns of a group, I = indexer heads, S = a compressor's columns,
         E = experts, K = picked.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any

from antefix.model.compiled import expert_kernels as experts
from antefix.model.compiled import rounding_kernels as rounding
from antefix.model.compiled import token_kernels as tokens
from antefix.model.compiled.intrinsics import exponentials, f32, floats, integers, kernel, plain
from antefix.model.compiled.products import multiply_rows


class Field(IntEnum):
    """Indices into a layer's array. A matrix's field holds its transpose's address. 0: the layer has no such part."""

    EXP = 0
    LANES = 1
    TILE = 2
    STREAMS = 3
    SIZE = 4
    HEADS = 5
    HEAD_DIM = 6
    RANK = 7
    ROPE = 8
    GROUPS = 9
    GROUP_COLUMNS = 10
    ROUNDS = 11
    # The first mixing, and the projections of its output.
    MIX = 12
    MIX_SCALE = 13
    MIX_BASE = 14
    NORM = 15
    Q_A = 16
    Q_A_NORM = 17
    Q_B = 18
    KV = 19
    KV_NORM = 20
    # The compressor, then the indexer.
    RATIO = 21
    COLUMNS = 22
    MAIN_KV = 23
    MAIN_GATE = 24
    MAIN_BIAS = 25
    INDEX_HEADS = 26
    INDEX_DIM = 27
    INDEX_COLUMNS = 28
    INDEX_KV = 29
    INDEX_GATE = 30
    INDEX_BIAS = 31
    INDEX_Q = 32
    INDEX_WEIGHTS = 33
    # Fields that are used after the attention.
    O_B = 34
    EXPERT_MIX = 35
    EXPERT_MIX_SCALE = 36
    EXPERT_MIX_BASE = 37
    EXPERT_NORM = 38
    ROUTER = 39
    ROUTER_BIAS = 40
    ROUTER_TABLE = 41
    NUM_EXPERTS = 42
    NUM_PICKED = 43
    INNER = 44
    SHARED_GATE = 45
    SHARED_UP = 46
    SHARED_DOWN = 47
    ITERS = 48
    # From this index on: the groups' first output matrices, then each expert's gate and up, then each expert's down.
    O_A = 49


class Number(IntEnum):
    """Indices into a layer's array of float32 numbers."""

    EPS = 0
    MIX_EPS = 1
    MIX_NORM_EPS = 2
    Q_SCALE = 3
    INDEX_FACTOR = 4
    LIMIT = 5
    SCALING = 6


# The fields as plain integers, which Numba compiles as constants.
(EXP, LANES, TILE, STREAMS, SIZE, HEADS, HEAD_DIM, RANK, ROPE, GROUPS, GROUP_COLUMNS, ROUNDS, MIX, MIX_SCALE, MIX_BASE,
 NORM, Q_A, Q_A_NORM, Q_B, KV, KV_NORM, RATIO, COLUMNS, MAIN_KV, MAIN_GATE, MAIN_BIAS, INDEX_HEADS, INDEX_DIM,
 INDEX_COLUMNS, INDEX_KV, INDEX_GATE, INDEX_BIAS, INDEX_Q, INDEX_WEIGHTS, O_B, EXPERT_MIX, EXPERT_MIX_SCALE,
 EXPERT_MIX_BASE, EXPERT_NORM, ROUTER, ROUTER_BIAS, ROUTER_TABLE, NUM_EXPERTS, NUM_PICKED, INNER, SHARED_GATE,
 SHARED_UP, SHARED_DOWN, ITERS, O_A) = (int(field) for field in Field)  # fmt: skip
EPS, MIX_EPS, MIX_NORM_EPS, Q_SCALE, INDEX_FACTOR, LIMIT, SCALING = (int(number) for number in Number)


@plain
def _mix(w: Any, f: Any, first: int, x: int, post: int, comb: int, streams: int, num: int, work: int) -> None:
    """`HyperConnection.forward` with the weights from field `first` on: x [N, D], post [N, M], comb [N, M, M]."""
    M, D = w[STREAMS], w[SIZE]
    J = (2 + M) * M
    at, to = work, work + 4 * num * J
    multiply_rows(at, streams, w[first], num, M * D, J, J, w[TILE])
    tokens.mix_logits(to, at, streams, w[first + 1], w[first + 2], num, M, D, w[LANES], f[MIX_NORM_EPS])
    exponentials(w[EXP], num * J, to, to)
    tokens.mix_gates(x, post, comb, to, streams, num, M, D, w[ITERS], f[MIX_EPS])


def work_size(w: Any, num: int) -> int:
    """How many float32 numbers the work buffer of the three calls needs for `num` rows."""
    M, D, heads = w[STREAMS], w[SIZE], w[HEADS] * w[HEAD_DIM]
    mixing = 2 * (2 + M) * M
    before = 2 * (D + w[RANK]) + max(heads, w[HEAD_DIM], w[INDEX_HEADS] * w[INDEX_DIM], mixing)
    after = heads + w[GROUPS] * w[GROUP_COLUMNS] + D + mixing
    picked = w[NUM_PICKED]
    routed = picked * (5 + D) + (picked + 1) * 3 * w[INNER] + D
    return int(num * max(before, after, routed) + 2 * w[NUM_EXPERTS])


@plain
def _norm(w: Any, f: Any, out: int, x: int, weight: int, num: int, size: int) -> None:
    tokens.norm_rotate(out, x, weight, 0, 0, num, 1, size, size, 0, w[LANES], f[EPS], f32(1))


@plain
def _compress(w: Any, out: int, x: int, kv: int, gate: int, bias: int, positions: int, num: int, columns: int) -> None:
    """`Compressor.project`, to out [2, N, S]."""
    second = out + 4 * num * columns
    multiply_rows(out, x, kv, num, w[SIZE], columns, columns, w[TILE])
    multiply_rows(second, x, gate, num, w[SIZE], columns, columns, w[TILE])
    experts.add_places(second, bias, positions, num, w[RATIO], columns)


@kernel("void(int64, int64, int64, int64, int64, int64, int64, int64)")
def before_attention(fields: int, numbers: int, places: int, positions: int, cos: int, sin: int, num: int,
                     work: int) -> None:  # fmt: skip
    """Compute the inputs of attention across tokens from the streams [N, M, D].

    places: addresses of streams, post [N, M], comb [N, M, M], q [N, H, C], window [N, C], main compressor's rows
    [2, N, S], indexer's rows [2, N, S], index queries [N, I, C], index weights [N, I].
    """
    w, f, at = integers(fields, 0, O_A), floats(numbers, 0, SCALING + 1), integers(places, 0, 9)
    D, H, C, rank, rope, tile = w[SIZE], w[HEADS], w[HEAD_DIM], w[RANK], w[ROPE], w[TILE]
    x, normed = work, work + 4 * num * D
    low, residual = work + 8 * num * D, work + 4 * num * (2 * D + rank)
    wide = work + 8 * num * (D + rank)
    _mix(w, f, MIX, x, at[1], at[2], at[0], num, wide)
    _norm(w, f, normed, x, w[NORM], num, D)
    multiply_rows(low, normed, w[Q_A], num, D, rank, rank, tile)
    _norm(w, f, residual, low, w[Q_A_NORM], num, rank)
    multiply_rows(wide, residual, w[Q_B], num, rank, H * C, H * C, tile)
    tokens.norm_rotate(at[3], wide, 0, cos, sin, num, H, C, H * C, rope, w[LANES], f[EPS], f[Q_SCALE])
    multiply_rows(wide, normed, w[KV], num, D, C, C, tile)
    tokens.norm_rotate(at[4], wide, w[KV_NORM], cos, sin, num, 1, C, C, rope, w[LANES], f[EPS], f32(1))
    if w[ROUNDS]:
        rounding.round_entries(at[4], num, C, rope)
    if w[MAIN_KV]:
        _compress(w, at[5], normed, w[MAIN_KV], w[MAIN_GATE], w[MAIN_BIAS], positions, num, w[COLUMNS])
    if w[INDEX_KV]:
        _compress(w, at[6], normed, w[INDEX_KV], w[INDEX_GATE], w[INDEX_BIAS], positions, num, w[INDEX_COLUMNS])
        heads, dim = w[INDEX_HEADS], w[INDEX_DIM]
        multiply_rows(wide, residual, w[INDEX_Q], num, rank, heads * dim, heads * dim, tile)
        tokens.rotate(at[7], wide, cos, sin, num, heads, dim, heads * dim, rope, 1, f32(1))
        multiply_rows(at[8], normed, w[INDEX_WEIGHTS], num, D, heads, heads, tile)
        votes = floats(at[8], 0, num * heads)
        for i in range(num * heads):
            votes[i] *= f[INDEX_FACTOR]


@kernel("void(int64, int64, int64, int64, int64, int64, int64)")
def after_attention(fields: int, numbers: int, places: int, cos: int, sin: int, num: int, work: int) -> None:
    """Compute the experts' input from attention's output.

    places: addresses of the inputs attended [N, H, C], streams, post, comb; then of the outputs: new streams, post and
    comb of the second mixing, x [N, D], normed, and the router's logits [N, E].
    """
    w, f, at = integers(fields, 0, O_A), floats(numbers, 0, SCALING + 1), integers(places, 0, 9)
    M, D, H, C, groups, columns = w[STREAMS], w[SIZE], w[HEADS], w[HEAD_DIM], w[GROUPS], w[GROUP_COLUMNS]
    turned, low = work, work + 4 * num * H * C
    output = low + 4 * num * groups * columns
    rest = output + 4 * num * D
    tokens.rotate(turned, at[0], cos, sin, num, H, C, H * C, w[ROPE], groups, f32(-1))
    each, matrices = H // groups * C, integers(fields, O_A, groups)
    for g in range(groups):
        multiply_rows(low + 4 * g * columns, turned + 4 * g * num * each, matrices[g], num, each, columns,
                      groups * columns, w[TILE])  # fmt: skip
    multiply_rows(output, low, w[O_B], num, groups * columns, D, D, w[TILE])
    tokens.expand(at[4], at[1], output, at[2], at[3], num, M, D)
    _mix(w, f, EXPERT_MIX, output, at[5], at[6], at[4], num, rest)
    _norm(w, f, at[7], output, w[EXPERT_NORM], num, D)
    multiply_rows(at[8], at[7], w[ROUTER], num, D, w[NUM_EXPERTS], w[NUM_EXPERTS], w[TILE])


@kernel("void(int64, int64, int64, int64, int64, int64)")
def run_experts(fields: int, numbers: int, places: int, token_ids: int, num: int, work: int) -> None:
    """Compute the feed-forward part and the new streams.

    places: addresses of streams, post, comb, x [N, D], normed, the experts' scores [N, E], and the new streams.
    """
    w, f, at = integers(fields, 0, O_A), floats(numbers, 0, SCALING + 1), integers(places, 0, 6)
    M, D, E, K, inner, tile = w[STREAMS], w[SIZE], w[NUM_EXPERTS], w[NUM_PICKED], w[INNER], w[TILE]
    x, groups = at[3], w[GROUPS]
    gate_up, down = integers(fields, O_A + groups, E), integers(fields, O_A + groups + E, E)
    picked, where = work, work + 8 * num * K
    counts, weights = integers(work, 2 * num * K, E), work + 8 * (2 * num * K + E)
    experts.pick(picked, weights, at[4], w[ROUTER_BIAS], w[ROUTER_TABLE], token_ids, num, E, K, w[LANES], f[SCALING])
    # 1. Rows of the picked experts, sorted by expert; then their gates and ups, placed after the shared expert's.
    total = num * (K + 1)
    rows = weights + 4 * num * K
    both = rows + 4 * num * K * D
    active = both + 8 * total * inner
    out = active + 4 * total * inner
    experts.spread(rows, where, work + 16 * num * K, x, picked, num, E, K, D, 1)
    multiply_rows(both, x, w[SHARED_GATE], num, D, inner, 2 * inner, tile)
    multiply_rows(both + 4 * inner, x, w[SHARED_UP], num, D, inner, 2 * inner, tile)
    first = 0
    for e in range(E):
        multiply_rows(both + 8 * (num + first) * inner, rows + 4 * first * D, gate_up[e], counts[e], D, 2 * inner,
                      2 * inner, tile)  # fmt: skip
        first += counts[e]
    # 2. One activation for all rows, then the down products.
    experts.gates(active, both, total, inner, f[LIMIT])
    exponentials(w[EXP], total * inner, active, active)
    experts.activate(active, both, total, inner, f[LIMIT])
    multiply_rows(out, active, w[SHARED_DOWN], num, inner, D, D, tile)
    first = 0
    for e in range(E):
        multiply_rows(rows + 4 * first * D, active + 4 * (num + first) * inner, down[e], counts[e], inner, D, D, tile)
        first += counts[e]
    experts.combine(out, rows, where, weights, num, K, D)
    tokens.expand(at[5], at[0], out, at[1], at[2], num, M, D)
