"""Attention of one KV head (K = V) over packed entries: selected ones, or all of a sequence's, then its window.

One program takes 16 to 64 heads of one query and a range of the query's list of entries. The list has the compressed
entries first (selected: row t of slots; HCA: the first lens[t] of the sequence, through its block table), then the
window rows. Records are decoded to FP16 once per tile and used twice, as keys and as values. If there are so few
queries that the GPU would be idle, the list of entries is split, and a second kernel merges the parts.

FP16 holds a decoded entry exactly (four bits of mantissa, power-of-two scales) as long as it lies within +-65,504.
Entries are RMS-normed, so they are under sqrt(D) times the largest norm weight. Queries are FP16 too, so that the
tensor cores can read them in the form in which they are loaded. FP16 probabilities have three more bits than BF16 ones.

Shapes:  T = S * Q queries (S sequences of Q each, in order), H heads, D = nope + rope dims, K selected,
         P, E, R = blocks, entries per block, record bytes, B blocks per sequence, W window rows per sequence.
"""

# mypy: disable-error-code="assignment"
# (device code grows tuples of tensors in loops)
from __future__ import annotations

import torch
import triton
import triton.language as tl

from antefix_kernels import chained, hopper
from antefix_kernels.chained import follow
from antefix_kernels.finish import rotate_back, store_output
from antefix_kernels.merge import merge_parts
from antefix_kernels.number_formats import byte_alignment, check
from antefix_kernels.operands import Heads, Window, check_operands
from antefix_kernels.rounding import power_of_two

_LOG2E = 1.4426950408889634
# Number of dims that are decoded and multiplied at once.
_CHUNK = 128
# Entries and warps of a program: the fastest measured.
_TILE = (64, 8)
# How many programs fill the GPU, and the fewest tiles that are worth a program of their own.
_PROGRAMS = 132
_TILES_MIN = 2
# From this many programs (before the split) and tiles on, the Gluon kernel with roles is faster.
_ROLES_PROGRAMS_MIN = 32
_ROLES_TILES_MIN = 8


@triton.jit
def _load_raw(entries, offset, C: tl.constexpr, CHUNKS: tl.constexpr, NOPE: tl.constexpr, ROPE: tl.constexpr,
              UNIT: tl.constexpr, SCALE_OFFSET: tl.constexpr, WORD_SCALES: tl.constexpr):  # fmt: skip
    """The stored form of the entries at offsets [N] (in units of UNIT bytes): a tuple of chunks of codes or RoPE values
    (a chunk that has both comes twice), then their scales, in one word if there are eight.
    """
    raw = ()
    for c in tl.static_range(CHUNKS):
        d = c * C + tl.arange(0, C)
        if c * C < NOPE:
            at = entries + (offset * UNIT)[:, None] + d[None, :]
            if c * C + C <= NOPE:
                raw = raw + (tl.load(at),)
            else:
                raw = raw + (tl.load(at, (d < NOPE)[None, :], other=0),)
        if c * C + C > NOPE:
            halves = (offset * (UNIT // 2))[:, None] + (NOPE // 2 + d - NOPE)[None, :]
            at = entries.to(tl.pointer_type(tl.bfloat16)) + halves
            if (c * C >= NOPE) & (c * C + C <= NOPE + ROPE):
                raw = raw + (tl.load(at),)
            else:
                raw = raw + (tl.load(at, ((d >= NOPE) & (d < NOPE + ROPE))[None, :], other=0.0),)
    if WORD_SCALES:
        raw = raw + (tl.load(entries.to(tl.pointer_type(tl.int64)) + (offset + SCALE_OFFSET // 8)),)
    else:
        GROUPS: tl.constexpr = (C + 63) // 64
        for c in tl.static_range((NOPE + C - 1) // C):
            g = c * C // 64 + tl.arange(0, GROUPS)
            at = entries + (offset * UNIT)[:, None] + (SCALE_OFFSET + g)[None, :]
            raw = raw + (tl.load(at, (g * 64 < NOPE)[None, :], other=0),)
    return raw


@triton.jit
def _decode(raw, c: tl.constexpr, C: tl.constexpr, CHUNKS: tl.constexpr, NOPE: tl.constexpr, N: tl.constexpr,
            WORD_SCALES: tl.constexpr):  # fmt: skip
    """Chunk c of the records `raw` as FP16 [N, C], with zeros after the last dim."""
    MIXED: tl.constexpr = NOPE // C if NOPE % C else CHUNKS
    # Chunks after the mixed one lie one place later; the scales come last.
    AT: tl.constexpr = c if c <= MIXED else c + 1
    SCALES: tl.constexpr = CHUNKS if MIXED == CHUNKS else CHUNKS + 1
    GROUPS: tl.constexpr = (C + 63) // 64
    if c * C >= NOPE:
        values = raw[AT].to(tl.float16)
    else:
        values = raw[AT].to(tl.float8e4nv, bitcast=True).to(tl.float16)
        if WORD_SCALES:
            g = c * C // 64 + tl.arange(0, GROUPS)
            scale = ((raw[SCALES][:, None] >> (8 * g)[None, :]) & 0xFF).to(tl.int32)
        else:
            scale = raw[SCALES + c].to(tl.int32)
        factor = power_of_two(tl.maximum(scale - 127, -126)).to(tl.float16)
        if GROUPS > 1:
            values = tl.reshape(tl.reshape(values, (N, GROUPS, C // GROUPS)) * factor[:, :, None], (N, C))
        else:
            values = values * factor
        if c == MIXED:
            d = c * C + tl.arange(0, C)
            values = tl.where((d < NOPE)[None, :], values, raw[AT + 1].to(tl.float16))
    return values


@triton.jit
def _places(tile, listed, compressed, first, slots, block_table, SELECTED: tl.constexpr, ENTRIES: tl.constexpr,
            N: tl.constexpr):  # fmt: skip
    """Where the entries of a tile are: pool slots [N]; -1 - i stands for row `first + i` of the window."""
    # Past the list's end, its last entry is read again and masked, so that every address and value is valid.
    n = tl.minimum(tile * N + tl.arange(0, N), tl.maximum(listed, 1) - 1)
    if SELECTED:
        slot = tl.load(slots + n, n < compressed, other=0)
    else:
        slot = tl.load(block_table + n // ENTRIES, n < compressed, other=0) * ENTRIES + n % ENTRIES
    return tl.where(n < compressed, slot, compressed - 1 - n)


@triton.jit
def _offset(place, first, stride_p, window_offset, WINDOW: tl.constexpr, ENTRIES: tl.constexpr, RAW: tl.constexpr):
    """Offsets [N] of these places, in units of RAW per record. Offsets of window rows are relative to the
    pool's start.
    """
    slot = tl.maximum(place, 0)
    stored = (slot // ENTRIES).to(tl.int64) * stride_p + (slot % ENTRIES) * RAW
    ring = (first + tl.maximum(-1 - place, 0)) % WINDOW
    return tl.where(place >= 0, stored, window_offset + ring * RAW)


@triton.jit
def _attend_kernel(q, entries, block_table, slots, lens, window_delta, firsts, counts, sinks, cos, sin, out, part_out,
                   part_lse, queries, heads, k, splits, scale_log2, stride_qt, stride_qh, stride_p, stride_b, stride_w,
                   stride_ot, stride_oh, WINDOW: tl.constexpr, ENTRIES: tl.constexpr, RECORD: tl.constexpr,
                   UNIT: tl.constexpr, NOPE: tl.constexpr, ROPE: tl.constexpr, SCALE_OFFSET: tl.constexpr,
                   C: tl.constexpr, CHUNKS: tl.constexpr, WORD_SCALES: tl.constexpr, SELECTED: tl.constexpr,
                   SPLIT: tl.constexpr, H: tl.constexpr, N: tl.constexpr, CHAINED: tl.constexpr = 0):  # fmt: skip
    """Attention of H heads of one query over its part of the list, with the dims in CHUNKS chunks of C."""
    follow(CHAINED)
    t = tl.program_id(0).to(tl.int64)
    part = tl.program_id(2)
    sequence = t // queries
    h = tl.program_id(1) * H + tl.arange(0, H)
    live_h = h < heads
    DIM: tl.constexpr = NOPE + ROPE
    q += t * stride_qt
    parts_q = ()
    accs = ()
    for c in tl.static_range(CHUNKS):
        d = c * C + tl.arange(0, C)
        at = q + h[:, None] * stride_qh + d[None, :]
        parts_q = parts_q + (tl.load(at, live_h[:, None] & (d < DIM)[None, :], other=0.0),)
        accs = accs + (tl.zeros((H, C), tl.float32),)

    compressed = tl.load(lens + t)
    first = tl.load(firsts + t)
    listed = compressed + tl.load(counts + t)
    tiles = tl.cdiv(listed, N)
    begin = tiles * part // splits
    end = tiles * (part + 1) // splits
    slots += t * k
    block_table += sequence * stride_b
    window_offset = window_delta + sequence * stride_w

    top = tl.full((H,), float("-inf"), tl.float32)
    total = tl.zeros((H,), tl.float32)
    RAW: tl.constexpr = RECORD // UNIT
    # Slots are loaded one tile early, and all loads of a tile are issued before the first is used. Copies through
    # shared memory were no faster: 584-byte records allow only pieces of 8 bytes.
    place = _places(begin, listed, compressed, first, slots, block_table, SELECTED, ENTRIES, N)
    for tile in tl.range(begin, end, num_stages=1):
        offset = _offset(place, first, stride_p, window_offset, WINDOW, ENTRIES, RAW)
        raw = _load_raw(entries, offset, C, CHUNKS, NOPE, ROPE, UNIT, SCALE_OFFSET, WORD_SCALES)
        place = _places(tile + 1, listed, compressed, first, slots, block_table, SELECTED, ENTRIES, N)
        s = tl.zeros((H, N), tl.float32)
        values = ()
        for c in tl.static_range(CHUNKS):
            v = _decode(raw, c, C, CHUNKS, NOPE, N, WORD_SCALES)
            s = tl.dot(parts_q[c], tl.trans(v), s)
            values = values + (v,)
        s = tl.where((tile * N + tl.arange(0, N) < listed)[None, :], s * scale_log2, float("-inf"))
        new = tl.maximum(top, tl.max(s, 1))
        shrink = tl.exp2(top - new)
        p = tl.exp2(s - new[:, None])
        total = total * shrink + tl.sum(p, 1)
        top = new
        weights = p.to(tl.float16)
        grown = ()
        for c in tl.static_range(CHUNKS):
            grown = grown + (tl.dot(weights, values[c], accs[c] * shrink[:, None]),)
        accs = grown

    if SPLIT:
        # A part is normalised by itself; its log-sum gives its weight in the merge.
        inverse = 1.0 / tl.where(total > 0.0, total, 1.0)
        lse = tl.where(total > 0.0, top + tl.log2(tl.where(total > 0.0, total, 1.0)), float("-inf"))
        at = (t * splits + part) * heads
        tl.store(part_lse + at + h, lse, live_h)
        target = part_out + at * DIM
        rows = h * DIM
    else:
        sink = tl.load(sinks + h, live_h, other=0.0) * 1.4426950408889634
        high = tl.maximum(top, sink)
        share = tl.exp2(top - high)
        inverse = share / (total * share + tl.exp2(sink - high))
        target = out + t * stride_ot
        rows = h * stride_oh
    for c in tl.static_range(CHUNKS):
        d = c * C + tl.arange(0, C)
        x = accs[c] * inverse[:, None]
        mask = live_h[:, None] & (d < DIM)[None, :]
        if SPLIT:
            tl.store(target + rows[:, None] + d[None, :], x, mask)
        else:
            if c * C + C > NOPE:
                x = rotate_back(x, cos + t * (ROPE // 2), sin + t * (ROPE // 2), c * C, C, NOPE, ROPE, H)
            store_output(target, rows[:, None] + d[None, :], x, mask)


def sparse_attention(
    q: torch.Tensor,
    records: torch.Tensor,
    slots: torch.Tensor,
    picked: torch.Tensor,
    window: Window,
    heads: Heads,
    out: torch.Tensor,
    *,
    splits: int | None = None,
    tile: tuple[int, int] | None = None,
) -> None:
    """Attend to selected entries and the window (CSA), or to the window alone (picked all 0).

    Shapes:  q [T, H, D] float16, last dim contiguous; out [T, H, D] bfloat16 or float32, likewise, written whole;
             records [P, E, R] uint8; slots [T, K] int32, row t's first picked[t] in [0, P * E); picked [T] int32;
             window and heads as in their classes. splits: over how many programs a query's list is spread; None: chosen
             here. tile: entries and warps; None: the fastest measured.
    Raises:  ValueError: wrong dtype, shape or stride.
    Source:  V4 report, section 2.3.1, equations 17 to 19 and 2.3.3; oracle: reference.attention.
    """
    check(slots.dim() == 2 and slots.shape[0] == q.shape[0], "slots must be [T, K]")
    check(slots.dtype is torch.int32 and slots.is_contiguous(), "slots must be contiguous int32")
    check(picked.shape == (q.shape[0],) and picked.dtype is torch.int32, "picked must be [T] int32")
    _attend(q, records, slots, None, picked, slots.shape[1], window, heads, out, splits, tile)


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
    tile: tuple[int, int] | None = None,
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
    lens: torch.Tensor,
    entries_max: int,
    window: Window,
    heads: Heads,
    out: torch.Tensor,
    splits: int | None,
    tile: tuple[int, int] | None,
) -> None:
    fmt = check_operands(q, records, window, heads, out)
    num_queries, num_heads, dim = q.shape
    if not num_queries:
        return
    head_tile = min(64, max(16, triton.next_power_of_2(num_heads)))
    head_tiles = triton.cdiv(num_heads, head_tile)
    n, warps = tile or _TILE
    tiles = triton.cdiv(entries_max + min(window.records.shape[1], 128), n)
    # A caller that sets `splits` gets the same kernel whatever the batch is.
    many = splits is not None or (num_queries * head_tiles >= _ROLES_PROGRAMS_MIN and tiles >= _ROLES_TILES_MIN)
    splits = splits or max(1, min(_PROGRAMS // (num_queries * head_tiles), tiles // _TILES_MIN))
    part_out = part_lse = out
    if splits > 1:
        part_out = torch.empty(num_queries, splits, num_heads, dim, dtype=torch.float32, device=q.device)
        part_lse = torch.empty(num_queries, splits, num_heads, dtype=torch.float32, device=q.device)
    # Offsets are counted in the widest unit that divides all addresses, so that loads are that wide.
    unit = min(byte_alignment(records), byte_alignment(window.records), 8)
    chunk = min(_CHUNK, max(16, triton.next_power_of_2(dim)))
    arguments = (
        q,
        records,
        window.firsts if block_table is None else block_table,
        window.firsts if slots is None else slots,
        lens,
        (window.records.data_ptr() - records.data_ptr()) // unit,
        window.firsts,
        window.counts,
        heads.sinks,
        heads.cos,
        heads.sin,
        out,
        part_out,
        part_lse,
        num_queries // window.records.shape[0],
        num_heads,
        0 if slots is None else entries_max,
        splits,
        heads.scale * _LOG2E,
        q.stride(0),
        q.stride(1),
        records.stride(0) // unit,
        0 if block_table is None else block_table.stride(0),
        window.records.stride(0) // unit,
        out.stride(0),
        out.stride(1),
    )
    grid = (num_queries, head_tiles, splits)
    layout = {"WINDOW": window.records.shape[1], "ENTRIES": records.shape[1]}
    kind = {"SELECTED": slots is not None, "SPLIT": splits > 1}
    # The kernel with roles supports V4's shapes only, and takes a tile's largest score before scaling the scores.
    known = tile is None and unit == 8 and num_heads >= 32 and (dim, fmt.rope_dim) == (512, 64) and heads.scale > 0
    if many and known and hopper.available(q):
        from antefix_kernels.decode_attention_hopper import attend_kernel

        attend_kernel[grid](*arguments, **layout, **kind, num_warps=4)
    else:
        _attend_kernel[grid](
            *arguments,
            **layout,
            **kind,
            RECORD=fmt.nbytes,
            UNIT=unit,
            NOPE=fmt.nope_dim,
            ROPE=fmt.rope_dim,
            SCALE_OFFSET=fmt.scale_offset,
            C=chunk,
            CHUNKS=triton.cdiv(dim, chunk),
            WORD_SCALES=fmt.nbytes - fmt.scale_offset == 8 and unit == 8,
            H=head_tile,
            N=n,
            num_warps=warps,
            **chained.options(q),
        )
    if splits > 1:
        merge_parts(part_out, part_lse, heads, out)
