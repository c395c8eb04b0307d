"""Kernels for computations that concern one token alone: mixing, norms and rotations. float32, contiguous.

Arrays are given by `Tensor.data_ptr()`; exponentials are computed by torch, between two kernels. Each kernel gives the
bits of the torch code that its docstring names; `antefix.model.compiled.check` compares them when a model is loaded.

Shapes:  N = rows, M = streams, J = (2 + M) * M mixing logits, D = hidden size, C = channels, R = RoPE dims, H = heads.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from antefix.model.compiled.intrinsics import f32, floats, fma, inline, kernel, plain
from antefix.model.compiled.sums import row_sum, scratch


@inline
def _inverse_root(total: Any, size: int, eps: Any) -> Any:
    return f32(1) / np.sqrt(total / f32(size) + eps)


@plain
def turn(x: Any, cos: Any, sin: Any, sign: Any) -> None:
    """Rotate the pairs of x [R] in place, by the angle times `sign` (`norms_rope.rotate`)."""
    for r in range(len(cos)):
        even, odd = x[2 * r], x[2 * r + 1]
        s = sign * sin[r]
        x[2 * r] = even * cos[r] - odd * s
        x[2 * r + 1] = odd * cos[r] + even * s


@plain
def _columns(comb: int, M: int, eps: Any, sums: Any) -> None:
    for j in range(M):
        sums[j] = f32(0)
    for i in range(M):
        row = floats(comb, i * M, M)
        for j in range(M):
            sums[j] += row[j]
    for j in range(M):
        sums[j] += eps
    for i in range(M):
        row = floats(comb, i * M, M)
        for j in range(M):
            row[j] /= sums[j]


@plain
def _rows(comb: int, M: int, eps: Any) -> None:
    for i in range(M):
        row = floats(comb, i * M, M)
        total = f32(0)
        for j in range(M):
            total += row[j]
        total += eps
        for j in range(M):
            row[j] /= total


@kernel("void(int64, int64, int64, int64, int64, int64, int64, int64, int64, float32)")
def mix_logits(out: int, raw: int, streams: int, scale: int, base: int, num: int, M: int, D: int, lanes: int,
               eps: float) -> None:  # fmt: skip
    """The arguments of `HyperConnection`'s exponentials: the gates' logits [N, 2M], negated, and the mixing logits
    minus their row's largest [N, M * M]. raw [N, J]: streams times `fn`. scale [J], base [J].
    """
    J, width = (2 + M) * M, M * D
    scale_, base_ = floats(scale, 0, J), floats(base, 0, J)
    work = scratch(lanes)
    for n in range(num):
        factor = _inverse_root(row_sum(streams + 4 * n * width, width, True, lanes, work), width, f32(eps))
        given, made = floats(raw, n * J, J), floats(out, n * J, J)
        for j in range(J):
            made[j] = given[j] * factor * scale_[j] + base_[j]
        for j in range(2 * M):
            made[j] = -made[j]
        for m in range(M):
            row = floats(out, n * J + (2 + m) * M, M)
            top = row[0]
            for j in range(1, M):
                top = max(top, row[j])
            for j in range(M):
                row[j] -= top


@kernel("void(int64, int64, int64, int64, int64, int64, int64, int64, int64, float32)")
def mix_gates(x: int, post: int, comb: int, powers: int, streams: int, num: int, M: int, D: int, iters: int,
              eps: float) -> None:  # fmt: skip
    """From exponentials [N, J], compute the block's input x [N, D], post [N, M] and comb [N, M, M] (`mhc.sinkhorn`)."""
    J = (2 + M) * M
    pre, sums, least = np.empty(M, np.float32), np.empty(M, np.float32), f32(eps)
    for n in range(num):
        e, spread = floats(powers, n * J, 2 * M), floats(post, n * M, M)
        for m in range(M):
            pre[m] = f32(1) / (e[m] + f32(1)) + least
            spread[m] = f32(2) * (f32(1) / (e[M + m] + f32(1)))
        for i in range(M):
            row, cells = floats(powers, n * J + (2 + i) * M, M), floats(comb, n * M * M + i * M, M)
            total = f32(0)
            for j in range(M):
                total += row[j]
            for j in range(M):
                cells[j] = row[j] / total + least
        for turn_number in range(2 * iters - 1):
            if turn_number % 2 == 0:
                _columns(comb + 4 * n * M * M, M, least, sums)
            else:
                _rows(comb + 4 * n * M * M, M, least)
        made = floats(x, n * D, D)
        stream = floats(streams, n * M * D, D)
        for d in range(D):
            made[d] = pre[0] * stream[d]
        for m in range(1, M):
            weight, stream = pre[m], floats(streams, (n * M + m) * D, D)
            for d in range(D):
                made[d] = fma(weight, stream[d], made[d])


@kernel("void(int64, int64, int64, int64, int64, int64, int64, int64)")
def expand(out: int, streams: int, output: int, post: int, comb: int, num: int, M: int, D: int) -> None:
    """`mhc.expand`: streams [N, M, D] mixed over comb's first axis, plus output [N, D] spread by post."""
    for n in range(num):
        weights, spread, added = floats(comb, n * M * M, M * M), floats(post, n * M, M), floats(output, n * D, D)
        for m in range(M):
            made, stream = floats(out, (n * M + m) * D, D), floats(streams, n * M * D, D)
            weight = weights[m]
            for d in range(D):
                made[d] = weight * stream[d]
            for k in range(1, M):
                weight, stream = weights[k * M + m], floats(streams, (n * M + k) * D, D)
                for d in range(D):
                    made[d] = fma(weight, stream[d], made[d])
            weight = spread[m]
            for d in range(D):
                made[d] += weight * added[d]


@kernel("void(int64, int64, int64, int64, int64, int64, int64, int64, int64, int64, int64, float32, float32)")
def norm_rotate(out: int, x: int, weight: int, cos: int, sin: int, num: int, heads: int, size: int, stride: int,
                rope: int, lanes: int, eps: float, scale: float) -> None:  # fmt: skip
    """`norms_rope.norm_rotate` of x [N, stride], whose rows begin with H heads of C channels: [N, H, C]. weight [C],
    or 0 for no weight; cos, sin [N, R / 2]; rope 0 for no rotation; scale 1 for no scaling.
    """
    half, weights = rope // 2, floats(weight, 0, size)
    work, factor_of_all = scratch(lanes), f32(scale)
    for n in range(num):
        for h in range(heads):
            at, to = n * stride + h * size, (n * heads + h) * size
            factor = _inverse_root(row_sum(x + 4 * at, size, True, lanes, work), size, f32(eps))
            given, made = floats(x, at, size), floats(out, to, size)
            if weight:
                for c in range(size):
                    made[c] = weights[c] * (given[c] * factor)
            else:
                for c in range(size):
                    made[c] = given[c] * factor
            if rope:
                angle = n * half
                turn(floats(out, to + size - rope, rope), floats(cos, angle, half), floats(sin, angle, half), f32(1))
            if factor_of_all != f32(1):
                for c in range(size):
                    made[c] *= factor_of_all


@kernel("void(int64, int64, int64, int64, int64, int64, int64, int64, int64, int64, float32)")
def rotate(out: int, x: int, cos: int, sin: int, num: int, heads: int, size: int, stride: int, rope: int, groups: int,
           sign: float) -> None:  # fmt: skip
    """Rotate x [N, stride], whose rows begin with H heads of C channels, by the angle times `sign`. The result of the
    rotation has the shape [G, N, H / G, C].
    """
    half, each = rope // 2, heads // groups
    for n in range(num):
        for h in range(heads):
            to = ((h // each * num + n) * each + h % each) * size
            given, made = floats(x, n * stride + h * size, size), floats(out, to, size)
            for c in range(size):
                made[c] = given[c]
            angle = n * half
            turn(floats(out, to + size - rope, rope), floats(cos, angle, half), floats(sin, angle, half), f32(sign))
