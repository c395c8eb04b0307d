"""Computations of a layer for each token alone, except products: norms, rotations, mixing of residual streams,
experts' activations and their sum. Each row is computed by one program (or in a fixed tile), so that its bits do not
depend on other rows.

Shapes:  N = tokens, H = heads (1 where there are none), C = columns of a row, R = RoPE dims, M = streams,
         D = hidden size, J = (2 + M) * M mixing logits, P = picked experts, I = inner size.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from antefix_kernels import chained
from antefix_kernels.chained import follow
from antefix_kernels.finish import store_output
from antefix_kernels.number_formats import check
from antefix_kernels.rounding import bf16_bits

# How many elements one program handles.
_ELEMENTS = 4096
_COLUMNS = 1024
# Tokens of a program that mixes, and addends of a step: 16 is the least that a product has.
_MIX_TOKENS, _MIX_STEP = 16, 64
# Addends of one program. One program for all of V4's 16,384 addends took 185 us on an H200 in a decode step.
_MIX_ADDENDS = 512
# Tokens of a program that adds up parts.
_MIX_SUM_TOKENS = 4
_GATE_TOKENS = 32
# Up to so many tokens, one program per token mixes and another one iterates.
_MIX_APART_TOKENS = 64


@triton.jit(do_not_specialize=["num_rows"])
def _norm_turn_kernel(x, weight, cos, sin, out, num_rows, heads, eps, scale, stride_n, stride_h, C: tl.constexpr,
                      COLUMNS: tl.constexpr, ROPE: tl.constexpr, NORM: tl.constexpr, WEIGHT: tl.constexpr,
                      BACK: tl.constexpr, HALVES: tl.constexpr, ROWS: tl.constexpr,
                      CHAINED: tl.constexpr = 0):  # fmt: skip
    """Scale ROWS rows, after their norm if NORM. Their last ROPE dims are rotated by RoPE, or rotated back if BACK."""
    follow(CHAINED)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token, head = rows // heads, rows % heads
    c = tl.arange(0, COLUMNS)
    live = (rows < num_rows)[:, None] & (c < C)[None, :]
    start = token.to(tl.int64) * stride_n + head.to(tl.int64) * stride_h
    v = tl.load(x + start[:, None] + c[None, :], live, other=0.0).to(tl.float32)
    if NORM:
        v = v * tl.rsqrt(tl.sum(v * v, 1) / C + eps)[:, None]
        if WEIGHT:
            v = v * tl.load(weight + c, c < C, other=0.0).to(tl.float32)[None, :]
    if ROPE:
        even, odd = tl.split(tl.reshape(v, (ROWS, COLUMNS // 2, 2)))
        pair = tl.arange(0, COLUMNS // 2) - (C - ROPE) // 2
        turned = (rows < num_rows)[:, None] & ((pair >= 0) & (pair < ROPE // 2))[None, :]
        at = token[:, None] * (ROPE // 2) + pair[None, :]
        a = tl.load(cos + at, turned, other=1.0)
        b = tl.load(sin + at, turned, other=0.0)
        if BACK:
            b = -b
        v = tl.reshape(tl.join(tl.fma(even, a, -(odd * b)), tl.fma(odd, a, even * b)), (ROWS, COLUMNS))
    at = rows.to(tl.int64)[:, None] * C + c[None, :]
    if HALVES:
        v = v * scale
        if x.dtype.element_ty == tl.bfloat16:
            v = (bf16_bits(v).to(tl.int32) << 16).to(tl.float32, bitcast=True)
        tl.store(out + at, v.to(tl.float16), live)
    else:
        store_output(out, at, v * scale, live)


@triton.jit(do_not_specialize=["num_tokens"])
def _mixing_kernel(streams, fn, parts, squares, num_tokens, width, J: tl.constexpr, J_PAD: tl.constexpr,
                   T: tl.constexpr, K: tl.constexpr, ADDENDS: tl.constexpr, CHAINED: tl.constexpr = 0):  # fmt: skip
    """T tokens' streams times fn, and their squares' sum, over one part of the addends."""
    follow(CHAINED)
    t = tl.program_id(0) * T + tl.arange(0, T)
    j = tl.arange(0, J_PAD)
    k = tl.arange(0, K)
    part = tl.program_id(1)
    total = tl.zeros((T, K), tl.float32)
    acc = tl.zeros((T, J_PAD), tl.float32)
    row = streams + tl.minimum(t, num_tokens - 1).to(tl.int64)[:, None] * width
    for start in tl.range(part * ADDENDS, part * ADDENDS + ADDENDS, K, num_stages=3):
        inside = start + k < width
        x = tl.load(row + start + k[None, :], inside[None, :], other=0.0).to(tl.float32)
        f = tl.load(fn + j[None, :] * width + start + k[:, None], inside[:, None] & (j < J)[None, :], other=0.0)
        acc = tl.dot(x, f.to(tl.float32), acc, input_precision="tf32x3")
        total += x * x
    live = t < num_tokens
    at = part.to(tl.int64) * num_tokens + t
    tl.store(parts + at[:, None] * J + j[None, :], acc, live[:, None] & (j < J)[None, :])
    tl.store(squares + at, tl.sum(total, 1), live)


@triton.jit(do_not_specialize=["num_tokens"])
def _mixing_sum_kernel(parts, squares, logits, num_tokens, width, eps, J: tl.constexpr, J_PAD: tl.constexpr,
                       T: tl.constexpr, PARTS: tl.constexpr):  # fmt: skip
    """T tokens' parts added up in order, over the root of their mean square."""
    t = tl.program_id(0) * T + tl.arange(0, T)
    j = tl.arange(0, J_PAD)
    live = t < num_tokens
    mask = live[:, None] & (j < J)[None, :]
    acc = tl.zeros((T, J_PAD), tl.float32)
    total = tl.zeros((T,), tl.float32)
    for part in tl.static_range(PARTS):
        at = part * num_tokens + t
        acc += tl.load(parts + at[:, None] * J + j[None, :], mask, other=0.0)
        total += tl.load(squares + at, live, other=0.0)
    tl.store(logits + t[:, None] * J + j[None, :], acc * tl.rsqrt(total / width + eps)[:, None], mask)


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit(do_not_specialize=["num_tokens"])
def _gates_kernel(logits, base, scale, pre, post, comb, num_tokens, eps, iterations, M: tl.constexpr,
                  M_PAD: tl.constexpr, T: tl.constexpr):  # fmt: skip
    """Collapse weights, expand weights and the doubly stochastic mixing matrix of T tokens."""
    t = tl.program_id(0) * T + tl.arange(0, T)
    m = tl.arange(0, M_PAD)
    J: tl.constexpr = (2 + M) * M
    live = (t < num_tokens)[:, None] & (m < M)[None, :]
    at = t[:, None] * J + m[None, :]
    x = tl.load(logits + at, live, other=0.0) * tl.load(scale) + tl.load(base + m, m < M, other=0.0)[None, :]
    tl.store(pre + t[:, None] * M + m[None, :], _sigmoid(x) + eps, live)
    x = tl.load(logits + at + M, live, other=0.0) * tl.load(scale + 1)
    x += tl.load(base + M + m, m < M, other=0.0)[None, :]
    tl.store(post + t[:, None] * M + m[None, :], 2.0 * _sigmoid(x), live)
    row, column = m[None, :, None], m[None, None, :]
    inside = (row < M) & (column < M)
    live_3 = (t < num_tokens)[:, None, None] & inside
    cell = row * M + column
    y = tl.load(logits + t[:, None, None] * J + 2 * M + cell, live_3, other=0.0) * tl.load(scale + 2)
    y = tl.where(inside, y + tl.load(base + 2 * M + cell, inside, other=0.0), float("-inf"))
    top = tl.max(y, 2)[:, :, None]
    y = tl.where(inside, tl.exp(y - tl.where(top == float("-inf"), 0.0, top)), 0.0)
    total = tl.sum(y, 2)[:, :, None]
    y = tl.where(inside, y / tl.where(total > 0.0, total, 1.0) + eps, 0.0)
    y = y / (tl.sum(y, 1)[:, None, :] + eps)
    for _ in range(iterations - 1):
        y = y / (tl.sum(y, 2)[:, :, None] + eps)
        y = y / (tl.sum(y, 1)[:, None, :] + eps)
    tl.store(comb + t[:, None, None] * (M * M) + cell, y, live_3)


@triton.jit
def _added(parts, at, stride, mask, PARTS: tl.constexpr):
    """Parts of a sum at `at`, added up in order."""
    total = tl.zeros(at.shape, tl.float32)
    for part in tl.static_range(PARTS):
        total += tl.load(parts + part * stride + at, mask, other=0.0)
    return total


@triton.jit(do_not_specialize=["num_tokens"])
def _mixed_kernel(streams, parts, squares, base, scale, weight, out, post, comb, num_tokens, width, eps, norm_eps,
                  out_eps, iterations, M: tl.constexpr, M_PAD: tl.constexpr, PARTS: tl.constexpr,
                  COLUMNS: tl.constexpr, NORM: tl.constexpr, APART: tl.constexpr,
                  CHAINED: tl.constexpr = 0):  # fmt: skip
    """One token: logits from their parts, gates, the streams' weighted sum, and if NORM the norm of that sum.

    APART: one program computes the gates of the block's output, and another one the block's input.
    """
    follow(CHAINED)
    n = tl.program_id(0).to(tl.int64)
    J: tl.constexpr = (2 + M) * M
    m = tl.arange(0, M_PAD)
    one = m < M
    squared = 0.0
    for part in tl.static_range(PARTS):
        squared += tl.load(squares + part * num_tokens + n)
    factor = tl.rsqrt(squared / (M * width) + norm_eps)
    at, stride = n * J, num_tokens.to(tl.int64) * J
    if tl.program_id(1) == 0:
        row, column = m[:, None], m[None, :]
        inside = (row < M) & (column < M)
        cell = row * M + column
        b = _added(parts, at + M + m, stride, one, PARTS) * factor
        y = _added(parts, at + 2 * M + cell, stride, inside, PARTS) * factor
        b = b * tl.load(scale + 1) + tl.load(base + M + m, one, other=0.0)
        tl.store(post + n * M + m, 2.0 * _sigmoid(b), one)
        y = y * tl.load(scale + 2)
        y = tl.where(inside, y + tl.load(base + 2 * M + cell, inside, other=0.0), float("-inf"))
        top = tl.max(y, 1)[:, None]
        y = tl.where(inside, tl.exp(y - tl.where(top == float("-inf"), 0.0, top)), 0.0)
        total = tl.sum(y, 1)[:, None]
        y = tl.where(inside, y / tl.where(total > 0.0, total, 1.0) + eps, 0.0)
        y = y / (tl.sum(y, 0)[None, :] + eps)
        for _ in range(iterations - 1):
            y = y / (tl.sum(y, 1)[:, None] + eps)
            y = y / (tl.sum(y, 0)[None, :] + eps)
        tl.store(comb + n * (M * M) + cell, y, inside)
    if (tl.program_id(1) == 1) | (APART == 0):
        a = _added(parts, at + m, stride, one, PARTS) * factor
        pre = _sigmoid(a * tl.load(scale) + tl.load(base + m, one, other=0.0)) + eps
        d = tl.arange(0, COLUMNS)
        used = d < width
        acc = tl.zeros((COLUMNS,), tl.float32)
        for i in tl.static_range(M):
            x = tl.load(streams + (n * M + i) * width + d, used, other=0.0).to(tl.float32)
            # Exact: all other addends are zero.
            acc = tl.fma(x, tl.sum(tl.where(m == i, pre, 0.0), 0), acc)
        if NORM:
            if out.dtype.element_ty == tl.bfloat16:
                acc = (bf16_bits(acc).to(tl.int32) << 16).to(tl.float32, bitcast=True)
            acc = acc * tl.rsqrt(tl.sum(acc * acc, 0) / width + out_eps)
            acc = acc * tl.load(weight + d, used, other=0.0).to(tl.float32)
        store_output(out, n * width + d, acc, used)


@triton.jit
def _collapse_kernel(streams, pre, out, width, M: tl.constexpr, COLUMNS: tl.constexpr):
    """One token's weighted sum of streams, COLUMNS of it, streams in order."""
    n = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    acc = tl.zeros((COLUMNS,), tl.float32)
    for m in tl.static_range(M):
        x = tl.load(streams + (n * M + m) * width + d, d < width, other=0.0).to(tl.float32)
        acc = tl.fma(x, tl.load(pre + n * M + m), acc)
    store_output(out, n * width + d, acc, d < width)


@triton.jit
def _expand_kernel(streams, update, post, comb, out, width, M: tl.constexpr, COLUMNS: tl.constexpr,
                   CHAINED: tl.constexpr = 0):  # fmt: skip
    """One token's new streams: the old ones mixed over comb's first axis, plus the update."""
    follow(CHAINED)
    n = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    added = tl.load(update + n * width + d, d < width, other=0.0).to(tl.float32)
    for j in tl.static_range(M):
        acc = tl.load(post + n * M + j) * added
        for i in tl.static_range(M):
            x = tl.load(streams + (n * M + i) * width + d, d < width, other=0.0).to(tl.float32)
            acc = tl.fma(x, tl.load(comb + (n * M + i) * M + j), acc)
        store_output(out, (n * M + j) * width + d, acc, d < width)


@triton.jit
def _swiglu_kernel(gate_up, out, inner, limit, COLUMNS: tl.constexpr, CHAINED: tl.constexpr = 0):  # fmt: skip
    follow(CHAINED)
    n = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    gate = tl.load(gate_up + n * 2 * inner + i, i < inner, other=0.0).to(tl.float32)
    up = tl.load(gate_up + n * 2 * inner + inner + i, i < inner, other=0.0).to(tl.float32)
    gate = tl.minimum(gate, limit)
    up = tl.minimum(tl.maximum(up, -limit), limit)
    store_output(out, n * inner + i, gate * _sigmoid(gate) * up, i < inner)


@triton.jit
def _combine_kernel(rows, place, weights, shared, out, width, P: tl.constexpr, COLUMNS: tl.constexpr,
                    CHAINED: tl.constexpr = 0):  # fmt: skip
    """One token's experts' outputs, weighted and added up in the order of its picks, plus the shared expert's."""
    follow(CHAINED)
    n = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    acc = tl.load(shared + n * width + d, d < width, other=0.0).to(tl.float32)
    for p in tl.static_range(P):
        row = tl.load(place + n * P + p)
        x = tl.load(rows + row * width + d, d < width, other=0.0).to(tl.float32)
        acc = tl.fma(x, tl.load(weights + n * P + p).to(tl.float32), acc)
    store_output(out, n * width + d, acc, d < width)


def norm_turn(
    x: torch.Tensor,
    *,
    weight: torch.Tensor | None = None,
    eps: float | None = None,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    scale: float = 1.0,
    back: bool = False,
    halves: bool = False,
) -> torch.Tensor:
    """RMS-norm rows if eps is given, rotate their last R dims by each token's angles if cos and sin are, and scale.

    back: rotate the other way, by -sin.  halves: round to x's type, then to float16, and return that.

    Shapes:  x [N, H, C] float32 or bfloat16, last dim contiguous; weight [C]; cos, sin [N, R / 2] float32.
             Returns [N, H, C], contiguous, of x's type.
    Raises:  ValueError: wrong dtype, shape or stride.
    """
    num_tokens, heads, columns = x.shape
    check(x.stride(2) == 1 and x.dtype in (torch.bfloat16, torch.float32), "x: float32 or bfloat16, contiguous rows")
    out = torch.empty(x.shape, dtype=torch.float16 if halves else x.dtype, device=x.device)
    if cos is not None and sin is not None:
        for table in (cos, sin):
            check(table.shape == (num_tokens, cos.shape[1]) and table.dtype is torch.float32, "cos, sin: [N, R / 2]")
            check(table.is_contiguous(), "cos and sin must be contiguous")
    if not x.numel():
        return out
    padded = max(2, triton.next_power_of_2(columns))
    rows = max(1, _ELEMENTS // padded // 4)
    _norm_turn_kernel[(triton.cdiv(num_tokens * heads, rows),)](
        x,
        x if weight is None else weight,
        x if cos is None else cos,
        x if sin is None else sin,
        out,
        num_tokens * heads,
        heads,
        0.0 if eps is None else eps,
        scale,
        x.stride(0),
        x.stride(1),
        C=columns,
        COLUMNS=padded,
        ROPE=0 if cos is None else 2 * cos.shape[1],
        NORM=eps is not None,
        WEIGHT=weight is not None,
        BACK=back,
        HALVES=halves,
        ROWS=rows,
        num_warps=4 if padded > 1024 else 2,
        enable_fp_fusion=False,
        **chained.options(x),
    )
    return out


def mixing_logits(streams: torch.Tensor, fn: torch.Tensor, eps: float) -> torch.Tensor:
    """RMS-normed streams times fn.

    Shapes:  streams [N, M, D] contiguous, float32 or bfloat16; fn [J, M * D] contiguous. Returns [N, J] float32.
    Raises:  ValueError: wrong shape or stride.
    """
    num_tokens, num_logits = len(streams), len(fn)
    logits = torch.empty(num_tokens, num_logits, dtype=torch.float32, device=streams.device)
    if not num_tokens:
        return logits
    parts, squares = _mixing_parts(streams, fn)
    _mixing_sum_kernel[(triton.cdiv(num_tokens, _MIX_SUM_TOKENS),)](
        parts,
        squares,
        logits,
        num_tokens,
        streams.shape[1] * streams.shape[2],
        eps,
        J=num_logits,
        J_PAD=max(16, triton.next_power_of_2(num_logits)),
        T=_MIX_SUM_TOKENS,
        PARTS=len(parts),
        num_warps=4,
        enable_fp_fusion=False,
    )
    return logits


def _mixing_parts(streams: torch.Tensor, fn: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Parts of the logits [S, N, J] and of the sum of squares [S, N]."""
    width = streams.shape[1] * streams.shape[2]
    check(streams.is_contiguous() and fn.is_contiguous(), "streams and fn must be contiguous")
    check(fn.dim() == 2 and fn.shape[1] == width, f"fn must be [J, {width}]")
    num_tokens, num_logits = len(streams), len(fn)
    # The weight alone decides how a sum is split, so a token's bits do not depend on the number of tokens.
    num_parts = triton.cdiv(width, _MIX_ADDENDS)
    parts = torch.empty(num_parts, num_tokens, num_logits, dtype=torch.float32, device=streams.device)
    squares = torch.empty(num_parts, num_tokens, dtype=torch.float32, device=streams.device)
    _mixing_kernel[(triton.cdiv(num_tokens, _MIX_TOKENS), num_parts)](
        streams,
        fn,
        parts,
        squares,
        num_tokens,
        width,
        J=num_logits,
        J_PAD=max(16, triton.next_power_of_2(num_logits)),
        T=_MIX_TOKENS,
        K=_MIX_STEP,
        ADDENDS=_MIX_ADDENDS,
        num_warps=4,
        enable_fp_fusion=False,
        **chained.options(streams),
    )
    return parts, squares


def mixed(
    streams: torch.Tensor,
    fn: torch.Tensor,
    base: torch.Tensor,
    scale: torch.Tensor,
    *,
    iterations: int,
    eps: float,
    norm_eps: float,
    norm: tuple[torch.Tensor, float] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A block's input, and the gates of its output: `mixing_logits`, `mixing_gates` and `collapse` in two launches.

    Shapes:  streams [N, M, D] contiguous, float32 or bfloat16; fn [J, M * D], base [J], scale [3].
             norm: weight [D] and eps of an RMS norm of the block's input; None: no norm.
             Returns the input [N, D] of streams' type, post [N, M] and comb [N, M, M] float32.
    Raises:  ValueError: wrong shape or stride.
    """
    num_tokens, num_streams, width = streams.shape
    num_logits = (2 + num_streams) * num_streams
    check(len(fn) == len(base) == num_logits and len(scale) == 3, "fn and base must have (2 + M) * M rows, scale 3")
    out = torch.empty(num_tokens, width, dtype=streams.dtype, device=streams.device)
    post = torch.empty(num_tokens, num_streams, device=streams.device)
    comb = torch.empty(num_tokens, num_streams, num_streams, device=streams.device)
    if not num_tokens:
        return out, post, comb
    parts, squares = _mixing_parts(streams, fn)
    columns = triton.next_power_of_2(width)
    # Few tokens leave most of a GPU idle, and the iterations take as long as the rest.
    apart = num_tokens <= _MIX_APART_TOKENS
    _mixed_kernel[(num_tokens, 2 if apart else 1)](
        streams,
        parts,
        squares,
        base.float(),
        scale.float(),
        streams if norm is None else norm[0],
        out,
        post,
        comb,
        num_tokens,
        width,
        eps,
        norm_eps,
        0.0 if norm is None else norm[1],
        iterations,
        M=num_streams,
        M_PAD=triton.next_power_of_2(num_streams),
        PARTS=len(parts),
        COLUMNS=columns,
        NORM=norm is not None,
        APART=apart,
        num_warps=8 if columns >= 4096 else 4,
        enable_fp_fusion=False,
        **chained.options(streams),
    )
    return out, post, comb


def mixing_gates(
    logits: torch.Tensor, base: torch.Tensor, scale: torch.Tensor, num_streams: int, iterations: int, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gates of a mixing, and Sinkhorn's iterations, of logits [N, J] float32.

    Returns pre [N, M], post [N, M] and comb [N, M, M], float32.
    Raises:  ValueError: wrong shape or dtype.
    """
    num_tokens = len(logits)
    check(logits.shape[1] == (2 + num_streams) * num_streams == len(base), "logits and base must have (2 + M) * M")
    check(logits.is_contiguous() and logits.dtype is torch.float32 and len(scale) == 3, "logits: contiguous float32")
    pre, post = (torch.empty(num_tokens, num_streams, device=logits.device) for _ in range(2))
    comb = torch.empty(num_tokens, num_streams, num_streams, device=logits.device)
    if num_tokens:
        _gates_kernel[(triton.cdiv(num_tokens, _GATE_TOKENS),)](
            logits,
            base.float(),
            scale.float(),
            pre,
            post,
            comb,
            num_tokens,
            eps,
            iterations,
            M=num_streams,
            M_PAD=triton.next_power_of_2(num_streams),
            T=_GATE_TOKENS,
            num_warps=1,
            enable_fp_fusion=False,
        )
    return pre, post, comb


def collapse(streams: torch.Tensor, pre: torch.Tensor) -> torch.Tensor:
    """Weighted sum [N, D] of streams [N, M, D], weights [N, M] float32; both contiguous."""
    num_tokens, num_streams, width = streams.shape
    check(streams.is_contiguous() and pre.is_contiguous() and pre.dtype is torch.float32, "need contiguous operands")
    out = torch.empty(num_tokens, width, dtype=streams.dtype, device=streams.device)
    grid = (num_tokens, triton.cdiv(width, _COLUMNS))
    sizes = {"M": num_streams, "COLUMNS": _COLUMNS}
    _collapse_kernel[grid](streams, pre, out, width, **sizes, num_warps=4, enable_fp_fusion=False)
    return out


def expand(streams: torch.Tensor, update: torch.Tensor, post: torch.Tensor, comb: torch.Tensor) -> torch.Tensor:
    """New streams [N, M, D] from the old ones, an update [N, D], post [N, M] and comb [N, M, M] float32."""
    num_tokens, num_streams, width = streams.shape
    for tensor in (streams, update, post, comb):
        check(tensor.is_contiguous(), "need contiguous operands")
    out = torch.empty_like(streams)
    grid = (num_tokens, triton.cdiv(width, _COLUMNS))
    sizes = {"M": num_streams, "COLUMNS": _COLUMNS}
    _expand_kernel[grid](
        streams,
        update,
        post,
        comb,
        out,
        width,
        **sizes,
        **chained.options(streams),
        num_warps=4,
        enable_fp_fusion=False,
    )
    return out


def swiglu(gate_up: torch.Tensor, limit: float) -> torch.Tensor:
    """silu(gate) * up of gate_up [N, 2 I] contiguous, gate clamped from above, up on both sides: [N, I]."""
    check(gate_up.dim() == 2 and gate_up.is_contiguous(), "gate_up must be contiguous [N, 2 I]")
    num_rows, inner = len(gate_up), gate_up.shape[1] // 2
    out = torch.empty(num_rows, inner, dtype=gate_up.dtype, device=gate_up.device)
    if num_rows:
        grid = (num_rows, triton.cdiv(inner, _COLUMNS))
        _swiglu_kernel[grid](
            gate_up,
            out,
            inner,
            limit,
            COLUMNS=_COLUMNS,
            num_warps=4,
            enable_fp_fusion=False,
            **chained.options(gate_up),
        )
    return out


def combine(rows: torch.Tensor, place: torch.Tensor, weights: torch.Tensor, shared: torch.Tensor) -> torch.Tensor:
    """Each token's experts' rows, weighted and added to the shared expert's.

    Shapes:  rows [N * P, D], place [N * P] int64 (row of each (token, pick) pair), weights [N, P], shared [N, D],
             all contiguous. Returns [N, D].
    Raises:  ValueError: wrong shape or stride.
    """
    num_tokens, num_picked = weights.shape
    check(len(rows) == len(place) == num_tokens * num_picked, "rows, place and weights do not fit together")
    for tensor in (rows, place, weights, shared):
        check(tensor.is_contiguous(), "need contiguous operands")
    out = torch.empty_like(shared)
    grid = (num_tokens, triton.cdiv(shared.shape[1], _COLUMNS))
    _combine_kernel[grid](
        rows,
        place,
        weights,
        shared,
        out,
        shared.shape[1],
        P=num_picked,
        COLUMNS=_COLUMNS,
        num_warps=4,
        enable_fp_fusion=False,
        **chained.options(rows),
    )
    return out
