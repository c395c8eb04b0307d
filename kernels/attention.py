"""Attention of one KV head (K = V) over packed entries: selected ones, or all of a sequence's, then its window.

One program takes 16 to 64 heads of one query and a range of the query's list of entries. The list is the compressed
entries first (selected: slots [T, K]; HCA: the first lens[t] of the sequence, through its block table), then the
window rows. Records are decoded to FP16 once a tile and used twice, as keys and as values. Where few queries would
leave the card idle, the list is split, and a second kernel merges the parts.

FP16 holds a decoded entry exactly (four bits of mantissa, power-of-two scales) while it lies in +-65,504; entries are
RMS-normed, so they are under sqrt(D) times the largest norm weight. Probabilities keep three more bits than in BF16.

Shapes:  T = S * Q queries (S sequences of Q each, in order), H heads, D = nope + rope dims, K selected,
         P, E, R = blocks, entries a block, record bytes, B blocks a sequence, W window rows a sequence.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from kernels.formats import EntryFormat, byte_alignment, check, check_records
from kernels.rounding import bf16_bits, power_of_two

_LOG2E = 1.4426950408889634
# Programs that fill the card, and the fewest tiles worth a program of their own.
_PROGRAMS = 132
_TILES_MIN = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """The window of each query: `counts` rows of records [S, W, R] uint8 from row `firsts`, wrapping at W.

    firsts, counts [T] int32, counts <= W. A decode ring has W = n_win; a prefill buffer is long and never wraps.
    """

    records: torch.Tensor
    firsts: torch.Tensor
    counts: torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Heads:
    """What a layer's heads add: sinks [H] float32, softmax scale, cos and sin [T, rope / 2] float32 of the queries'
    positions, by which the output's RoPE dims are rotated back."""

    sinks: torch.Tensor
    scale: float
    cos: torch.Tensor
    sin: torch.Tensor


@triton.jit
def _chunk(base, live, scales, AT: tl.constexpr, WIDTH: tl.constexpr, NOPE: tl.constexpr, N: tl.constexpr,
           SCALE_OFFSET: tl.constexpr, WORD_SCALES: tl.constexpr):  # fmt: skip
    """Decode WIDTH dims from AT on of the entries at byte pointers base [N]: FP16 [N, WIDTH]."""
    GROUP: tl.constexpr = 64 if WIDTH > 64 else WIDTH
    GROUPS: tl.constexpr = WIDTH // GROUP
    d = AT + tl.arange(0, WIDTH)
    if AT + WIDTH > NOPE:
        codes = tl.load(base[:, None] + d[None, :], live[:, None] & (d < NOPE)[None, :], other=0)
    else:
        codes = tl.load(base[:, None] + d[None, :], live[:, None], other=0)
    values = codes.to(tl.float8e4nv, bitcast=True).to(tl.float16)
    g = AT // 64 + tl.arange(0, GROUPS)
    if WORD_SCALES:
        scale = ((scales[:, None] >> (8 * g)[None, :]) & 0xFF).to(tl.int32)
    else:
        scale = tl.load(base[:, None] + (SCALE_OFFSET + g)[None, :], live[:, None], other=0).to(tl.int32)
    factor = power_of_two(tl.maximum(scale - 127, -126)).to(tl.float16)
    grouped = tl.reshape(values, (N, GROUPS, GROUP)) * factor[:, :, None]
    return tl.reshape(grouped, (N, WIDTH))


@triton.jit
def _query(q, h, live, AT: tl.constexpr, WIDTH: tl.constexpr, END: tl.constexpr):
    d = AT + tl.arange(0, WIDTH)
    return tl.load(q + h[:, None] + d[None, :], live[:, None] & (d < END)[None, :], other=0.0).to(tl.float16)


@triton.jit
def _rotate_back(x, cos, sin, HEADS: tl.constexpr, WIDTH: tl.constexpr, ROPE: tl.constexpr):
    """Undo RoPE on x [HEADS, WIDTH], whose first ROPE columns are the RoPE dims."""
    even, odd = tl.split(tl.reshape(x, (HEADS, WIDTH // 2, 2)))
    i = tl.arange(0, WIDTH // 2)
    c = tl.load(cos + i, i < ROPE // 2, other=1.0)[None, :]
    s = tl.load(sin + i, i < ROPE // 2, other=0.0)[None, :]
    return tl.reshape(tl.join(even * c + odd * s, odd * c - even * s), (HEADS, WIDTH))


@triton.jit
def _put(pointer, x, h, live, AT: tl.constexpr, WIDTH: tl.constexpr, END: tl.constexpr, BF16: tl.constexpr):
    d = AT + tl.arange(0, WIDTH)
    mask = live[:, None] & (d < END)[None, :]
    if BF16:
        tl.store(pointer.to(tl.pointer_type(tl.int16)) + h[:, None] + d[None, :], bf16_bits(x), mask)
    else:
        tl.store(pointer + h[:, None] + d[None, :], x, mask)


@triton.jit
def _attend_kernel(q, entries, block_table, slots, lens, window_delta, firsts, counts, sinks, cos, sin, out, part_out,
                   part_lse, queries, heads, k, splits, scale_log2, stride_qt, stride_qh, stride_p, stride_b, stride_w,
                   stride_ot, stride_oh, WINDOW: tl.constexpr, ENTRIES: tl.constexpr, RECORD: tl.constexpr,
                   ALIGN: tl.constexpr, NOPE: tl.constexpr, ROPE: tl.constexpr, SCALE_OFFSET: tl.constexpr,
                   C0: tl.constexpr, C1: tl.constexpr, C2: tl.constexpr, CR: tl.constexpr, WORD_SCALES: tl.constexpr,
                   SELECTED: tl.constexpr, SPLIT: tl.constexpr, H: tl.constexpr, N: tl.constexpr,
                   STAGES: tl.constexpr):  # fmt: skip
    """H heads of one query over its share of the list; dims in chunks C0, C1, C2 (0: absent) and the RoPE chunk CR."""
    t = tl.program_id(0).to(tl.int64)
    part = tl.program_id(2)
    sequence = t // queries
    h = tl.program_id(1) * H + tl.arange(0, H)
    live_h = h < heads
    hq = h * stride_qh
    q += t * stride_qt
    q0 = _query(q, hq, live_h, 0, C0, NOPE)
    if C1 > 0:
        q1 = _query(q, hq, live_h, C0, C1, NOPE)
    if C2 > 0:
        q2 = _query(q, hq, live_h, C0 + C1, C2, NOPE)
    qr = _query(q, hq, live_h, NOPE, CR, NOPE + ROPE)

    compressed = k if SELECTED else tl.load(lens + t)
    first = tl.load(firsts + t)
    count = tl.load(counts + t)
    tiles = tl.cdiv(compressed + count, N)
    begin = tiles * part // splits
    end = tiles * (part + 1) // splits
    slots += t * k
    block_table += sequence * stride_b

    top = tl.full((H,), float("-inf"), tl.float32)
    total = tl.zeros((H,), tl.float32)
    acc0 = tl.zeros((H, C0), tl.float32)
    if C1 > 0:
        acc1 = tl.zeros((H, C1), tl.float32)
    if C2 > 0:
        acc2 = tl.zeros((H, C2), tl.float32)
    accr = tl.zeros((H, CR), tl.float32)
    for tile in tl.range(begin, end, num_stages=STAGES):
        n = tile * N + tl.arange(0, N)
        packed = n < compressed
        if SELECTED:
            slot = tl.load(slots + n, packed, other=-1)
            live = slot >= 0
            block = (slot // ENTRIES).to(tl.int64)
            row = slot % ENTRIES
        else:
            block = tl.load(block_table + n // ENTRIES, packed, other=0).to(tl.int64)
            row = n % ENTRIES
            live = packed
        ring = n - compressed
        from_window = (ring >= 0) & (ring < count)
        ring = (first + tl.where(from_window, ring, 0)) % WINDOW
        offset = tl.where(
            packed, block * stride_p + row.to(tl.int64) * RECORD,
            window_delta + sequence * stride_w + ring.to(tl.int64) * RECORD,
        )  # fmt: skip
        live = live | from_window
        offset = tl.multiple_of(tl.where(live, offset, 0), ALIGN)
        base = entries + offset
        if WORD_SCALES:
            scales = tl.load(entries.to(tl.pointer_type(tl.int64)) + (offset + SCALE_OFFSET) // 8, live, other=0)
        else:
            scales = 0
        k0 = _chunk(base, live, scales, 0, C0, NOPE, N, SCALE_OFFSET, WORD_SCALES)
        s = tl.dot(q0, tl.trans(k0))
        if C1 > 0:
            k1 = _chunk(base, live, scales, C0, C1, NOPE, N, SCALE_OFFSET, WORD_SCALES)
            s = tl.dot(q1, tl.trans(k1), s)
        if C2 > 0:
            k2 = _chunk(base, live, scales, C0 + C1, C2, NOPE, N, SCALE_OFFSET, WORD_SCALES)
            s = tl.dot(q2, tl.trans(k2), s)
        dr = tl.arange(0, CR)
        halves = tl.multiple_of((offset + NOPE) // 2, ALIGN // 2)
        rope_at = entries.to(tl.pointer_type(tl.bfloat16)) + halves[:, None] + dr[None, :]
        if CR > ROPE:
            kr = tl.load(rope_at, live[:, None] & (dr < ROPE)[None, :], other=0.0).to(tl.float16)
        else:
            kr = tl.load(rope_at, live[:, None], other=0.0).to(tl.float16)
        s = tl.dot(qr, tl.trans(kr), s)

        s = tl.where(live[None, :], s * scale_log2, float("-inf"))
        new = tl.maximum(top, tl.max(s, 1))
        # A tile of nothing but padding leaves -inf, whose difference with itself would be NaN.
        safe = tl.where(new == float("-inf"), 0.0, new)
        shrink = tl.exp2(top - safe)
        p = tl.exp2(s - safe[:, None])
        total = total * shrink + tl.sum(p, 1)
        top = new
        p = p.to(tl.float16)
        acc0 = tl.dot(p, k0, acc0 * shrink[:, None])
        if C1 > 0:
            acc1 = tl.dot(p, k1, acc1 * shrink[:, None])
        if C2 > 0:
            acc2 = tl.dot(p, k2, acc2 * shrink[:, None])
        accr = tl.dot(p, kr, accr * shrink[:, None])

    if SPLIT:
        # A part is normed by itself; its log-sum tells the merge how much it counts.
        inverse = 1.0 / tl.where(total > 0.0, total, 1.0)
        lse = tl.where(total > 0.0, top + tl.log2(tl.where(total > 0.0, total, 1.0)), float("-inf"))
        at = (t * splits + part) * heads
        tl.store(part_lse + at + h, lse, live_h)
        target = part_out + at * (NOPE + ROPE)
        ho = h * (NOPE + ROPE)
    else:
        sink = tl.load(sinks + h, live_h, other=0.0) * 1.4426950408889634
        high = tl.maximum(top, sink)
        grown = tl.exp2(top - high)
        inverse = grown / (total * grown + tl.exp2(sink - high))
        accr = _rotate_back(accr, cos + t * (ROPE // 2), sin + t * (ROPE // 2), H, CR, ROPE)
        target = out + t * stride_ot
        ho = h * stride_oh
    _put(target, acc0 * inverse[:, None], ho, live_h, 0, C0, NOPE, not SPLIT)
    if C1 > 0:
        _put(target, acc1 * inverse[:, None], ho, live_h, C0, C1, NOPE, not SPLIT)
    if C2 > 0:
        _put(target, acc2 * inverse[:, None], ho, live_h, C0 + C1, C2, NOPE, not SPLIT)
    _put(target, accr * inverse[:, None], ho, live_h, NOPE, CR, NOPE + ROPE, not SPLIT)


@triton.jit
def _merge_kernel(part_out, part_lse, sinks, cos, sin, out, heads, splits, stride_ot, stride_oh, DIM: tl.constexpr,
                  ROPE: tl.constexpr, D: tl.constexpr, H: tl.constexpr):  # fmt: skip
    """Merge the parts of H heads of one query, add the sink, rotate back, write BF16."""
    t = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * H + tl.arange(0, H)
    live = h < heads
    d = tl.arange(0, D)
    sink = tl.load(sinks + h, live, other=0.0) * 1.4426950408889634
    top = sink
    total = tl.full((H,), 1.0, tl.float32)
    acc = tl.zeros((H, D), tl.float32)
    for part in tl.range(0, splits, num_stages=3):
        at = (t * splits + part) * heads + h
        lse = tl.load(part_lse + at, live, other=float("-inf"))
        x = tl.load(part_out + at[:, None] * DIM + d[None, :], live[:, None] & (d < DIM)[None, :], other=0.0)
        new = tl.maximum(top, lse)
        shrink, share = tl.exp2(top - new), tl.exp2(lse - new)
        total = total * shrink + share
        acc = acc * shrink[:, None] + x * share[:, None]
        top = new
    acc = acc / total[:, None]
    even, odd = tl.split(tl.reshape(acc, (H, D // 2, 2)))
    pair = tl.arange(0, D // 2) - (DIM - ROPE) // 2
    turned = (pair >= 0) & (pair < ROPE // 2)
    c = tl.load(cos + t * (ROPE // 2) + pair, turned, other=1.0)[None, :]
    s = tl.load(sin + t * (ROPE // 2) + pair, turned, other=0.0)[None, :]
    acc = tl.reshape(tl.join(even * c + odd * s, odd * c - even * s), (H, D))
    at = t * stride_ot + h[:, None] * stride_oh + d[None, :]
    tl.store(out.to(tl.pointer_type(tl.int16)) + at, bf16_bits(acc), live[:, None] & (d < DIM)[None, :])


def sparse_attention(
    q: torch.Tensor,
    records: torch.Tensor,
    slots: torch.Tensor,
    window: Window,
    heads: Heads,
    out: torch.Tensor,
    *,
    splits: int | None = None,
    tile: tuple[int, int, int] | None = None,
) -> None:
    """Attend to selected entries and the window (CSA), or to the window alone (K = 0).

    Shapes:  q and out [T, H, D] bfloat16, last dim contiguous, out written whole; records [P, E, R] uint8;
             slots [T, K] int32 in [0, P * E), or -1 for none; window and heads as in their classes.
             splits: programs a query's list is spread over, None chooses. tile: entries, warps, stages.
    Raises:  ValueError: wrong dtype, shape or stride.
    Source:  V4 report, section 2.3.1, equations 17 to 19 and 2.3.3; oracle: reference.attention.
    """
    check(slots.dim() == 2 and slots.shape[0] == q.shape[0], "slots must be [T, K]")
    check(slots.dtype is torch.int32 and slots.is_contiguous(), "slots must be contiguous int32")
    k = slots.shape[1]
    _attend(q, records, slots, None, None, k, window, heads, out, splits, tile)


def hca_attention(
    q: torch.Tensor,
    records: torch.Tensor,
    block_table: torch.Tensor,
    lens: torch.Tensor,
    num_entries_max: int,
    window: Window,
    heads: Heads,
    out: torch.Tensor,
    *,
    splits: int | None = None,
    tile: tuple[int, int, int] | None = None,
) -> None:
    """Attend to the first lens[t] entries of each query's sequence and the window (HCA).

    Shapes:  as sparse_attention; block_table [S, B] int32, values in [0, P); lens [T] int32, at most num_entries_max.
    Raises:  ValueError: wrong dtype, shape or stride.
    Source:  V4 report, sections 2.3.2 and 2.3.3; oracle: reference.attention.
    """
    check(block_table.dim() == 2 and block_table.dtype is torch.int32, "block_table must be [S, B] int32")
    check(block_table.stride(1) == 1, "block_table's rows must be contiguous")
    check(block_table.shape[0] == window.records.shape[0], "block_table and window name different sequences")
    check(lens.shape == (q.shape[0],) and lens.dtype is torch.int32 and lens.is_contiguous(), "lens: [T] int32")
    check(num_entries_max <= block_table.shape[1] * records.shape[1], "num_entries_max exceeds the block tables")
    _attend(q, records, None, block_table, lens, num_entries_max, window, heads, out, splits, tile)


def _attend(
    q: torch.Tensor,
    records: torch.Tensor,
    slots: torch.Tensor | None,
    block_table: torch.Tensor | None,
    lens: torch.Tensor | None,
    entries_max: int,
    window: Window,
    heads: Heads,
    out: torch.Tensor,
    splits: int | None,
    tile: tuple[int, int, int] | None,
) -> None:
    fmt = _check_operands(q, records, window, heads, out)
    num_queries, num_heads, dim = q.shape
    if not num_queries:
        return
    sequences = window.records.shape[0]
    head_tile = min(64, max(16, triton.next_power_of_2(num_heads)))
    head_tiles = triton.cdiv(num_heads, head_tile)
    n, warps, stages = tile or (64, 8, 2)
    tiles = triton.cdiv(entries_max + min(window.records.shape[1], 128), n)
    splits = splits or max(1, min(_PROGRAMS // (num_queries * head_tiles), tiles // _TILES_MIN))
    part_out = part_lse = out
    if splits > 1:
        part_out = torch.empty(num_queries, splits, num_heads, dim, dtype=torch.float32, device=q.device)
        part_lse = torch.empty(num_queries, splits, num_heads, dtype=torch.float32, device=q.device)
    nothing = window.firsts
    c0, c1, c2 = _chunks(fmt.nope_dim)
    align = min(byte_alignment(records), byte_alignment(window.records), 8)
    word_scales = fmt.nbytes - fmt.scale_offset == 8 and align == 8 and fmt.scale_offset % 8 == 0
    _attend_kernel[(num_queries, head_tiles, splits)](
        q,
        records,
        nothing if block_table is None else block_table,
        nothing if slots is None else slots,
        nothing if lens is None else lens,
        window.records.data_ptr() - records.data_ptr(),
        window.firsts,
        window.counts,
        heads.sinks,
        heads.cos,
        heads.sin,
        out,
        part_out,
        part_lse,
        num_queries // sequences,
        num_heads,
        entries_max if slots is not None else 0,
        splits,
        heads.scale * _LOG2E,
        q.stride(0),
        q.stride(1),
        records.stride(0),
        0 if block_table is None else block_table.stride(0),
        window.records.stride(0),
        out.stride(0),
        out.stride(1),
        WINDOW=window.records.shape[1],
        ENTRIES=records.shape[1],
        RECORD=fmt.nbytes,
        ALIGN=align,
        NOPE=fmt.nope_dim,
        ROPE=fmt.rope_dim,
        SCALE_OFFSET=fmt.scale_offset,
        C0=c0,
        C1=c1,
        C2=c2,
        CR=max(16, triton.next_power_of_2(fmt.rope_dim)),
        WORD_SCALES=word_scales,
        SELECTED=slots is not None,
        SPLIT=splits > 1,
        H=head_tile,
        N=n,
        STAGES=stages,
        num_warps=warps,
    )
    if splits > 1:
        merge_heads = 4
        _merge_kernel[(num_queries, triton.cdiv(num_heads, merge_heads))](
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
            ROPE=fmt.rope_dim,
            D=triton.next_power_of_2(dim),
            H=merge_heads,
            num_warps=4,
        )


def _chunks(nope_dim: int) -> tuple[int, int, int]:
    """Cover nope_dim by up to three powers of two, each at least 16, the last padded (V4: 256 + 128 + 64)."""
    chunks: list[int] = []
    rest = nope_dim
    while rest > 0 and len(chunks) < 3:
        below = 1 << (rest.bit_length() - 1)
        chunks.append(max(16, below if len(chunks) < 2 and below >= 16 else triton.next_power_of_2(rest)))
        rest -= chunks[-1]
    return (*chunks, 0, 0)[0], (*chunks, 0, 0)[1], (*chunks, 0, 0)[2]


def _check_operands(
    q: torch.Tensor, records: torch.Tensor, window: Window, heads: Heads, out: torch.Tensor
) -> EntryFormat:
    check(q.dim() == 3 and q.dtype is torch.bfloat16 and q.stride(2) == 1, "q must be [T, H, D] bfloat16")
    check(out.shape == q.shape and out.dtype is torch.bfloat16 and out.stride(2) == 1, "out must be like q")
    num_queries, num_heads, dim = q.shape
    fmt = EntryFormat(head_dim=dim, rope_dim=2 * heads.cos.shape[-1])
    check_records(records, fmt.nbytes)
    check_records(window.records, fmt.nbytes, "window records")
    check(min(byte_alignment(records), byte_alignment(window.records)) >= 2, "records must start at even addresses")
    sequences = window.records.shape[0]
    check(sequences > 0 and num_queries % sequences == 0, f"{num_queries} queries do not divide by {sequences}")
    for rows in (window.firsts, window.counts):
        check(rows.shape == (num_queries,) and rows.dtype is torch.int32, "firsts and counts must be [T] int32")
    check(heads.sinks.shape == (num_heads,) and heads.sinks.dtype is torch.float32, "sinks must be [H] float32")
    for table in (heads.cos, heads.sin):
        check(table.shape == (num_queries, fmt.rope_dim // 2), "cos and sin must be [T, rope / 2]")
        check(table.dtype is torch.float32 and table.is_contiguous(), "cos and sin must be contiguous float32")
    return fmt
