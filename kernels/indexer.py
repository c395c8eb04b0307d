"""Index scores: every query against every visible FP4 key of its sequence, read packed from the paged pool.

    score[t, n] = sum_h weight[t, h] * relu(q[t, h] . key[n])

Keys and queries are FP4 with power-of-two scales, so products are exact in FP16 once each row's largest scale is
taken out: relu is homogeneous, and the row's factor multiplies the sum (keys) or the head's weight (queries) instead.
Whatever the scales, nothing overflows, and a group 2^23 below its row's largest is all that can round away.

Shapes:  T = S * Q queries (S sequences of Q each, in order), H index heads, d indexer dim, N entries at most a
         sequence, P, E, R = blocks, keys a block, record bytes, B blocks a sequence, G scores to one maximum.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from kernels.formats import KeyFormat, byte_alignment, check, check_records
from kernels.rounding import e2m1_code, fp4_exponent, hadamard_rows, power_of_two


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexQuery:
    """Rounded queries: codes [T, H, d] float16 (dims in the order in which keys decode), weights [T, H] float32."""

    codes: torch.Tensor
    weights: torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexScores:
    """scores [T, N] float32, and maxima [T, N / group] of each `group` neighbours. Beyond a query's visible entries
    scores hold anything and maxima -inf or anything: read them with the query's length."""

    scores: torch.Tensor
    maxima: torch.Tensor
    group: int


@triton.jit
def _queries_kernel(q, weights, codes, out_weights, factor, stride_t, stride_h, stride_w, HEADS, DIM: tl.constexpr,
                    LOG2_DIM: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr):  # fmt: skip
    """Rotate and round ROWS heads of one query."""
    t = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    live = h < HEADS
    d = tl.arange(0, DIM)
    GROUP: tl.constexpr = 32 if DIM > 32 else DIM
    x = tl.load(q + t * stride_t + h[:, None] * stride_h + d[None, :], live[:, None], other=0.0).to(tl.float32)
    x = tl.reshape(hadamard_rows(x, ROWS, DIM, LOG2_DIM), (ROWS, DIM // GROUP, GROUP))
    k = fp4_exponent(tl.max(tl.abs(x), 2))
    top = tl.max(k, 1)
    code = e2m1_code(tl.minimum(tl.maximum(x * power_of_two(-k)[:, :, None], -6.0), 6.0))
    half = (((code & 7) << 9) | ((code & 8) << 12)).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    # 2^14 restores the value; far below the row's largest scale it fades to zero instead of wrapping.
    share = power_of_two(tl.maximum(k - top[:, None], -100) + 14)
    value = tl.reshape(half * share[:, :, None], (ROWS, DIM)).to(tl.float16)
    # Word order: dim 8j + e goes to 8j + place(e), where keys of word j decode to 0 4 1 5 2 6 3 7.
    e = d % 8
    place = tl.where(e < 4, e * 2, e * 2 - 7) if WORDS else e
    # Without words: even dims first, then odd ones.
    spread = (d - e + place) if WORDS else (d // 2 + (d % 2) * (DIM // 2))
    at = (t * HEADS + h.to(tl.int64))[:, None] * DIM + spread[None, :]
    tl.store(codes + at, value, live[:, None])
    w = tl.load(weights + t * stride_w + h, live, other=0.0).to(tl.float32)
    tl.store(out_weights + t * HEADS + h, w * factor * power_of_two(top), live)


@triton.jit
def _scale_shares(scale, N: tl.constexpr, GROUPS: tl.constexpr):
    """Split scales [N, GROUPS] (biased) into each row's largest and FP16 shares of it, times 2^14."""
    top = tl.max(scale, 1)
    share = power_of_two(tl.maximum(scale - top[:, None], -100) + 14).to(tl.float16)
    return power_of_two(tl.maximum(top - 127, -126)), share


@triton.jit
def _half(bits):
    return bits.to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def _decode_words(words, N: tl.constexpr, WORDS: tl.constexpr):
    """Nibbles of words [N, WORDS] int32 as FP16 [N, 8 * WORDS] times 2^-14, each word's in the order 0 4 1 5 2 6 3 7.

    A nibble s e e m is an FP16 s 0 0 0 e e m 0..: two nibbles move at once, one to each half of a word.
    """
    shifted = words >> 8
    a = ((words & 0x00070007) << 9) | ((words & 0x00080008) << 12)
    b = ((words & 0x00700070) << 5) | ((words & 0x00800080) << 8)
    c = ((shifted & 0x00070007) << 9) | ((shifted & 0x00080008) << 12)
    d = ((shifted & 0x00700070) << 5) | ((shifted & 0x00800080) << 8)
    ab = tl.join(tl.join(_half(a), _half(b)), tl.join(_half(a >> 16), _half(b >> 16)))
    cd = tl.join(tl.join(_half(c), _half(d)), tl.join(_half(c >> 16), _half(d >> 16)))
    # [N, WORDS, b or d, upper half, c or d] -> order a, a', b, b', c, c', d, d'.
    every = tl.join(ab, cd)
    return tl.reshape(tl.permute(every, (0, 1, 4, 2, 3)), (N, 8 * WORDS))


@triton.jit
def _load_keys(base, live, N: tl.constexpr, DIM: tl.constexpr, PACKED: tl.constexpr):
    """Row factors [N] float32 and values [N, DIM] FP16 of the keys at byte pointers base [N]."""
    GROUP: tl.constexpr = 32 if DIM > 32 else DIM
    GROUPS: tl.constexpr = DIM // GROUP
    g = tl.arange(0, GROUPS)
    if PACKED:
        words_at = base.to(tl.pointer_type(tl.int32))
        words = tl.load(words_at[:, None] + tl.arange(0, DIM // 8)[None, :], live[:, None], other=0)
        packed = tl.load(words_at + DIM // 8, live, other=0)
        scale = (packed[:, None] >> (8 * g)[None, :]) & 0xFF
        values = _decode_words(words, N, DIM // 8)
    else:
        b = tl.load(base[:, None] + tl.arange(0, DIM // 2)[None, :], live[:, None], other=0).to(tl.int32)
        scale = tl.load(base[:, None] + (DIM // 2 + g)[None, :], live[:, None], other=0).to(tl.int32)
        low = _half(((b & 7) << 9) | ((b & 8) << 12))
        high = _half(((b & 0x70) << 5) | ((b & 0x80) << 8))
        values = tl.reshape(tl.permute(tl.join(low, high), (0, 2, 1)), (N, DIM))
    factor, share = _scale_shares(scale, N, GROUPS)
    if PACKED:
        spread = tl.reshape(tl.broadcast_to(share[:, :, None], (N, GROUPS, GROUP)), (N, DIM))
    else:
        spread = tl.reshape(tl.broadcast_to(share[:, :, None], (N, GROUPS, GROUP // 2)), (N, DIM // 2))
        spread = tl.reshape(tl.permute(tl.join(spread, spread), (0, 2, 1)), (N, DIM))
    return factor, values * spread


@triton.jit
def _scores_kernel(codes, weights, records, block_table, lens, scores, maxima, queries, heads, stride_p, stride_b,
                   stride_s, stride_m, ENTRIES: tl.constexpr, RECORD: tl.constexpr, ALIGN: tl.constexpr,
                   DIM: tl.constexpr, H: tl.constexpr, N: tl.constexpr, Q_TILE: tl.constexpr, GROUP: tl.constexpr,
                   PACKED: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """One tile of N keys against Q_TILE queries of one sequence: keys are decoded once, queries stream past them."""
    tiles = tl.cdiv(queries, Q_TILE)
    sequence = tl.program_id(1) // tiles
    first = (tl.program_id(1) % tiles) * Q_TILE
    count = tl.minimum(queries - first, Q_TILE)
    start = tl.program_id(0) * N
    t0 = sequence * queries + first
    # Later queries of a sequence see at least as much: the last one's length bounds the tile's.
    if start < tl.load(lens + t0 + count - 1):
        n = start + tl.arange(0, N)
        seen = n < tl.load(lens + t0 + count - 1)
        block = tl.load(block_table + sequence.to(tl.int64) * stride_b + n // ENTRIES, seen, other=0).to(tl.int64)
        base = records + tl.multiple_of(block * stride_p + ((n % ENTRIES) * RECORD).to(tl.int64), ALIGN)
        factor, keys = _load_keys(base, seen, N, DIM, PACKED)
        h = tl.arange(0, H)
        d = tl.arange(0, DIM)
        for i in tl.range(0, count, num_stages=STAGES):
            t = (t0 + i).to(tl.int64)
            length = tl.load(lens + t)
            at = codes + t * heads * DIM + h[None, :] * DIM + d[:, None]
            q = tl.load(at, (h < heads)[None, :], other=0.0)
            w = tl.load(weights + t * heads + h, h < heads, other=0.0)
            s = tl.sum(tl.maximum(tl.dot(keys, q), 0.0) * w[None, :], 1) * factor
            tl.store(scores + t * stride_s + n, s, n < length)
            best = tl.max(tl.reshape(tl.where(n < length, s, float("-inf")), (N // GROUP, GROUP)), 1)
            slot = start // GROUP + tl.arange(0, N // GROUP)
            tl.store(maxima + t * stride_m + slot, best, slot * GROUP < length)


def prepare_queries(q: torch.Tensor, weights: torch.Tensor, factor: float) -> IndexQuery:
    """Rotate (Hadamard) and round index queries to FP4, ready for index_scores.

    Shapes:  q [T, H, d] float32 or bfloat16, RoPE applied, last dim contiguous; weights [T, H] float, last dim
             contiguous; factor multiplies every weight (V4: d^-1/2 * H^-1/2).
    Raises:  ValueError: wrong dtype, shape or stride.
    Source:  released inference code; oracle: reference.prepare_queries.
    """
    check(q.dim() == 3 and q.stride(2) == 1, "q must be [T, H, d], last dim contiguous")
    check(weights.shape == q.shape[:2] and weights.stride(1) == 1, "weights must be [T, H], last dim contiguous")
    check(q.dtype in (torch.float32, torch.bfloat16), f"q must be float32 or bfloat16, is {q.dtype}")
    (num_queries, heads, dim), fmt = q.shape, KeyFormat(dim=q.shape[2])
    codes = torch.empty(num_queries, heads, dim, dtype=torch.float16, device=q.device)
    out_weights = torch.empty(num_queries, heads, dtype=torch.float32, device=q.device)
    rows = min(16, triton.next_power_of_2(heads))
    if num_queries:
        _queries_kernel[(num_queries, triton.cdiv(heads, rows))](
            q,
            weights,
            codes,
            out_weights,
            factor,
            q.stride(0),
            q.stride(1),
            weights.stride(0),
            heads,
            DIM=dim,
            LOG2_DIM=dim.bit_length() - 1,
            ROWS=rows,
            WORDS=_in_words(fmt),
            num_warps=4,
        )
    return IndexQuery(codes=codes, weights=out_weights)


def index_scores(
    query: IndexQuery,
    records: torch.Tensor,
    block_table: torch.Tensor,
    lens: torch.Tensor,
    num_entries_max: int,
    *,
    group: int = 16,
    tile: tuple[int, int, int, int] | None = None,
) -> IndexScores:
    """Score each query against the first lens[t] keys of its sequence.

    Shapes:  query as in its class, T = S * Q; records [P, E, R] uint8; block_table [S, B] int32, values in [0, P);
             lens [T] int32, at most num_entries_max <= B * E, not decreasing within a sequence (causal order).
             tile: keys and queries a program, warps and stages; None takes what measured best.
    Raises:  ValueError: wrong dtype, shape or stride, or tables and lens that are not on the card.
    Source:  V4 report, section 2.3.1, equations 13 to 16; oracle: reference.index_scores.
    """
    num_queries, heads, dim = query.codes.shape
    fmt = KeyFormat(dim=dim)
    check_records(records, fmt.nbytes)
    check(block_table.dim() == 2 and block_table.dtype is torch.int32, "block_table must be [S, B] int32")
    check(block_table.stride(1) == 1, "block_table's rows must be contiguous")
    sequences = block_table.shape[0]
    check(lens.shape == (num_queries,) and lens.dtype is torch.int32 and lens.is_contiguous(), "lens: [T] int32")
    check(sequences > 0 and num_queries % sequences == 0, f"{num_queries} queries do not divide by {sequences} tables")
    check(dim >= 16 and group & (group - 1) == 0, "need an indexer dim of at least 16 and a power-of-two group")
    check(num_entries_max <= block_table.shape[1] * records.shape[1], "num_entries_max exceeds the block tables")
    per_sequence = num_queries // sequences
    keys, q_tile, warps, stages = tile or _choose_tile(per_sequence)
    check(not _in_words(fmt) or byte_alignment(records) >= 4, "keys of whole words must start at multiples of 4")
    check(keys % group == 0, f"a tile of {keys} keys must hold whole groups of {group}")
    padded = triton.cdiv(max(num_entries_max, 1), keys) * keys
    scores = torch.empty(num_queries, padded, dtype=torch.float32, device=records.device)
    maxima = torch.empty(num_queries, padded // group, dtype=torch.float32, device=records.device)
    if num_queries and num_entries_max:
        _scores_kernel[(padded // keys, sequences * triton.cdiv(per_sequence, q_tile))](
            query.codes,
            query.weights,
            records,
            block_table,
            lens,
            scores,
            maxima,
            per_sequence,
            heads,
            records.stride(0),
            block_table.stride(0),
            scores.stride(0),
            maxima.stride(0),
            ENTRIES=records.shape[1],
            RECORD=fmt.nbytes,
            ALIGN=byte_alignment(records),
            DIM=dim,
            H=max(16, triton.next_power_of_2(heads)),
            N=keys,
            Q_TILE=q_tile,
            GROUP=group,
            PACKED=_in_words(fmt),
            STAGES=stages,
            num_warps=warps,
        )
    return IndexScores(scores=scores, maxima=maxima, group=group)


def _in_words(fmt: KeyFormat) -> bool:
    """Whether a key is whole 32-bit words, one of them its four scales (V4's is)."""
    return fmt.dim == 128


def _choose_tile(queries: int) -> tuple[int, int, int, int]:
    """Keys, queries, warps, stages: decode reads each key once; prefill reuses decoded keys for many queries."""
    return (128, 1, 4, 1) if queries < 8 else (256, 32, 8, 3)
