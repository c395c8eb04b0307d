"""Index scores: every query times every visible FP4 key of its sequence, read packed from the paged pool.

    score[t, n] = sum_h weight[t, h] * relu(q[t, h] . key[n])

Keys and queries are FP4 with power-of-two scales, so products are exact in FP16 once each row is divided by its largest
scale. Because ReLU is homogeneous, the scale can multiply the sum (for keys) or the head's weight (for queries)
instead. Nothing overflows, whatever the scales are; only groups whose scale is 2^23 below their row's largest can round
to zero.

Shapes:  T = S * Q queries (S sequences of Q each, in order), H index heads, d indexer dim, N entries at most a
         sequence, P, E, R = blocks, keys per block, record bytes, B blocks per sequence, G scores to one maximum.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from antefix_kernels import hopper
from antefix_kernels.index_queries import IndexQuery, as_half, in_words, prepare_queries
from antefix_kernels.number_formats import KeyFormat, byte_alignment, check, check_records
from antefix_kernels.rounding import power_of_two

__all__ = ["IndexQuery", "IndexScores", "group_for", "index_scores", "prepare_queries"]

# How many programs fill the GPU in decode: the fastest of 264 to 19,200.
_DECODE_PROGRAMS = 1584
# Keys of a tile, queries of a product (prefill), warps, stages (prefill): the fastest measured.
_DECODE_TILE = (64, 1, 4, 1)
_PREFILL_TILE = (128, 2, 4, 2)
# The same for the kernels of index_scores_hopper: twice as many decode programs as a GPU holds at once (four per
# multiprocessor, because of their registers), and the keys of their tiles.
_HOPPER_PROGRAMS = 1056
_HOPPER_REGISTERS = 128
_HOPPER_KEYS = 128
_HOPPER_QUERIES = 128
# How many queries use a decoded tile of keys before the tile is dropped.
_PREFILL_QUERIES = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexScores:
    """scores [T, N] float32, and maxima [T, N / group] of each `group` neighbours. After a query's visible entries,
    scores and maxima may have any value: readers must use the query's length.
    """

    scores: torch.Tensor
    maxima: torch.Tensor
    group: int


@triton.jit
def _decode_words(words, N: tl.constexpr, WORDS: tl.constexpr):
    """Nibbles of words [N, WORDS] int32 as FP16 [N, 8 * WORDS] times 2^-14, in the order that _queries_kernel writes.

    A nibble s e e m is an FP16 s 0 0 0 e e m 0..: two nibbles move at once, one to each half of a word.
    """
    shifted = words >> 8
    a = ((words & 0x00070007) << 9) | ((words & 0x00080008) << 12)
    b = ((words & 0x00700070) << 5) | ((words & 0x00800080) << 8)
    c = ((shifted & 0x00070007) << 9) | ((shifted & 0x00080008) << 12)
    d = ((shifted & 0x00700070) << 5) | ((shifted & 0x00800080) << 8)
    ab = tl.join(tl.join(as_half(a), as_half(b)), tl.join(as_half(a >> 16), as_half(b >> 16)))
    cd = tl.join(tl.join(as_half(c), as_half(d)), tl.join(as_half(c >> 16), as_half(d >> 16)))
    # [N, WORDS, b or d, upper half, c or d] -> of four words each a, a', then each b, b', and so on.
    every = tl.permute(tl.join(ab, cd), (0, 1, 4, 2, 3))
    return tl.reshape(tl.permute(tl.reshape(every, (N, WORDS // 4, 4, 4, 2)), (0, 1, 3, 2, 4)), (N, 8 * WORDS))


@triton.jit
def _shares(scale, top):
    """FP16 of 2^(14 + scale - top); zero if that is below FP16's normal range."""
    return as_half(tl.maximum(scale - top + 29, 0) << 10)


@triton.jit
def _load_keys(records, offset, DIM: tl.constexpr, PACKED: tl.constexpr):
    """The stored form of the keys at offsets [N] (words if PACKED, else bytes): codes and scales."""
    if PACKED:
        at = records.to(tl.pointer_type(tl.int32)) + offset
        return tl.load(at[:, None] + tl.arange(0, DIM // 8)[None, :]), tl.load(at + DIM // 8)
    else:  # noqa: RET505
        GROUPS: tl.constexpr = (DIM + 31) // 32
        at = (records + offset)[:, None]
        codes = tl.load(at + tl.arange(0, DIM // 2)[None, :]).to(tl.int32)
        return codes, tl.load(at + (DIM // 2 + tl.arange(0, GROUPS))[None, :]).to(tl.int32)


@triton.jit
def _decode_keys(codes, scales, N: tl.constexpr, DIM: tl.constexpr, PACKED: tl.constexpr):
    """The rows' factors [N] float32, and values [N, DIM] FP16 divided by these factors."""
    GROUP: tl.constexpr = 32 if DIM > 32 else DIM
    GROUPS: tl.constexpr = DIM // GROUP
    if PACKED:
        low, high = tl.maximum(scales & 0xFF, (scales >> 8) & 0xFF), (scales >> 16) & 0xFFFF
        top = tl.maximum(low, tl.maximum(high & 0xFF, high >> 8))
        # A scale group has four words, and each thread finds the scale of its own words.
        scale = (scales[:, None] >> (8 * (tl.arange(0, DIM // 8) // 4))[None, :]) & 0xFF
        share = _shares(scale, top[:, None])
        spread = tl.reshape(tl.broadcast_to(share[:, :, None], (N, DIM // 8, 8)), (N, DIM))
        values = _decode_words(codes, N, DIM // 8)
    else:
        top = tl.max(scales, 1)
        share = _shares(scales, top[:, None])
        half = tl.reshape(tl.broadcast_to(share[:, :, None], (N, GROUPS, GROUP // 2)), (N, DIM // 2))
        spread = tl.reshape(tl.permute(tl.join(half, half), (0, 2, 1)), (N, DIM))
        low = as_half(((codes & 7) << 9) | ((codes & 8) << 12))
        high = as_half(((codes & 0x70) << 5) | ((codes & 0x80) << 8))
        values = tl.reshape(tl.permute(tl.join(low, high), (0, 2, 1)), (N, DIM))
    return power_of_two(tl.maximum(top - 127, -126)), values * spread


@triton.jit
def _blocks(start, length, block_table, N: tl.constexpr, ENTRIES: tl.constexpr):
    """Block ids for the tile that begins at `start`; past the sequence's end the last id is repeated."""
    if N % ENTRIES == 0:
        # The tile has whole blocks: one look-up per block, and rows at constant distances.
        j = start // ENTRIES + tl.arange(0, N // ENTRIES)
        return tl.load(block_table + tl.minimum(j, (length - 1) // ENTRIES))
    else:  # noqa: RET505 - Triton compiles one branch only where they are branches
        return tl.load(block_table + tl.minimum(start + tl.arange(0, N), length - 1) // ENTRIES)


@triton.jit
def _offsets(blocks, start, length, stride_p, N: tl.constexpr, ENTRIES: tl.constexpr, STEP: tl.constexpr):
    """Offsets [N] of the tile's keys, in units of STEP per record; past the end, offsets of some stored key."""
    first = blocks.to(tl.int64) * stride_p
    if N % ENTRIES == 0:
        return tl.reshape(first[:, None] + (tl.arange(0, ENTRIES) * STEP)[None, :], (N,))
    else:  # noqa: RET505
        return first + (tl.minimum(start + tl.arange(0, N), length - 1) % ENTRIES) * STEP


@triton.jit
def _decode_kernel(codes, weights, records, block_table, lens, scores, maxima, heads, stride_p, stride_b, stride_s,
                   stride_m, ENTRIES: tl.constexpr, STEP: tl.constexpr, DIM: tl.constexpr, H: tl.constexpr,
                   N: tl.constexpr, GROUP: tl.constexpr, PACKED: tl.constexpr):  # fmt: skip
    """One query and its part of its sequence's keys: the query stays in registers while keys are loaded.

    A tile's records are loaded into registers while the previous tile is scored, and its block ids one tile earlier.
    Copies through shared memory took twice as long: 68-byte records allow only pieces of 4 bytes.
    """
    t = tl.program_id(1).to(tl.int64)
    length = tl.load(lens + t)
    tiles = tl.cdiv(length, N)
    begin = tiles * tl.program_id(0) // tl.num_programs(0)
    end = tiles * (tl.program_id(0) + 1) // tl.num_programs(0)
    block_table += t * stride_b
    scores += t * stride_s
    maxima += t * stride_m
    h = tl.arange(0, H)
    d = tl.arange(0, DIM)
    q = tl.load(codes + t * heads * DIM + h[None, :] * DIM + d[:, None], (h < heads)[None, :], other=0.0)
    w = tl.load(weights + t * heads + h, h < heads, other=0.0)
    if begin < end:
        blocks = _blocks(begin * N, length, block_table, N, ENTRIES)
        stored, scales = _load_keys(
            records, _offsets(blocks, begin * N, length, stride_p, N, ENTRIES, STEP), DIM, PACKED
        )
        blocks = _blocks((begin + 1) * N, length, block_table, N, ENTRIES)
        for tile in tl.range(begin, end, num_stages=1):
            start = (tile + 1) * N
            at = _offsets(blocks, start, length, stride_p, N, ENTRIES, STEP)
            next_stored, next_scales = _load_keys(records, at, DIM, PACKED)
            blocks = _blocks(start + N, length, block_table, N, ENTRIES)
            factor, keys = _decode_keys(stored, scales, N, DIM, PACKED)
            n = tile * N + tl.arange(0, N)
            s = tl.sum(tl.maximum(tl.dot(keys, q), 0.0) * w[None, :], 1) * factor
            tl.store(scores + n, s, n < length)
            best = tl.max(tl.reshape(tl.where(n < length, s, float("-inf")), (N // GROUP, GROUP)), 1)
            group = tile * (N // GROUP) + tl.arange(0, N // GROUP)
            tl.store(maxima + group, best, group * GROUP < length)
            stored, scales = next_stored, next_scales


@triton.jit(do_not_specialize=["queries"])
def _prefill_kernel(codes, weights, records, block_table, lens, scores, maxima, queries, heads, stride_p, stride_b,
                    stride_s, stride_m, ENTRIES: tl.constexpr, STEP: tl.constexpr, DIM: tl.constexpr,
                    H: tl.constexpr, N: tl.constexpr, Q_TILE: tl.constexpr, Q_STEP: tl.constexpr, GROUP: tl.constexpr,
                    PACKED: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """One tile of N keys and Q_TILE queries of one sequence: keys are decoded once, then queries are loaded, Q_STEP for
    each product.
    """
    tiles = tl.cdiv(queries, Q_TILE)
    sequence = tl.program_id(1) // tiles
    first = (tl.program_id(1) % tiles) * Q_TILE
    count = tl.minimum(queries - first, Q_TILE)
    start = tl.program_id(0) * N
    t0 = sequence * queries + first
    # Later queries of a sequence see at least as many keys, so the last query's length bounds the tile's.
    most = tl.load(lens + t0 + count - 1)
    if start < most:
        blocks = _blocks(start, most, block_table + sequence.to(tl.int64) * stride_b, N, ENTRIES)
        place = _offsets(blocks, start, most, stride_p, N, ENTRIES, STEP)
        stored, scales = _load_keys(records, place, DIM, PACKED)
        factor, keys = _decode_keys(stored, scales, N, DIM, PACKED)
        n = start + tl.arange(0, N)[:, None]
        group = start // GROUP + tl.arange(0, N // GROUP)[:, None]
        row = tl.arange(0, Q_STEP * H)
        d = tl.arange(0, DIM)
        for step in tl.range(0, tl.cdiv(count, Q_STEP), num_stages=STAGES):
            # Heads of Q_STEP queries side by side; where heads are padded to H, Q_STEP is 1.
            i = step * Q_STEP + row // H
            live = (i < count) & (row % H < heads)
            at = (t0 + i).to(tl.int64) * heads + row % H
            q = tl.load(codes + at[None, :] * DIM + d[:, None], live[None, :], other=0.0)
            w = tl.load(weights + at, live, other=0.0)
            j = step * Q_STEP + tl.arange(0, Q_STEP)
            t = (t0 + j).to(tl.int64)[None, :]
            length = tl.load(lens + t0 + j, j < count, other=0)[None, :]
            s = tl.maximum(tl.dot(keys, q), 0.0) * w[None, :]
            s = tl.sum(tl.reshape(s, (N, Q_STEP, H)), 2) * factor[:, None]
            tl.store(scores + t * stride_s + n, s, n < length)
            s = tl.where(n < length, s, float("-inf"))
            best = tl.max(tl.reshape(s, (N // GROUP, GROUP, Q_STEP)), 1)
            tl.store(maxima + t * stride_m + group, best, group * GROUP < length)


def index_scores(
    query: IndexQuery,
    records: torch.Tensor,
    block_table: torch.Tensor,
    lens: torch.Tensor,
    num_entries_max: int,
    *,
    group: int = 16,
    tile: tuple[int, int, int, int] | None = None,
    as_chunk: bool = False,
) -> IndexScores:
    """Score each query against the first lens[t] keys of its sequence.

    Shapes:  query as in its class, T = S * Q; records [P, E, R] uint8; block_table [S, B] int32, values in [0, P);
             lens [T] int32, at most num_entries_max <= B * E, not decreasing within a sequence (causal order).
             tile: keys per program, queries per product, warps and stages; None: the fastest measured.
             as_chunk: use the kernel of longer chunks also for sequences of one query.
    Raises:  ValueError: wrong dtype, shape or stride, or tables and lens that are not on the GPU.
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
    is_decode = per_sequence == 1 and not as_chunk
    keys, q_step, warps, stages = tile or (_DECODE_TILE if is_decode else _PREFILL_TILE)
    check(keys >= 64, "a tile must have at least 64 keys: the compiler was seen to err below, at an indexer dim of 16")
    check(not in_words(fmt) or byte_alignment(records) >= 4, "keys of whole words must start at multiples of 4")
    check(keys % group == 0, f"a tile of {keys} keys must hold whole groups of {group}")
    padded = triton.cdiv(max(num_entries_max, 1), keys) * keys
    scores = torch.empty(num_queries, padded, dtype=torch.float32, device=records.device)
    maxima = torch.empty(num_queries, padded // group, dtype=torch.float32, device=records.device)
    if not num_queries or not num_entries_max:
        return IndexScores(scores=scores, maxima=maxima, group=group)
    tensors = (query.codes, query.weights, records, block_table, lens, scores, maxima)
    unit = 4 if in_words(fmt) else 1
    strides = (records.stride(0) // unit, block_table.stride(0), scores.stride(0), maxima.stride(0))
    layout = {"ENTRIES": records.shape[1], "STEP": fmt.nbytes // unit}
    heads_pad = max(16, triton.next_power_of_2(heads))
    sizes = {"DIM": dim, "H": heads_pad, "N": keys, "GROUP": group, "PACKED": in_words(fmt), "num_warps": warps}
    on_hopper = tile is None and heads <= 64 and in_words(fmt) and hopper.available(records)
    if on_hopper and is_decode and records.shape[1] % 32 == 0:
        parts = max(1, min(triton.cdiv(padded, _HOPPER_KEYS), _HOPPER_PROGRAMS // num_queries))
        from antefix_kernels.index_scores_hopper import decode_kernel

        decode_kernel[(parts, num_queries)](
            *tensors, heads, *strides, ENTRIES=records.shape[1], GROUP=group, num_warps=4, maxnreg=_HOPPER_REGISTERS
        )
    elif on_hopper and heads == 64:
        from antefix_kernels.index_scores_hopper import describe_queries, prefill_kernel

        described = describe_queries(query.codes)
        grid = (triton.cdiv(num_entries_max, 256), sequences * triton.cdiv(per_sequence, _HOPPER_QUERIES))
        sizes = {"Q_TILE": _HOPPER_QUERIES, "ENTRIES": records.shape[1], "GROUP": group}
        prefill_kernel[grid](described, *tensors[1:], per_sequence, *strides, **sizes, num_warps=4)
    elif is_decode:
        parts = max(1, min(padded // keys, _DECODE_PROGRAMS // num_queries))
        _decode_kernel[(parts, num_queries)](*tensors, heads, *strides, **layout, **sizes)
    else:
        grid = (padded // keys, sequences * triton.cdiv(per_sequence, _PREFILL_QUERIES))
        q_step = q_step if heads == heads_pad else 1
        steps = {"Q_TILE": _PREFILL_QUERIES, "Q_STEP": q_step, "STAGES": stages, "enable_fp_fusion": False}
        _prefill_kernel[grid](*tensors, per_sequence, heads, *strides, **layout, **sizes, **steps)
    return IndexScores(scores=scores, maxima=maxima, group=group)


def group_for(num_entries: int, k: int) -> int:
    """Scores per maximum: near sqrt(entries / k), where listing groups and searching them cost about the same."""
    group = 2
    while group * group * 4 <= num_entries // max(k, 1) and group < 16:
        group *= 2
    return group
