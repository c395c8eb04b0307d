"""Device code of pack.py: pools groups of rows, norms and turns them, and writes them as records.

Shapes:  as in pack.py; x [1, D] a row, D the power of two that holds DIM columns.
"""

from __future__ import annotations

import triton
import triton.language as tl

from antefix_kernels.chained import follow
from antefix_kernels.finish import norm_rope, record_offsets, store_codes, store_entries, store_keys
from antefix_kernels.rounding import bf16_bits


@triton.jit
def _load_row(values, cos, sin, row, num_values, stride_n, DIM: tl.constexpr, ROPE: tl.constexpr, D: tl.constexpr,
              PAIRS: tl.constexpr, NORM: tl.constexpr):  # fmt: skip
    """A row's values, its RoPE dims once more, and their cos and sin if NORM: [1, ...] each, past the last row zeros.

    Reading the few RoPE dims twice is cheaper than rotating them among the other dims.
    """
    rows = row + tl.arange(0, 1)
    is_row = (rows < num_values)[:, None]
    start = values + rows[:, None].to(tl.int64) * stride_n
    d = tl.arange(0, D)[None, :]
    x = tl.load(start + d, is_row & (d < DIM), other=0.0)
    r = tl.arange(0, 2 * PAIRS)[None, :]
    y = tl.load(start + DIM - ROPE + r, is_row & (r < ROPE), other=0.0)
    c = y
    s = y
    if NORM:
        pair = tl.arange(0, PAIRS)[None, :]
        turned = is_row & (pair < ROPE // 2)
        at = rows[:, None] * (ROPE // 2) + pair
        c = tl.load(cos + at, turned, other=1.0)
        s = tl.load(sin + at, turned, other=0.0)
    return x, y, c, s


@triton.jit(do_not_specialize=["num_values"])
def rows_kernel(values, weight, cos, sin, eps, records, slots, num_values, stride_n, stride_p,
                ENTRIES: tl.constexpr, RECORD: tl.constexpr, ALIGN: tl.constexpr, SCALE_OFFSET: tl.constexpr,
                DIM: tl.constexpr, ROPE: tl.constexpr, D: tl.constexpr, PAIRS: tl.constexpr, NORM: tl.constexpr,
                CONVERTS: tl.constexpr, CHAINED: tl.constexpr = 0):  # fmt: skip
    """Norm (unless NORM is false), round and write values, one by one; programs (_, c) write them to copy c's slots.

    A program loads its next row before it computes, so rows come while others are rounded.
    """
    follow(CHAINED)
    NOPE: tl.constexpr = DIM - ROPE
    step = tl.num_programs(0)
    first = tl.program_id(0)
    slots += tl.program_id(1) * num_values
    d = tl.arange(0, D)[None, :]
    r = tl.arange(0, 2 * PAIRS)[None, :]
    if NORM:
        weights = tl.load(weight + d, d < DIM, other=0.0)
        rope_weights = tl.load(weight + NOPE + r, r < ROPE, other=0.0)
    next_x, next_y, next_c, next_s = _load_row(values, cos, sin, first, num_values, stride_n, DIM, ROPE, D, PAIRS, NORM)
    for row in range(first, num_values, step):
        x, y, c, s = next_x.to(tl.float32), next_y.to(tl.float32), next_c, next_s
        next_x, next_y, next_c, next_s = _load_row(
            values, cos, sin, row + step, num_values, stride_n, DIM, ROPE, D, PAIRS, NORM
        )
        slot = tl.load(slots + row + tl.arange(0, 1))
        if NORM:
            inverse = (1.0 / tl.sqrt(tl.sum(x * x, 1) / DIM + eps))[:, None]
            x = x * inverse * weights
            even, odd = tl.split(tl.reshape(y * inverse * rope_weights, (1, PAIRS, 2)))
            y = tl.reshape(tl.join(even * c - odd * s, even * s + odd * c), (1, 2 * PAIRS))
        live = slot >= 0
        base = records + record_offsets(tl.maximum(slot, 0), stride_p, ENTRIES, RECORD, ALIGN)
        store_codes(x, base, live, 1, D, NOPE, SCALE_OFFSET, RECORD, CONVERTS)
        rope = (base + NOPE).to(tl.pointer_type(tl.int16))
        tl.store(rope[:, None] + r, bf16_bits(y), live[:, None] & (r < ROPE))


@triton.jit
def overlap_kernel(kv, gate, bias, prior_rows, first_rows, overlap_kv, overlap_gate, weight, cos, sin, eps, records,
                   slots, stride_n, stride_p, M: tl.constexpr, M_PAD: tl.constexpr, DIM: tl.constexpr,
                   ROPE: tl.constexpr, D: tl.constexpr, ENTRIES: tl.constexpr, RECORD: tl.constexpr,
                   ALIGN: tl.constexpr, SCALE_OFFSET: tl.constexpr, KEYS: tl.constexpr,
                   LOG2_D: tl.constexpr, CONVERTS: tl.constexpr, CHAINED: tl.constexpr = 0):  # fmt: skip
    """Pool one CSA group with the previous group's Ca rows, then norm, round and write it; skip a negative slot."""
    follow(CHAINED)
    g = tl.program_id(0)
    if tl.load(slots + g) < 0:
        return
    r = tl.arange(0, M_PAD)[:, None]
    d = tl.arange(0, D)[None, :]
    used = (r < M) & (d < DIM)
    # This group's second series (Cb): the right half of its own rows.
    at = (tl.load(first_rows + g).to(tl.int64) + r) * stride_n + DIM + d
    cb_kv = tl.load(kv + at, used, other=0.0).to(tl.float32)
    cb_gate = tl.load(gate + at, used, other=0.0).to(tl.float32)
    cb_gate = tl.where(used, cb_gate + tl.load(bias + r * (2 * DIM) + DIM + d, used, other=0.0), float("-inf"))
    # The group before's first series (Ca): the left half of its rows, or the overlap state.
    prior = tl.load(prior_rows + g)
    if prior >= 0:
        before = (prior.to(tl.int64) + r) * stride_n + d
        ca_kv = tl.load(kv + before, used, other=0.0).to(tl.float32)
        ca_gate = tl.load(gate + before, used, other=0.0).to(tl.float32)
        ca_gate += tl.load(bias + r * (2 * DIM) + d, used, other=0.0)
    else:
        state = ((-1 - prior).to(tl.int64) * M + r) * DIM + d
        ca_kv = tl.load(overlap_kv + state, used, other=0.0)
        ca_gate = tl.load(overlap_gate + state, used, other=0.0)
    ca_gate = tl.where(used, ca_gate, float("-inf"))

    top = tl.maximum(tl.max(ca_gate, 0), tl.max(cb_gate, 0))
    # Padding columns have no row at all: keep their maximum finite, so that no NaN is made.
    top = tl.where(top == float("-inf"), 0.0, top)[None, :]
    ca, cb = tl.exp(ca_gate - top), tl.exp(cb_gate - top)
    total = tl.sum(ca, 0) + tl.sum(cb, 0)
    # A row with weight 0 must add 0, whatever values the empty overlap state holds.
    pooled = tl.sum(tl.where(ca > 0.0, ca * ca_kv, 0.0), 0) + tl.sum(cb * cb_kv, 0)
    x = (pooled / tl.where(total > 0.0, total, 1.0))[None, :]

    rows = g + tl.zeros((1,), tl.int32)
    slot = tl.load(slots + rows)
    live = slot >= 0
    x = norm_rope(x, rows, live, weight, cos, sin, eps, 1, D, DIM, ROPE)
    base = records + record_offsets(tl.maximum(slot, 0), stride_p, ENTRIES, RECORD, ALIGN)
    if KEYS:
        store_keys(x, base, live, 1, D, LOG2_D)
    else:
        store_entries(x, base, live, 1, D, DIM, ROPE, SCALE_OFFSET, RECORD, CONVERTS)


@triton.jit
def _row_order(ROWS: tl.constexpr, TOGETHER: tl.constexpr):
    """Rows in the order in which a program adds them up: of TOGETHER rows, even places take the first half.

    With this order a GPU's sums of 32 columns on 4 warps have the bits of those of 64 columns on 8 warps, which were
    slower: TOGETHER rows lie in different threads, and each thread's own rows are added first.
    """
    T: tl.constexpr = TOGETHER if TOGETHER < ROWS else ROWS
    i = tl.arange(0, ROWS)
    return i - i % T + i % T // 2 + i % 2 * (T // 2)


@triton.jit
def pool_kernel(kv, gate, bias, first_rows, slots, pooled, stride_n, M: tl.constexpr, DIM: tl.constexpr,
                C: tl.constexpr, ROWS: tl.constexpr, CHAINED: tl.constexpr = 0):  # fmt: skip
    """Softmax-gated sum of C columns of one HCA group, whose M rows are held at once; of a dropped group nothing.

    A group's programs follow one another, so that they read whole rows of memory at about the same time.
    """
    follow(CHAINED)
    g = tl.program_id(0) // tl.cdiv(DIM, C)
    columns = tl.program_id(0) % tl.cdiv(DIM, C) * C + tl.arange(0, C)
    first = tl.load(first_rows + g).to(tl.int64)
    if tl.load(slots + g) < 0:
        return
    d = columns[None, :]
    r = _row_order(ROWS, 64 // (gate.dtype.element_ty.primitive_bitwidth // 8))[:, None]
    used = (r < M) & (d < DIM)
    at = (first + r) * stride_n + d
    z = tl.load(gate + at, used, other=0.0).to(tl.float32)
    z = tl.where(used, z + tl.load(bias + r * DIM + d, used, other=0.0), float("-inf"))
    v = tl.load(kv + at, used, other=0.0).to(tl.float32)
    top = tl.max(z, 0)
    # Padding columns have no row at all: keep their maximum finite, so that no NaN is made.
    share = tl.exp(z - tl.where(top == float("-inf"), 0.0, top)[None, :])
    total = tl.sum(share, 0)
    out = tl.sum(v * share, 0) / tl.where(total > 0.0, total, 1.0)
    tl.store(pooled + g.to(tl.int64) * DIM + columns, out, columns < DIM)
