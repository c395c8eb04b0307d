"""Prepares index queries for index_scores: rotated (Hadamard), rounded to FP4, relative to each row's largest scale.

Shapes:  T queries, H index heads, d indexer dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from antefix_kernels import chained
from antefix_kernels.chained import follow
from antefix_kernels.number_formats import KeyFormat, check
from antefix_kernels.rounding import e2m1_code, fp4_exponent, power_of_two

# Most queries that one program rounds, and the number of programs below which each takes fewer queries.
_QUERIES_MAX = 8
_QUERY_PROGRAMS = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexQuery:
    """Rounded queries: codes [T, H, d] float16 (dims in the order of decoded keys), weights [T, H] float32."""

    codes: torch.Tensor
    weights: torch.Tensor


@triton.jit
def as_half(bits):
    return bits.to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def _rotation(DIM: tl.constexpr, LOG2_DIM: tl.constexpr):
    """The Hadamard matrix [DIM, DIM] in natural order, unscaled."""
    both = tl.arange(0, DIM)[:, None] & tl.arange(0, DIM)[None, :]
    for shift in tl.static_range(4, LOG2_DIM, 4):
        both = both ^ (both >> shift)
    # Bit n of 0x6996 is the parity of n. 0x3C00 is 1.0 in FP16.
    return as_half((((0x6996 >> (both & 15)) & 1) << 15) | 0x3C00)


@triton.jit(do_not_specialize=["num_queries"])
def _queries_kernel(q, weights, codes, out_weights, factor, num_queries, stride_t, stride_h, stride_w, HEADS,
                    DIM: tl.constexpr, LOG2_DIM: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr,
                    QUERIES: tl.constexpr, CHAINED: tl.constexpr = 0):  # fmt: skip
    """Rotate and round ROWS heads of QUERIES queries.

    The tensor cores compute the rotation in FP16. With its largest magnitude scaled to 1 .. 2, a BF16 row is exact in
    FP16 except for values that are 2^25 smaller, and a float32 row is passed as the sum of two FP16 rows.
    """
    follow(CHAINED)
    h = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    live = h < HEADS
    d = tl.arange(0, DIM)
    GROUP: tl.constexpr = 32 if DIM > 32 else DIM
    rotation = _rotation(DIM, LOG2_DIM)
    first = tl.program_id(0).to(tl.int64) * QUERIES
    for t in range(first, tl.minimum(first + QUERIES, num_queries)):
        x = tl.load(q + t * stride_t + h[:, None] * stride_h + d[None, :], live[:, None], other=0.0)
        x = x.to(tl.float32)
        size = tl.maximum((tl.max(tl.abs(x), 1).to(tl.int32, bitcast=True) >> 23) - 127, -126)
        x = x * power_of_two(-size)[:, None]
        high = x.to(tl.float16)
        turned = tl.dot(high, rotation)
        if q.dtype.element_ty == tl.float32:
            turned = tl.dot((x - high.to(tl.float32)).to(tl.float16), rotation, turned)
        groups = tl.reshape(turned * (DIM**-0.5) * power_of_two(size)[:, None], (ROWS, DIM // GROUP, GROUP))
        k = fp4_exponent(tl.max(tl.abs(groups), 2))
        top = tl.max(k, 1)
        code = e2m1_code(tl.minimum(tl.maximum(groups * power_of_two(-k)[:, :, None], -6.0), 6.0))
        half = (((code & 7) << 9) | ((code & 8) << 12)).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        # 2^14 restores the value. Scales far below the row's largest give zero instead of wrapping around.
        share = power_of_two(tl.maximum(k - top[:, None], -100) + 14)
        value = (half * share[:, :, None]).to(tl.float16)
        # In words of eight: column 8 * i + 2 * (word % 4) + j of 32 is code i + 4 * j of its word. Without words: even
        # dims first, then odd ones.
        if WORDS:
            value = tl.permute(tl.reshape(value, (ROWS, DIM // 32, 4, 2, 4)), (0, 1, 4, 2, 3))
        else:
            value = tl.permute(tl.reshape(value, (ROWS, DIM // 2, 2)), (0, 2, 1))
        at = (t * HEADS + h)[:, None] * DIM + d[None, :]
        tl.store(codes + at, tl.reshape(value, (ROWS, DIM)), live[:, None])
        w = tl.load(weights + t * stride_w + h, live, other=0.0).to(tl.float32)
        tl.store(out_weights + t * HEADS + h, w * factor * power_of_two(top), live)


def prepare_queries(q: torch.Tensor, weights: torch.Tensor, factor: float, *, as_many: bool = False) -> IndexQuery:
    """Rotate (Hadamard) and round index queries to FP4, ready for index_scores.

    Shapes:  q [T, H, d] float32 or bfloat16, RoPE applied, last dim contiguous; weights [T, H] float, last dim
             contiguous; factor multiplies every weight (V4: d^-1/2 * H^-1/2).
             as_many: round few queries by products of the same shape as many queries.
    Raises:  ValueError: wrong dtype, shape or stride.
    Source:  released inference code; oracle: reference.prepare_queries.
    """
    check(q.dim() == 3 and q.stride(2) == 1, "q must be [T, H, d], last dim contiguous")
    check(weights.shape == q.shape[:2] and weights.stride(1) == 1, "weights must be [T, H], last dim contiguous")
    check(q.dtype in (torch.float32, torch.bfloat16), f"q must be float32 or bfloat16, is {q.dtype}")
    (num_queries, heads, dim), fmt = q.shape, KeyFormat(dim=q.shape[2])
    codes = torch.empty(num_queries, heads, dim, dtype=torch.float16, device=q.device)
    out_weights = torch.empty(num_queries, heads, dtype=torch.float32, device=q.device)
    check(dim >= 16, "need an indexer dim of at least 16")
    # Few queries are spread over more programs of fewer heads.
    rows = 16 if num_queries < _QUERY_PROGRAMS and not as_many else min(64, max(16, triton.next_power_of_2(heads)))
    if num_queries:
        each = min(_QUERIES_MAX, max(1, triton.next_power_of_2(num_queries) // _QUERY_PROGRAMS))
        _queries_kernel[(triton.cdiv(num_queries, each), triton.cdiv(heads, rows))](
            q,
            weights,
            codes,
            out_weights,
            factor,
            num_queries,
            q.stride(0),
            q.stride(1),
            weights.stride(0),
            heads,
            DIM=dim,
            LOG2_DIM=dim.bit_length() - 1,
            ROWS=rows,
            WORDS=in_words(fmt),
            QUERIES=each,
            num_warps=4,
            enable_fp_fusion=False,
            **chained.options(q),
        )
    return IndexQuery(codes=codes, weights=out_weights)


def in_words(fmt: KeyFormat) -> bool:
    """Whether a key consists of whole 32-bit words, of which one holds its four scales (true for V4)."""
    return fmt.dim == 128
