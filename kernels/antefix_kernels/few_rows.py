"""Products of at most 16 rows: the weight is the tensor cores' left side, so that no multiplications are wasted on 48
missing rows, and each program loads little but its weight.

The sums have the order of `linear`'s, so the bits are the same: a sum is a chain over the addends in steps of 16, in
either operand order. On an H200 the bits were equal in all of V4-Flash's products, and
benchmarks/decode_on_card.py compares them again.

Shapes:  as in linear.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from antefix_kernels import chained
from antefix_kernels.chained import follow
from antefix_kernels.finish import store_output

ROWS_MAX = 16
# Outputs, addends, warps and stages of a tile: the fastest on an H200 for products of one row of V4-Flash's weights.
_TILE = (64, 128, 4, 8)


@triton.jit(do_not_specialize=["num_rows"])
def _few_rows_kernel(x, weights, out, experts, firsts, stops, sources, num_rows, num_outputs, num_addends, num_experts,
                     stride_xn, stride_xg, stride_wg, stride_wo, stride_on, stride_og, ROUTED: tl.constexpr,
                     GATHERED: tl.constexpr, PICKED: tl.constexpr, EVEN: tl.constexpr, WIDEN: tl.constexpr,
                     N: tl.constexpr, M: tl.constexpr, K: tl.constexpr, STAGES: tl.constexpr,
                     CHAINED: tl.constexpr = 0):  # fmt: skip
    """One tile [N outputs, M rows] of a group's or an expert's weight times its rows."""
    follow(CHAINED)
    if ROUTED:
        group = tl.load(experts + tl.program_id(1))
        first = tl.load(firsts + tl.program_id(1))
        stop = tl.load(stops + tl.program_id(1))
    else:
        group = tl.program_id(1)
        first = 0
        stop = num_rows
    if group < num_experts:
        m = first + tl.arange(0, M)
        has_row = m < stop
        source = tl.minimum(m, stop - 1)
        if GATHERED:
            source = (tl.load(sources + source) // PICKED).to(tl.int32)
        o = tl.program_id(0) * N + tl.arange(0, N)
        k = tl.arange(0, K)
        # Outputs past the end repeat the last one and are not stored; missing rows are zeros.
        outputs = tl.minimum(o, num_outputs - 1)
        at_x = x + source.to(tl.int64)[None, :] * stride_xn + (0 if ROUTED else group * stride_xg) + k[:, None]
        at_w = weights + group.to(tl.int64) * stride_wg + outputs.to(tl.int64)[:, None] * stride_wo + k[None, :]
        acc = tl.zeros((N, M), tl.float32)
        for step in tl.range(0, tl.cdiv(num_addends, K), num_stages=STAGES):
            left = num_addends - step * K
            if EVEN:
                a = tl.load(at_x, has_row[None, :], other=0.0)
                w = tl.load(at_w)
            else:
                a = tl.load(at_x, has_row[None, :] & (k < left)[:, None], other=0.0)
                w = tl.load(at_w, (k < left)[None, :], other=0.0)
            if WIDEN:
                a, w = a.to(tl.float32), w.to(tl.float32)
            acc = tl.dot(w, a, acc)
            at_x += K
            at_w += K
        at = m.to(tl.int64)[None, :] * stride_on + (0 if ROUTED else group * stride_og)
        store_output(out, at + o[:, None], acc, has_row[None, :] & (o < num_outputs)[:, None])


def launch(x: torch.Tensor, weights: torch.Tensor, out: torch.Tensor, routing: Any | None, *, gathered: bool) -> None:
    """As `linear._launch`, for bfloat16 operands that it has checked. No group or expert has over ROWS_MAX rows."""
    num_groups, num_outputs, num_addends = weights.shape
    n, k, warps, stages = _TILE
    empty = x if routing is None else routing.order
    _few_rows_kernel[(triton.cdiv(num_outputs, n), num_groups if routing is None else len(routing.experts))](
        x,
        weights,
        out,
        empty if routing is None else routing.experts,
        empty if routing is None else routing.firsts,
        empty if routing is None else routing.stops,
        empty,
        out.shape[0],
        num_outputs,
        num_addends,
        num_groups,
        x.stride(0),
        x.stride(1),
        weights.stride(0),
        weights.stride(1),
        out.stride(0),
        out.stride(1),
        ROUTED=routing is not None,
        GATHERED=gathered,
        PICKED=routing.num_picked if routing else 1,
        EVEN=num_addends % k == 0,
        # On a CPU this is the interpreter, whose dot takes BF16's bits for integers.
        WIDEN=x.device.type == "cpu",
        N=n,
        M=ROWS_MAX,
        K=k,
        STAGES=stages,
        num_warps=warps,
        enable_fp_fusion=False,
        **chained.options(x),
    )
