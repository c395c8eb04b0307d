"""Attention of many queries over few sequences: entries are decoded once to FP16, then read by every query.

In a prefill chunk each entry is read by hundreds of queries; decoding it for each costs more than reading 1,024 bytes
instead of 584. The decoded copy is scratch: [S, rows + W, D], a sequence's entries and then its window rows.

Shapes:  T = S * Q queries, H heads, D = nope + rope dims, K selected, W window rows, rows = entries decoded.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from antefix_kernels import hopper
from antefix_kernels.finish import rotate_back, store_output
from antefix_kernels.gather import unpack_entries
from antefix_kernels.number_formats import check
from antefix_kernels.operands import Heads, Window, check_operands

# Entries, warps and stages of a program, the fastest measured: for picked entries (with index loads), for all entries.
_TILE_PICKED = (64, 8, 3)
_TILE_ALL = (64, 8, 2)
_LOG2E = 1.4426950408889634
# Programs of the kernel with roles, one per multiprocessor.
_PROGRAMS = 132


@triton.jit(do_not_specialize=["queries", "rows"])
def _prefill_kernel(q, values, indices, lens, firsts, counts, sinks, cos, sin, out, queries, heads, k, rows,
                           scale_log2, stride_qt, stride_qh, stride_ot, stride_oh, WINDOW: tl.constexpr,
                           NOPE: tl.constexpr, ROPE: tl.constexpr, D: tl.constexpr, SELECTED: tl.constexpr,
                           H: tl.constexpr, N: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """H heads of one query over decoded entries: values [S, rows + WINDOW, D] FP16, a sequence's entries, then its
    window rows. The loop decodes nothing, because copies go straight to where the tensor cores read.
    """
    t = tl.program_id(1).to(tl.int64)
    sequence = t // queries
    h = tl.program_id(0) * H + tl.arange(0, H)
    live_h = h < heads
    DIM: tl.constexpr = NOPE + ROPE
    d = tl.arange(0, D)
    x = tl.load(
        q + t * stride_qt + h[:, None] * stride_qh + d[None, :], live_h[:, None] & (d < DIM)[None, :], other=0.0
    )
    compressed = tl.load(lens + t)
    first = tl.load(firsts + t)
    listed = compressed + tl.load(counts + t)
    indices += t * k
    values += sequence * (rows + WINDOW) * D
    top = tl.full((H,), float("-inf"), tl.float32)
    total = tl.zeros((H,), tl.float32)
    acc = tl.zeros((H, D), tl.float32)
    for tile in tl.range(0, tl.cdiv(listed, N), num_stages=STAGES):
        n = tl.minimum(tile * N + tl.arange(0, N), tl.maximum(listed, 1) - 1)
        if SELECTED:
            row = tl.load(indices + n, n < compressed, other=0)
        else:
            row = n
        row = tl.where(n < compressed, row, rows + (first + n - compressed) % WINDOW)
        v = tl.load(values + row[:, None].to(tl.int64) * D + d[None, :])
        s = tl.dot(x, tl.trans(v))
        s = tl.where((tile * N + tl.arange(0, N) < listed)[None, :], s, float("-inf"))
        new = tl.maximum(top, tl.max(s, 1) * scale_log2)
        shrink = tl.exp2(top - new)
        p = tl.exp2(tl.fma(s, scale_log2, -new[:, None]))
        total = tl.fma(total, shrink, tl.sum(p, 1))
        acc = tl.dot(p.to(tl.float16), v, acc * shrink[:, None])
        top = new
    sink = tl.load(sinks + h, live_h, other=0.0) * 1.4426950408889634
    high = tl.maximum(top, sink)
    share = tl.exp2(top - high)
    acc = acc * (share / (total * share + tl.exp2(sink - high)))[:, None]
    acc = rotate_back(acc, cos + t * (ROPE // 2), sin + t * (ROPE // 2), 0, D, NOPE, ROPE, H)
    at = t * stride_ot + h[:, None] * stride_oh + d[None, :]
    store_output(out, at, acc, live_h[:, None] & (d < DIM)[None, :])


def decode_sequences(
    records: torch.Tensor,
    block_table: torch.Tensor,
    num_entries_max: int,
    window: torch.Tensor,
    rope_dim: int,
    dim: int,
) -> torch.Tensor:
    """Decode each sequence's first num_entries_max entries and its window rows.

    Shapes:  records [P, E, R] uint8; block_table [S, B] int32; window [S, W, R] uint8.
             Returns [S, num_entries_max + W, D] float16, D the power of two that holds dim, zeros past dim.
    Raises:  ValueError: wrong dtype, shape or stride.
    """
    sequences, per_block = block_table.shape[0], records.shape[1]
    check(window.shape[0] == sequences, "block_table and window name different sequences")
    check(num_entries_max <= block_table.shape[1] * per_block, "num_entries_max exceeds the block tables")
    padded = triton.next_power_of_2(dim)
    rows, device = num_entries_max + window.shape[1], records.device
    make = torch.empty if padded == dim else torch.zeros
    values = make(sequences, rows, padded, dtype=torch.float16, device=device)
    inside = torch.arange(per_block, dtype=torch.int32, device=device)
    blocks = block_table[:, : triton.cdiv(num_entries_max, per_block), None]
    slots = torch.add(inside, blocks, alpha=per_block).flatten(1)
    ring = torch.arange(window.shape[1], dtype=torch.int32, device=device)
    for s in range(sequences):
        unpack_entries(records, slots[s, :num_entries_max], values[s, :num_entries_max, :dim], rope_dim)
        unpack_entries(window[s : s + 1], ring, values[s, num_entries_max:, :dim], rope_dim)
    return values


def decode_slots(
    records: torch.Tensor, slots: torch.Tensor, window: torch.Tensor, rope_dim: int, dim: int
) -> torch.Tensor:
    """Decode the named entries alone, and one sequence's window rows: for queries too few to decode all entries for.

    Shapes:  records [P, E, R] uint8; slots [N] int32 in [0, P * E); window [1, W, R] uint8.
             Returns [1, N + W, D] float16 as decode_sequences does; entry i is slot i's.
    Raises:  ValueError: wrong dtype, shape or stride.
    """
    check(window.shape[0] == 1, "slots name the entries of one sequence")
    padded = triton.next_power_of_2(dim)
    make = torch.empty if padded == dim else torch.zeros
    values = make(1, len(slots) + window.shape[1], padded, dtype=torch.float16, device=records.device)
    unpack_entries(records, slots, values[0, : len(slots), :dim], rope_dim)
    ring = torch.arange(window.shape[1], dtype=torch.int32, device=records.device)
    unpack_entries(window, ring, values[0, len(slots) :, :dim], rope_dim)
    return values


def prefill_attention(
    q: torch.Tensor,
    values: torch.Tensor,
    indices: torch.Tensor | None,
    lens: torch.Tensor,
    window: Window,
    heads: Heads,
    out: torch.Tensor,
    *,
    tile: tuple[int, int, int] | None = None,
) -> None:
    """Attend to decoded entries and the window: to the picked ones (CSA), or to the first lens[t] (HCA).

    Shapes:  q [T, H, D] float16; out likewise bfloat16 or float32; values as decode_sequences returns them for the
             same window; indices [T, K] int32 into a sequence's entries, of which row t's first lens[t] count, or None;
             lens [T] int32.
             tile: entries, warps, stages; None: the fastest measured.
    Raises:  ValueError: wrong dtype, shape or stride.
    Source:  as attention.sparse_attention and attention.hca_attention; oracle: reference.attention.
    """
    fmt = check_operands(q, window.records, window, heads, out)
    (num_queries, num_heads, _), (sequences, ring) = q.shape, window.records.shape[:2]
    check(values.dim() == 3 and values.is_contiguous() and values.dtype is torch.float16, "values: [S, N, D] float16")
    check(values.shape[0] == sequences and values.shape[1] >= ring, "values and window name different sequences")
    check(values.shape[2] == triton.next_power_of_2(fmt.head_dim), "values have another head dim")
    check(lens.shape == (num_queries,) and lens.dtype is torch.int32 and lens.is_contiguous(), "lens: [T] int32")
    if indices is not None:
        check(indices.dim() == 2 and indices.shape[0] == num_queries, "indices must be [T, K]")
        check(indices.dtype is torch.int32 and indices.is_contiguous(), "indices must be contiguous int32")
    if not num_queries:
        return
    head_tile = min(64, max(16, triton.next_power_of_2(num_heads)))
    head_tiles = triton.cdiv(num_heads, head_tile)
    arguments = (
        q,
        values,
        lens if indices is None else indices,
        lens,
        window.firsts,
        window.counts,
        heads.sinks,
        heads.cos,
        heads.sin,
        out,
        num_queries // sequences,
    )
    rest = (
        num_heads,
        0 if indices is None else indices.shape[1],
        values.shape[1] - ring,
        heads.scale * _LOG2E,
        q.stride(0),
        q.stride(1),
        out.stride(0),
        out.stride(1),
    )
    # The kernel with roles supports V4's shapes only, takes a tile's largest score before scaling the scores, and
    # copies 16 bytes at a time. The number of queries must not choose the kernel: a query's bits would depend on it.
    known = tile is None and num_heads >= 32 and (fmt.head_dim, fmt.rope_dim) == (512, 64) and heads.scale > 0
    if known and values.data_ptr() % 16 == 0 and hopper.available(q):
        from antefix_kernels.prefill_attention_hopper import attend_kernel

        items = num_queries * head_tiles
        kind = {"WINDOW": ring, "SELECTED": indices is not None, "num_warps": 4, "enable_fp_fusion": False}
        attend_kernel[(min(items, _PROGRAMS),)](*arguments, items, head_tiles, *rest, **kind)
        return
    n, warps, stages = tile or (_TILE_ALL if indices is None else _TILE_PICKED)
    _prefill_kernel[(head_tiles, num_queries)](
        *arguments,
        *rest,
        WINDOW=ring,
        NOPE=fmt.nope_dim,
        ROPE=fmt.rope_dim,
        D=values.shape[2],
        SELECTED=indices is not None,
        H=head_tile,
        N=n,
        STAGES=stages,
        num_warps=warps,
        enable_fp_fusion=False,
    )
