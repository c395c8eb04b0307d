"""Prefill attention for Hopper in Gluon: roles that copy, score and sum at the same time.

    scorer    4 warps   scores a tile, takes its softmax, sums the left half of the dims
    summer    4 warps   sums the right half of the dims
    copier    4 warps   copies decoded entries from memory to shared memory, up to two tiles ahead

The same function as _prefill_kernel of prefill_attention.py, but only for V4's entry (512 dims, 64 of them RoPE) and
scales above zero on compute capability 9.0. All other cases, and Triton's interpreter, use the plain kernel.

A program takes one (query, 64 heads) after another. The copier fetches the next query's entries while the other
roles finish a query. A query's bits do not depend on which program computes it, nor on other queries: its list is
taken in tiles from its start, and every rounding is written here (launch with enable_fp_fusion=False).

Shapes:  as in prefill_attention.py; 64 heads and 64 entries a tile, dims in two halves of 256.
"""

# mypy: ignore-errors
# (device code: Gluon's types are those of its compiler)
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from antefix_kernels.decode_attention_hopper import ROPE_PAIRS, H, _exp2, _halves, _queries, _whole, _write
from antefix_kernels.tiles_hopper import HALF, N

# The same call before and after Triton 3.9's change of names.
bring = async_copy.async_load if hasattr(async_copy, "async_load") else async_copy.async_copy_global_to_shared
# Threads of the copier, each of which arrives when its copies are complete.
COPYING = gl.constexpr(128)


@gluon.jit
def _rows(tile, compressed, first, listed, indices, rows, SELECTED: gl.constexpr, WINDOW: gl.constexpr,
          layout: gl.constexpr):  # fmt: skip
    """Rows of `values` [N] of a tile's entries; past the list's end its last entry comes again."""
    n = gl.minimum(tile * N + gl.arange(0, N, layout), gl.maximum(listed, 1) - 1)
    row = n
    if SELECTED:
        row = gl.load(indices + n, mask=n < compressed, other=0)
    return gl.where(n < compressed, row, rows + (first + gl.maximum(n - compressed, 0)) % WINDOW)


@gluon.jit
def _copier(values, indices, lens, firsts, counts, queries, items, head_tiles, k, rows, left, right, full_left,
            full_right, empty_left, empty_right, SELECTED: gl.constexpr, WINDOW: gl.constexpr):  # fmt: skip
    # A warp copies half of a row at once, 16 bytes a thread.
    spread: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [4, 1], [1, 0])
    each: gl.constexpr = gl.SliceLayout(1, spread)
    d = gl.expand_dims(gl.arange(0, HALF, gl.SliceLayout(0, spread)), 0)
    copied = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        t = item // head_tiles
        compressed = gl.load(lens + t)
        first = gl.load(firsts + t)
        listed = compressed + gl.load(counts + t)
        base = values + (t // queries).to(gl.int64) * (rows + WINDOW) * (2 * HALF)
        picked = indices + t.to(gl.int64) * k
        row = _rows(0, compressed, first, listed, picked, rows, SELECTED, WINDOW, each)
        for tile in range((listed + N - 1) // N):
            buffer = copied % 2
            at = base + gl.expand_dims(row.to(gl.int64) * (2 * HALF), 1) + d
            row = _rows(tile + 1, compressed, first, listed, picked, rows, SELECTED, WINDOW, each)
            # The right half is free first. Those who wait for the copies do the fence.
            mbarrier.wait(empty_right.index(buffer), ((copied // 2) & 1) ^ 1)
            bring(right.index(buffer), at + HALF)
            async_copy.mbarrier_arrive(full_right.index(buffer), increment_count=False)
            mbarrier.wait(empty_left.index(buffer), ((copied // 2) & 1) ^ 1)
            bring(left.index(buffer), at)
            async_copy.mbarrier_arrive(full_left.index(buffer), increment_count=False)
            copied += 1


@gluon.jit
def _soften(s, tile, listed, top, total, scale_log2, own: gl.constexpr):
    """A tile's softmax. Returns the largest score so far, the sum of weights so far, FP16 weights relative to that
    largest score, and the factor by which earlier sums must shrink.
    """
    if tile * N + N > listed:
        column = gl.arange(0, N, gl.SliceLayout(0, s.type.layout))
        s = gl.where(gl.expand_dims(tile * N + column < listed, 0), s, float("-inf"))
    new = gl.maximum(top, gl.max(s, 1) * scale_log2)
    shrink = _exp2(top - new)
    scale = gl.full(s.shape, scale_log2, gl.float32, s.type.layout)
    p = _exp2(gl.fma(s, scale, gl.expand_dims(-new, 1).broadcast_to(s.shape)))
    part = gl.sum(gl.reshape(p, [H, 8, N // 8]), 1)
    total = gl.fma(total, gl.expand_dims(gl.convert_layout(shrink, own), 1).broadcast_to(total.shape), part)
    return new, total, p.to(gl.float16), shrink


@gluon.jit
def _scorer(q, sinks, lens, counts, out, items, head_tiles, heads, scale_log2, stride_qt, stride_qh, stride_ot,
            stride_oh, q_left, q_right, left, right, full_left, full_right, empty_left, probabilities, shrinks,
            inverses, ready, done, asked):  # fmt: skip
    scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    sums: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16])
    rows: gl.constexpr = gl.SliceLayout(1, scores)
    rows_out: gl.constexpr = gl.SliceLayout(1, sums)
    zero = gl.full([H, N], 0.0, gl.float32, scores)
    scored = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        t = item // head_tiles
        h0 = item % head_tiles * H
        x = _queries(q + t.to(gl.int64) * stride_qt, stride_qh, h0, heads)
        listed = gl.load(lens + t) + gl.load(counts + t)
        h = h0 + gl.arange(0, H, rows)
        sink = gl.load(sinks + h, mask=h < heads, other=0.0) * 1.4426950408889634
        q_left.store(x)
        fence_async_shared()
        # The summer has read everything of the query before.
        mbarrier.wait(asked, (item // gl.num_programs(0)) & 1)

        top = gl.full([H], float("-inf"), gl.float32, rows)
        # Each thread keeps its own part of the sum; the parts of four neighbours are added at the end.
        total = gl.sum(gl.reshape(zero, [H, 8, N // 8]), 1)
        own: gl.constexpr = gl.SliceLayout(1, total.type.layout)
        acc = gl.full([H, HALF], 0.0, gl.float32, sums)
        for tile in range((listed + N - 1) // N):
            buffer = scored % 2
            phase = (scored // 2) & 1
            mbarrier.wait(full_right.index(buffer), phase)
            mbarrier.wait(full_left.index(buffer), phase)
            fence_async_shared()
            s = warpgroup_mma(q_right, right.index(buffer).permute((1, 0)), zero, use_acc=False, is_async=True)
            s = warpgroup_mma(q_left, left.index(buffer).permute((1, 0)), s, is_async=True)
            s = warpgroup_mma_wait(0, deps=(s,))
            top, total, p, shrink = _soften(s, tile, listed, top, total, scale_log2, own)
            probabilities.index(buffer).store(p)
            shrinks.index(buffer).store(shrink)
            fence_async_shared()
            mbarrier.arrive(ready.index(buffer), count=1)
            acc = acc * gl.expand_dims(gl.convert_layout(shrink, rows_out), 1)
            acc = warpgroup_mma(probabilities.index(buffer), left.index(buffer), acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=(acc,))
            mbarrier.arrive(empty_left.index(buffer), count=1)
            scored += 1
        weights = gl.convert_layout(gl.sum(total, 1), rows)
        best = gl.maximum(top, sink)
        kept = gl.exp2(top - best)
        inverses.store(kept / gl.fma(weights, kept, gl.exp2(sink - best)))
        mbarrier.arrive(done, count=1)
        x = acc * gl.expand_dims(inverses.load(rows_out), 1)
        _write(x, q_left, out + t.to(gl.int64) * stride_ot, stride_oh, h0, heads)


@gluon.jit
def _summer(q, cos, sin, lens, counts, out, items, head_tiles, heads, stride_qt, stride_qh, stride_ot, stride_oh,
            q_right, right, full_right, empty_right, probabilities, shrinks, inverses, turns, ready, done,
            asked):  # fmt: skip
    sums: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16])
    rows: gl.constexpr = gl.SliceLayout(1, sums)
    pair = gl.arange(0, ROPE_PAIRS, gl.BlockedLayout([1], [32], [4], [0]))
    summed = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        t = item // head_tiles
        h0 = item % head_tiles * H
        x = _queries(q + t.to(gl.int64) * stride_qt + HALF, stride_qh, h0, heads)
        listed = gl.load(lens + t) + gl.load(counts + t)
        # cos and sin for rotating the RoPE dims back are loaded with the queries, so that the end waits for no load.
        turns.index(0).store(gl.load(cos + t * ROPE_PAIRS + pair))
        turns.index(1).store(gl.load(sin + t * ROPE_PAIRS + pair))
        q_right.store(x)
        fence_async_shared()
        mbarrier.arrive(asked, count=1)
        acc = gl.full([H, HALF], 0.0, gl.float32, sums)
        for _ in range((listed + N - 1) // N):
            buffer = summed % 2
            mbarrier.wait(full_right.index(buffer), (summed // 2) & 1)
            mbarrier.wait(ready.index(buffer), (summed // 2) & 1)
            fence_async_shared()
            acc = acc * gl.expand_dims(shrinks.index(buffer).load(rows), 1)
            acc = warpgroup_mma(probabilities.index(buffer), right.index(buffer), acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=(acc,))
            mbarrier.arrive(empty_right.index(buffer), count=1)
            summed += 1
        mbarrier.wait(done, (item // gl.num_programs(0)) & 1)
        x = acc * gl.expand_dims(inverses.load(rows), 1)
        # Rotate the RoPE dims back: a pair's dims are neighbours in one thread.
        low, high = _halves(x)
        third, rope = _halves(high)
        even, odd = gl.split(gl.reshape(rope, [H, ROPE_PAIRS, 2]))
        pairs: gl.constexpr = gl.SliceLayout(0, even.type.layout)
        c = gl.expand_dims(turns.index(0).load(pairs), 0)
        s = gl.expand_dims(turns.index(1).load(pairs), 0)
        rope = gl.reshape(gl.join(even * c + odd * s, odd * c - even * s), [H, 2 * ROPE_PAIRS])
        x = gl.convert_layout(_whole(low, _whole(third, rope)), sums, assert_trivial=True)
        _write(x, q_right, out + t.to(gl.int64) * stride_ot + HALF, stride_oh, h0, heads)


@gluon.jit(do_not_specialize=["queries", "items", "rows", "k"])
def attend_kernel(q, values, indices, lens, firsts, counts, sinks, cos, sin, out, queries, items, head_tiles, heads,
                  k, rows, scale_log2, stride_qt, stride_qh, stride_ot, stride_oh, WINDOW: gl.constexpr,
                  SELECTED: gl.constexpr):  # fmt: skip
    """64 heads of one query after another, `items` = queries * head_tiles in all: _prefill_kernel of
    prefill_attention.py.
    """
    tile_layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    q_left = gl.allocate_shared_memory(gl.float16, [H, HALF], tile_layout)
    q_right = gl.allocate_shared_memory(gl.float16, [H, HALF], tile_layout)
    left = gl.allocate_shared_memory(gl.float16, [2, N, HALF], tile_layout)
    right = gl.allocate_shared_memory(gl.float16, [2, N, HALF], tile_layout)
    probabilities = gl.allocate_shared_memory(gl.float16, [2, H, N], tile_layout)
    shrinks = gl.allocate_shared_memory(gl.float32, [2, H], flat)
    inverses = gl.allocate_shared_memory(gl.float32, [H], flat)
    turns = gl.allocate_shared_memory(gl.float32, [2, ROPE_PAIRS], flat)
    full_left = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    full_right = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    empty_left = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    empty_right = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    ready = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    asked = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    done = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for b in gl.static_range(2):
        mbarrier.init(full_left.index(b), count=COPYING)
        mbarrier.init(full_right.index(b), count=COPYING)
        mbarrier.init(empty_left.index(b), count=1)
        mbarrier.init(empty_right.index(b), count=1)
        mbarrier.init(ready.index(b), count=1)
    mbarrier.init(asked, count=1)
    mbarrier.init(done, count=1)
    gl.warp_specialize(
        [
            (_scorer, (q, sinks, lens, counts, out, items, head_tiles, heads, scale_log2, stride_qt, stride_qh,
                       stride_ot, stride_oh, q_left, q_right, left, right, full_left, full_right, empty_left,
                       probabilities, shrinks, inverses, ready, done, asked)),
            (_summer, (q, cos, sin, lens, counts, out, items, head_tiles, heads, stride_qt, stride_qh, stride_ot,
                       stride_oh, q_right, right, full_right, empty_right, probabilities, shrinks, inverses, turns,
                       ready, done, asked)),
            (_copier, (values, indices, lens, firsts, counts, queries, items, head_tiles, k, rows, left, right,
                       full_left, full_right, empty_left, empty_right, SELECTED, WINDOW)),
        ],
        [4, 4],
        [192, 96],
    )  # fmt: skip
