"""Merges the partial results of one query's attention that several programs computed, each over a part of the list.

Shapes:  T queries, S parts, H heads, D = nope + rope dims; part_out [T, S, H, D] float32, each part normed by itself;
         part_lse [T, S, H] float32, log2 of the sum of its weights, -inf of a part that saw nothing.
"""

# mypy: disable-error-code="assignment"
# (device code grows tensors in loops)
from __future__ import annotations

import torch
import triton
import triton.language as tl

from antefix_kernels import chained
from antefix_kernels.chained import follow
from antefix_kernels.finish import store_output
from antefix_kernels.operands import Heads

# Parts loaded at once where there are no more, or more of them; measured best, as are a head and 4 warps a program.
_PARTS = (4, 8)


@triton.jit
def _merge_kernel(part_out, part_lse, sinks, cos, sin, out, heads, splits, stride_ot, stride_oh, DIM: tl.constexpr,
                  ROPE: tl.constexpr, D: tl.constexpr, H: tl.constexpr, PARTS: tl.constexpr,
                  CHAINED: tl.constexpr = 0):  # fmt: skip
    """Merge the parts of H heads of one query, PARTS at a time, add the sink, rotate back, write BF16."""
    follow(CHAINED)
    t = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * H + tl.arange(0, H)
    live = h < heads
    d = tl.arange(0, D)
    sink = tl.load(sinks + h, live, other=0.0) * 1.4426950408889634
    top = sink
    total = tl.full((H,), 1.0, tl.float32)
    acc = tl.zeros((H, D), tl.float32)
    for start in range(0, splits, PARTS):
        part = start + tl.arange(0, PARTS)
        at = (t * splits + part)[:, None] * heads + h[None, :]
        seen = (part < splits)[:, None] & live[None, :]
        lse = tl.load(part_lse + at, seen, other=float("-inf"))
        x = tl.load(part_out + at[:, :, None] * DIM + d, seen[:, :, None] & (d < DIM)[None, None, :], other=0.0)
        new = tl.maximum(top, tl.max(lse, 0))
        shrink, share = tl.exp2(top - new), tl.exp2(lse - new[None, :])
        total = total * shrink + tl.sum(share, 0)
        acc = acc * shrink[:, None] + tl.sum(x * share[:, :, None], 0)
        top = new
    acc = acc / total[:, None]
    even, odd = tl.split(tl.reshape(acc, (H, D // 2, 2)))
    pair = tl.arange(0, D // 2) - (DIM - ROPE) // 2
    turned = (pair >= 0) & (pair < ROPE // 2)
    c = tl.load(cos + t * (ROPE // 2) + pair, turned, other=1.0)[None, :]
    s = tl.load(sin + t * (ROPE // 2) + pair, turned, other=0.0)[None, :]
    acc = tl.reshape(tl.join(even * c + odd * s, odd * c - even * s), (H, D))
    at = t * stride_ot + h[:, None] * stride_oh + d[None, :]
    store_output(out, at, acc, live[:, None] & (d < DIM)[None, :])


def merge_parts(part_out: torch.Tensor, part_lse: torch.Tensor, heads: Heads, out: torch.Tensor) -> None:
    """Weigh the partial results by their sums, add the sink, rotate back: out [T, H, D] bfloat16 or float32, all of it
    written.
    """
    num_queries, splits, num_heads, dim = part_out.shape
    _merge_kernel[(num_queries, num_heads)](
        part_out,
        part_lse,
        heads.sinks,
        heads.cos,
        heads.sin,
        out,
        num_heads,
        splits,
        out.stride(0),
        out.stride(1),
        DIM=dim,
        ROPE=2 * heads.cos.shape[1],
        D=triton.next_power_of_2(dim),
        H=1,
        PARTS=_PARTS[0] if splits <= _PARTS[0] else _PARTS[1],
        num_warps=4,
        **chained.options(part_out),
    )
