"""Decode attention for Hopper in Gluon: roles that load, decode, score and sum at the same time.

    loaders   2 x 4 warps   read packed records, half of a tile each, convert them to FP16, store them to shared memory
    scorer    4 warps       scores a tile, takes its softmax, sums the left half of the dims
    summer    4 warps       sums the right half of the dims; prefetches the loaders' next tiles into the L2 cache

The same function as the kernel of decode_attention.py, but only for V4's entry (512 dims, 64 of them RoPE; 584 bytes)
on compute capability 9.0. All other cases, and Triton's interpreter, use the plain kernel.

The cycles that a tile of 64 entries and 64 heads costs a multiprocessor: 3,250 for loading from memory, 2,048 of the
tensor cores, 3,500 on the path to L1 and shared memory (1,660 of them operands of products, 500 decoded entries, 950
cache lines of loads, counted by Nsight Compute). So the path to L1 and shared memory bounds this kernel. One tile takes
about 5,000 cycles.

Shapes:  as in attention.py; 64 heads and 64 entries a tile, dims in two halves of 256.
"""

# mypy: ignore-errors
# (device code: Gluon's types are those of its compiler)
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from antefix_kernels.tiles_hopper import HALF, PLACED, ROWS, N, load_tiles, prefetch, share, view

H = gl.constexpr(64)
ROPE_PAIRS = gl.constexpr(32)
EXP2 = gl.constexpr("ex2.approx.ftz.f32 $0, $1;")


@gluon.jit
def _exp2(x):
    """2^x in one instruction. Results under 2^-126 become zero, which makes no difference in a softmax."""
    return gl.inline_asm_elementwise(EXP2, "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


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
    p = _exp2(s * scale_log2 - gl.expand_dims(new, 1))
    total = total * gl.expand_dims(gl.convert_layout(shrink, own), 1) + gl.sum(gl.reshape(p, [H, 8, N // 8]), 1)
    return new, total, p.to(gl.float16), shrink


@gluon.jit
def _write(x, room, target, row_stride, h0, heads):
    """Write x [H, HALF] as rows of target. BF16 values go through `room`, a query's memory, so that stores are 16 bytes
    wide.
    """
    if target.dtype.element_ty == gl.bfloat16:
        spread: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [4, 1], [1, 0])
        there = view(room, gl.bfloat16, [H, HALF], room.layout)
        there.store(x.to(gl.bfloat16))
        rounded = there.load(spread)
        h = h0 + gl.arange(0, H, gl.SliceLayout(1, spread))
        d = gl.arange(0, HALF, gl.SliceLayout(0, spread))
        at = target + gl.expand_dims(h * row_stride, 1) + gl.expand_dims(d, 0)
        gl.store(at, rounded, mask=gl.expand_dims(h < heads, 1))
    else:
        layout: gl.constexpr = x.type.layout
        h = h0 + gl.arange(0, H, gl.SliceLayout(1, layout))
        d = gl.arange(0, HALF, gl.SliceLayout(0, layout))
        at = target + gl.expand_dims(h * row_stride, 1) + gl.expand_dims(d, 0)
        gl.store(at, x.to(target.dtype.element_ty), mask=gl.expand_dims(h < heads, 1))


@gluon.jit
def _queries(q, stride_qh, h0, heads):
    """Load half of the dims of 64 heads' queries."""
    spread: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [4, 1], [1, 0])
    h = gl.arange(0, H, gl.SliceLayout(1, spread))
    d = gl.arange(0, HALF, gl.SliceLayout(0, spread))
    at = q + gl.expand_dims((h0 + h) * stride_qh, 1) + gl.expand_dims(d, 0)
    return gl.load(at, mask=gl.expand_dims(h0 + h < heads, 1), other=0.0)


@gluon.jit
def _norm(top, total, inverses, part_lse, h0, heads, SPLIT: gl.constexpr):
    """Store the factors that normalise the sums in the place of the sinks, and a part's log-sum."""
    rows: gl.constexpr = top.type.layout
    total = gl.convert_layout(gl.sum(total, 1), rows)
    if SPLIT:
        # A part is normalised by itself; its log-sum gives its weight in the merge.
        seen = gl.where(total > 0.0, total, 1.0)
        inverse = 1.0 / seen
        lse = gl.where(total > 0.0, top + gl.log2(seen), float("-inf"))
        h = h0 + gl.arange(0, H, rows)
        gl.store(part_lse + h, lse, mask=h < heads)
    else:
        sink = inverses.load(rows)
        best = gl.maximum(top, sink)
        kept = gl.exp2(top - best)
        inverse = kept / (total * kept + gl.exp2(sink - best))
    inverses.store(inverse)


@gluon.jit
def _scorer(q, sinks, target, part_lse, stride_qh, row_stride, h0, heads, scale_log2, lens, firsts, counts, splits,
            q_left, q_right, left, right, full, empty, probabilities, shrinks, inverses, ready, done, asked,
            SPLIT: gl.constexpr):  # fmt: skip
    scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    sums: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16])
    rows: gl.constexpr = gl.SliceLayout(1, scores)
    rows_out: gl.constexpr = gl.SliceLayout(1, sums)
    x = _queries(q, stride_qh, h0, heads)
    _, _, listed, begin, end = share(lens, firsts, counts, splits, SPLIT)
    if not SPLIT:
        # Sinks are loaded with the queries, into the memory of the later inverses, so that the end waits for no load.
        h = h0 + gl.arange(0, H, rows)
        inverses.store(gl.load(sinks + h, mask=h < heads, other=0.0) * 1.4426950408889634)
    q_left.store(x)
    fence_async_shared()
    mbarrier.wait(asked, 0)

    top = gl.full([H], float("-inf"), gl.float32, rows)
    # Each thread keeps its own part of the sum; the parts of four neighbours are added at the end, not in every tile.
    total = gl.sum(gl.reshape(gl.full([H, N], 0.0, gl.float32, scores), [H, 8, N // 8]), 1)
    own: gl.constexpr = gl.SliceLayout(1, total.type.layout)
    acc = gl.full([H, HALF], 0.0, gl.float32, sums)
    zero = gl.full([H, N], 0.0, gl.float32, scores)
    # A tile's sums run after the next tile's scores, during its softmax. The first sums are of zeros.
    probabilities.index(1).store(gl.full([H, N], 0.0, gl.float16, scores))
    for tile in range(begin, end):
        i = tile - begin
        buffer = i % 2
        before = gl.maximum(i - 1, 0) % 2
        mbarrier.wait(full.index(buffer), (i // 2) & 1)
        fence_async_shared()
        s = warpgroup_mma(q_left, left.index(buffer).permute((1, 0)), zero, use_acc=False, is_async=True)
        s = warpgroup_mma(q_right, right.index(buffer).permute((1, 0)), s, is_async=True)
        acc = warpgroup_mma(probabilities.index(buffer ^ 1), left.index(before), acc, is_async=True)
        s = warpgroup_mma_wait(1, deps=(s,))
        top, total, p, shrink = _soften(s, tile, listed, top, total, scale_log2, own)
        probabilities.index(buffer).store(p)
        shrinks.index(buffer).store(shrink)
        mbarrier.arrive(ready.index(buffer), count=1)
        acc = warpgroup_mma_wait(0, deps=(acc,))
        mbarrier.arrive(empty.index(before), count=1, pred=i > 0)
        acc = acc * gl.expand_dims(gl.convert_layout(shrink, rows_out), 1)
    if begin < end:
        fence_async_shared()
        last = (end - 1 - begin) % 2
        acc = warpgroup_mma(probabilities.index(last), left.index(last), acc, is_async=True)
        _norm(top, total, inverses, part_lse, h0, heads, SPLIT)
        mbarrier.arrive(done, count=1)
        acc = warpgroup_mma_wait(0, deps=(acc,))
    else:
        _norm(top, total, inverses, part_lse, h0, heads, SPLIT)
        mbarrier.arrive(done, count=1)
    x = acc * gl.expand_dims(inverses.load(rows_out), 1)
    _write(x, q_left, target, row_stride, h0, heads)


@gluon.jit
def _halves(x):
    """The two halves of x's columns, without moving data between threads."""
    return gl.split(gl.permute(gl.reshape(x, [H, 2, x.shape[1] // 2]), (0, 2, 1)))


@gluon.jit
def _whole(low, high):
    high = gl.convert_layout(high, low.type.layout, assert_trivial=True)
    return gl.reshape(gl.permute(gl.join(low, high), (0, 2, 1)), [H, 2 * low.shape[1]])


@gluon.jit
def _summer(q, stride_qh, cos, sin, target, row_stride, h0, heads, lens, firsts, counts, splits, q_right, right, full,
            empty, probabilities, shrinks, inverses, turns, ready, done, asked, entries, slots, k, block_table,
            stride_p, window_offset, SPLIT: gl.constexpr, SELECTED: gl.constexpr, ENTRIES: gl.constexpr,
            WINDOW: gl.constexpr):  # fmt: skip
    sums: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16])
    rows: gl.constexpr = gl.SliceLayout(1, sums)
    x = _queries(q + HALF, stride_qh, h0, heads)
    compressed, first, listed, begin, end = share(lens, firsts, counts, splits, SPLIT)
    stop = gl.minimum(listed, end * N)
    if not SPLIT:
        # cos and sin for rotating the RoPE dims back are loaded with the queries too.
        pair = gl.arange(0, ROPE_PAIRS, gl.BlockedLayout([1], [32], [4], [0]))
        turns.index(0).store(gl.load(cos + pair))
        turns.index(1).store(gl.load(sin + pair))
    # In a short list the queries should arrive first, so its first tiles are not prefetched.
    skipped = 1
    if end - begin > 24:
        skipped = 0
        prefetch(begin + 1, entries, stop, compressed, first, slots, k, block_table, stride_p, window_offset, SELECTED,
                 ENTRIES, WINDOW)  # fmt: skip
    q_right.store(x)
    fence_async_shared()
    mbarrier.arrive(asked, count=1)
    acc = gl.full([H, HALF], 0.0, gl.float32, sums)
    for tile in range(begin, end):
        i = tile - begin
        buffer = i % 2
        if i >= skipped:
            prefetch(tile + 2, entries, stop, compressed, first, slots, k, block_table, stride_p, window_offset,
                     SELECTED, ENTRIES, WINDOW)  # fmt: skip
        mbarrier.wait(full.index(buffer), (i // 2) & 1)
        mbarrier.wait(ready.index(buffer), (i // 2) & 1)
        fence_async_shared()
        acc = acc * gl.expand_dims(shrinks.index(buffer).load(rows), 1)
        acc = warpgroup_mma(probabilities.index(buffer), right.index(buffer), acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=(acc,))
        mbarrier.arrive(empty.index(buffer), count=1)

    mbarrier.wait(done, 0)
    x = acc * gl.expand_dims(inverses.load(rows), 1)
    if not SPLIT:
        # Rotate the RoPE dims back: a pair's dims are neighbours in one thread.
        low, high = _halves(x)
        third, rope = _halves(high)
        even, odd = gl.split(gl.reshape(rope, [H, ROPE_PAIRS, 2]))
        pairs: gl.constexpr = gl.SliceLayout(0, even.type.layout)
        c = gl.expand_dims(turns.index(0).load(pairs), 0)
        s = gl.expand_dims(turns.index(1).load(pairs), 0)
        rope = gl.reshape(gl.join(even * c + odd * s, odd * c - even * s), [H, 2 * ROPE_PAIRS])
        x = gl.convert_layout(_whole(low, _whole(third, rope)), sums, assert_trivial=True)
    _write(x, q_right, target + HALF, row_stride, h0, heads)


@gluon.jit
def attend_kernel(q, entries, block_table, slots, lens, window_delta, firsts, counts, sinks, cos, sin, out, part_out,
                  part_lse, queries, heads, k, splits, scale_log2, stride_qt, stride_qh, stride_p, stride_b, stride_w,
                  stride_ot, stride_oh, WINDOW: gl.constexpr, ENTRIES: gl.constexpr, SELECTED: gl.constexpr,
                  SPLIT: gl.constexpr):  # fmt: skip
    """64 heads of one query over its part of the list: _attend_kernel of decode_attention.py."""
    # A query's programs start one after another, so that the second finds in L2 what the first has read of the list.
    program = gl.program_id(1) * gl.num_programs(0) + gl.program_id(0)
    row = program // gl.num_programs(1)
    h0 = program % gl.num_programs(1) * H
    part = gl.program_id(2)
    t = row.to(gl.int64)
    sequence = (row // queries).to(gl.int64)
    lens += t
    firsts += t
    counts += t
    q += t * stride_qt
    slots += t * k
    block_table += sequence * stride_b
    cos += t * ROPE_PAIRS
    sin += t * ROPE_PAIRS
    window_offset = window_delta + sequence * stride_w
    if SPLIT:
        part_lse += (t * splits + part) * heads
        target = part_out + (t * splits + part) * heads * (2 * HALF)
        row_stride = 2 * HALF
    else:
        target = out + t * stride_ot
        row_stride = stride_oh

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
    table = gl.allocate_shared_memory(gl.int64, [4 * PLACED, ROWS], flat)
    full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    ready = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    asked = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    done = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for b in gl.static_range(2):
        mbarrier.init(full.index(b), count=2)
        mbarrier.init(empty.index(b), count=2)
        mbarrier.init(ready.index(b), count=1)
    mbarrier.init(asked, count=1)
    mbarrier.init(done, count=1)
    gl.warp_specialize(
        [
            (_scorer, (q, sinks, target, part_lse, stride_qh, row_stride, h0, heads, scale_log2, lens, firsts, counts,
                       splits, q_left, q_right, left, right, full, empty, probabilities, shrinks, inverses, ready,
                       done, asked, SPLIT)),
            (_summer, (q, stride_qh, cos, sin, target, row_stride, h0, heads, lens, firsts, counts, splits, q_right,
                       right, full, empty, probabilities, shrinks, inverses, turns, ready, done, asked, entries,
                       slots, k, block_table, stride_p, window_offset, SPLIT, SELECTED, ENTRIES, WINDOW)),
            (load_tiles, (entries, block_table, slots, k, lens, firsts, counts, splits, stride_p, window_offset,
                       left, right, full, empty, table, SELECTED, SPLIT, ENTRIES, WINDOW, 0)),
            (load_tiles, (entries, block_table, slots, k, lens, firsts, counts, splits, stride_p, window_offset,
                       left, right, full, empty, table, SELECTED, SPLIT, ENTRIES, WINDOW, 1)),
        ],
        [4, 4, 4],
        [160, 80, 80],
    )  # fmt: skip
