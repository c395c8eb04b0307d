"""Decode attention for Hopper in Gluon: three roles a program, so that loads, decoding and both products overlap.

    loader    4 warps   reads packed records, converts them to FP16, stores them to shared memory (two tiles deep)
    scorer    4 warps   scores a tile, takes its softmax, sums the left half of the dims
    summer    4 warps   sums the right half of the dims with the scorer's probabilities

The same function as attention.py's kernel, for V4's entry alone (512 dims, of them 64 RoPE; 584 bytes) on compute
capability 9.0; everything else takes the plain kernel, and Triton's interpreter does too.

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

H = gl.constexpr(64)
N = gl.constexpr(64)
HALF = gl.constexpr(256)
# In units of 8 bytes: one record, its codes, its RoPE values.
RECORD = gl.constexpr(73)
CODES = gl.constexpr(56)
ROPE = gl.constexpr(16)
GROUPS = gl.constexpr(7)
ROPE_PAIRS = gl.constexpr(32)

# Eight FP8 codes of a word times a packed pair of equal FP16 factors.
DECODE_FP8 = gl.constexpr("""{
.reg .b32 a, b; .reg .b16 c, d, e, f;
mov.b64 {a, b}, $4; mov.b32 {c, d}, a; mov.b32 {e, f}, b;
cvt.rn.f16x2.e4m3x2 $0, c; cvt.rn.f16x2.e4m3x2 $1, d; cvt.rn.f16x2.e4m3x2 $2, e; cvt.rn.f16x2.e4m3x2 $3, f;
mul.rn.f16x2 $0, $0, $12; mul.rn.f16x2 $1, $1, $12; mul.rn.f16x2 $2, $2, $12; mul.rn.f16x2 $3, $3, $12;
}""")
# Four BF16 of a word to FP16.
DECODE_BF16 = gl.constexpr("""{
.reg .b32 a, b, c, d; .reg .f32 e, f;
mov.b64 {a, b}, $2;
shl.b32 c, a, 16; and.b32 d, a, 0xffff0000; mov.b32 e, c; mov.b32 f, d; cvt.rn.f16x2.f32 $0, f, e;
shl.b32 c, b, 16; and.b32 d, b, 0xffff0000; mov.b32 e, c; mov.b32 f, d; cvt.rn.f16x2.f32 $1, f, e;
}""")
# A scale byte, 2^(b - 127), as a pair of FP16: through float32, so that FP16's subnormals come out right.
SCALE_PAIR = gl.constexpr("""{
.reg .b32 a; .reg .f32 f;
shl.b32 a, $1, 23; mov.b32 f, a; cvt.rn.f16x2.f32 $0, f, f;
}""")


@gluon.jit
def _offsets(tile, listed, compressed, first, slots, block_table, stride_p, window_offset, SELECTED: gl.constexpr,
             ENTRIES: gl.constexpr, WINDOW: gl.constexpr, layout: gl.constexpr):  # fmt: skip
    """Offsets [N] of a tile's records, in words of 8 bytes. Past the list's end its last entry comes again: every
    address and value stays valid."""
    n = gl.minimum(tile * N + gl.arange(0, N, layout), gl.maximum(listed, 1) - 1)
    if SELECTED:
        slot = gl.load(slots + n, mask=n < compressed, other=0)
    else:
        slot = gl.load(block_table + n // ENTRIES, mask=n < compressed, other=0) * ENTRIES + n % ENTRIES
    stored = (slot // ENTRIES).to(gl.int64) * stride_p + (slot % ENTRIES) * RECORD
    ring = (first + gl.maximum(n - compressed, 0)) % WINDOW
    return gl.where(n < compressed, stored, window_offset + ring * RECORD)


@gluon.jit
def _decode_codes(word, factor):
    """Words [N, 8] of a group times packed factors [N, 8]: [N, 64] FP16."""
    wide = gl.inline_asm_elementwise(
        DECODE_FP8, "=r,=r,=r,=r,l,l,l,l,l,l,l,l,r,r,r,r,r,r,r,r",
        [gl.expand_dims(word, 2).broadcast_to([N, 8, 8]), gl.expand_dims(factor, 2).broadcast_to([N, 8, 8])],
        dtype=gl.float16, is_pure=True, pack=8,
    )  # fmt: skip
    return gl.reshape(wide, [N, 64])


@gluon.jit
def _decode_rope(word):
    """Words [N, 16] of four BF16: [N, 64] FP16."""
    wide = gl.inline_asm_elementwise(
        DECODE_BF16, "=r,=r,l,l,l,l", [gl.expand_dims(word, 2).broadcast_to([N, ROPE, 4])],
        dtype=gl.float16, is_pure=True, pack=4,
    )  # fmt: skip
    return gl.reshape(wide, [N, 64])


@gluon.jit
def _side_by_side(a, b, c, d):
    """[N, 256] of four [N, 64], without moving anything between threads."""
    pairs = gl.join(gl.join(a, c), gl.join(b, d))
    return gl.reshape(gl.permute(pairs, (0, 2, 3, 1)), [N, HALF])


@gluon.jit
def _loader(entries, block_table, slots, stride_p, window_offset, begin, end, listed, compressed, first, left, right,
            full, empty, SELECTED: gl.constexpr, ENTRIES: gl.constexpr, WINDOW: gl.constexpr):  # fmt: skip
    """Records to FP16 in shared memory; a tile's loads are asked for while the tile before is converted."""
    wide: gl.constexpr = gl.BlockedLayout([1, 1, 8], [4, 8, 1], [4, 1, 1], [2, 1, 0])
    wide_rope: gl.constexpr = gl.BlockedLayout([1, 2, 4], [4, 8, 1], [4, 1, 1], [2, 1, 0])
    words: gl.constexpr = gl.SliceLayout(2, wide)
    words_rope: gl.constexpr = gl.SliceLayout(2, wide_rope)
    rows: gl.constexpr = gl.SliceLayout(1, words)
    rows_rope: gl.constexpr = gl.SliceLayout(1, words_rope)
    w = gl.expand_dims(gl.arange(0, 8, gl.SliceLayout(0, words)), 0)
    w_rope = gl.expand_dims(gl.arange(0, 16, gl.SliceLayout(0, words_rope)), 0)
    memory = entries.to(gl.pointer_type(gl.int64))

    offset = _offsets(begin, listed, compressed, first, slots, block_table, stride_p, window_offset, SELECTED, ENTRIES,
                      WINDOW, rows)  # fmt: skip
    base = memory + offset
    at = gl.expand_dims(base, 1) + w
    raw = ()
    for g in gl.static_range(GROUPS):
        raw = raw + (gl.load(at + g * 8),)
    at_rope = gl.expand_dims(gl.convert_layout(base, rows_rope), 1) + w_rope
    rope = gl.load(at_rope + CODES)
    scales = gl.load(base + (CODES + ROPE))
    offset = _offsets(begin + 1, listed, compressed, first, slots, block_table, stride_p, window_offset, SELECTED,
                      ENTRIES, WINDOW, rows)  # fmt: skip
    for tile in range(begin, end):
        i = tile - begin
        buffer = i % 2
        base = memory + offset
        at = gl.expand_dims(base, 1) + w
        low = (scales & 0xFFFFFFFF).to(gl.int32)
        high = (scales >> 32).to(gl.int32)
        scales = gl.load(base + (CODES + ROPE))
        mbarrier.wait(empty.index(buffer), ((i // 2) & 1) ^ 1)
        values = ()
        fresh = ()
        for g in gl.static_range(GROUPS):
            byte = (low >> (8 * g)) if g < 4 else (high >> (8 * (g - 4)))
            factor = gl.inline_asm_elementwise(SCALE_PAIR, "=r,r", [byte & 0xFF], dtype=gl.int32, is_pure=True, pack=1)
            values = values + (_decode_codes(raw[g], gl.expand_dims(factor, 1).broadcast_to([N, 8])),)
            fresh = fresh + (gl.load(at + g * 8),)
        raw = fresh
        left.index(buffer).store(_side_by_side(values[0], values[1], values[2], values[3]))
        tail = gl.convert_layout(_decode_rope(rope), values[0].type.layout)
        right.index(buffer).store(_side_by_side(values[4], values[5], values[6], tail))
        at_rope = gl.expand_dims(gl.convert_layout(base, rows_rope), 1) + w_rope
        rope = gl.load(at_rope + CODES)
        fence_async_shared()
        mbarrier.arrive(full.index(buffer), count=1)
        offset = _offsets(tile + 2, listed, compressed, first, slots, block_table, stride_p, window_offset, SELECTED,
                          ENTRIES, WINDOW, rows)  # fmt: skip


@gluon.jit
def _scorer(q, sinks, target, part_lse, stride_qh, row_stride, h0, heads, scale_log2, begin, end, listed, q_left,
            q_right, left, right, full, empty, probabilities, shrinks, inverses, ready, done,
            SPLIT: gl.constexpr):  # fmt: skip
    scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    sums: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 256, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, sums, 2)
    rows: gl.constexpr = gl.SliceLayout(1, scores)
    rows_out: gl.constexpr = gl.SliceLayout(1, sums)
    spread: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [4, 1], [1, 0])

    h = gl.arange(0, H, gl.SliceLayout(1, spread))
    d = gl.arange(0, HALF, gl.SliceLayout(0, spread))
    live = gl.expand_dims(h0 + h < heads, 1)
    at = q + gl.expand_dims((h0 + h) * stride_qh, 1) + gl.expand_dims(d, 0)
    q_left.store(gl.load(at, mask=live, other=0.0))
    q_right.store(gl.load(at + HALF, mask=live, other=0.0))
    fence_async_shared()

    top = gl.full([H], float("-inf"), gl.float32, rows)
    total = gl.full([H], 0.0, gl.float32, rows)
    acc = gl.full([H, HALF], 0.0, gl.float32, sums)
    zero = gl.full([H, N], 0.0, gl.float32, scores)
    column = gl.arange(0, N, gl.SliceLayout(0, scores))
    for tile in range(begin, end):
        i = tile - begin
        buffer = i % 2
        mbarrier.wait(full.index(buffer), (i // 2) & 1)
        s = warpgroup_mma(q_left, left.index(buffer).permute((1, 0)), zero, use_acc=False, is_async=True)
        s = warpgroup_mma(q_right, right.index(buffer).permute((1, 0)), s, is_async=True)
        s = warpgroup_mma_wait(0, deps=(s,))
        s = gl.where(gl.expand_dims(tile * N + column < listed, 0), s * scale_log2, float("-inf"))
        new = gl.maximum(top, gl.max(s, 1))
        shrink = gl.exp2(top - new)
        p = gl.exp2(s - gl.expand_dims(new, 1))
        total = total * shrink + gl.sum(p, 1)
        top = new
        p = p.to(gl.float16)
        probabilities.index(buffer).store(p)
        shrinks.index(buffer).store(shrink)
        fence_async_shared()
        mbarrier.arrive(ready.index(buffer), count=1)
        acc = acc * gl.expand_dims(gl.convert_layout(shrink, rows_out), 1)
        acc = warpgroup_mma(gl.convert_layout(p, operand), left.index(buffer), acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=(acc,))
        mbarrier.arrive(empty.index(buffer), count=1)

    h = h0 + gl.arange(0, H, rows)
    if SPLIT:
        # A part is normed by itself; its log-sum tells the merge how much it counts.
        seen = gl.where(total > 0.0, total, 1.0)
        inverse = 1.0 / seen
        lse = gl.where(total > 0.0, top + gl.log2(seen), float("-inf"))
        gl.store(part_lse + h, lse, mask=h < heads)
    else:
        sink = gl.load(sinks + h, mask=h < heads, other=0.0) * 1.4426950408889634
        best = gl.maximum(top, sink)
        share = gl.exp2(top - best)
        inverse = share / (total * share + gl.exp2(sink - best))
    inverses.store(inverse)
    mbarrier.arrive(done, count=1)
    x = acc * gl.expand_dims(gl.convert_layout(inverse, rows_out), 1)
    h = h0 + gl.arange(0, H, rows_out)
    d = gl.arange(0, HALF, gl.SliceLayout(0, sums))
    at = target + gl.expand_dims(h * row_stride, 1) + gl.expand_dims(d, 0)
    gl.store(at, x.to(target.dtype.element_ty), mask=gl.expand_dims(h < heads, 1))


@gluon.jit
def _summer(cos, sin, target, row_stride, h0, heads, begin, end, right, full, empty, probabilities, shrinks, inverses,
            ready, done, SPLIT: gl.constexpr):  # fmt: skip
    sums: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 256, 16])
    rows: gl.constexpr = gl.SliceLayout(1, sums)
    acc = gl.full([H, HALF], 0.0, gl.float32, sums)
    for tile in range(begin, end):
        i = tile - begin
        buffer = i % 2
        mbarrier.wait(full.index(buffer), (i // 2) & 1)
        mbarrier.wait(ready.index(buffer), (i // 2) & 1)
        acc = acc * gl.expand_dims(shrinks.index(buffer).load(rows), 1)
        acc = warpgroup_mma(probabilities.index(buffer), right.index(buffer), acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=(acc,))
        mbarrier.arrive(empty.index(buffer), count=1)

    mbarrier.wait(done, 0)
    x = acc * gl.expand_dims(inverses.load(rows), 1)
    if not SPLIT:
        # Turn the RoPE dims back: pairs are neighbours in one thread.
        even, odd = gl.split(gl.reshape(x, [H, HALF // 2, 2]))
        pair = gl.arange(0, HALF // 2, gl.SliceLayout(0, even.type.layout)) - (HALF // 2 - ROPE_PAIRS)
        c = gl.expand_dims(gl.load(cos + pair, mask=pair >= 0, other=1.0), 0)
        s = gl.expand_dims(gl.load(sin + pair, mask=pair >= 0, other=0.0), 0)
        x = gl.convert_layout(
            gl.reshape(gl.join(even * c + odd * s, odd * c - even * s), [H, HALF]), sums, assert_trivial=True
        )
    h = h0 + gl.arange(0, H, rows)
    d = gl.arange(0, HALF, gl.SliceLayout(0, sums))
    at = target + HALF + gl.expand_dims(h * row_stride, 1) + gl.expand_dims(d, 0)
    gl.store(at, x.to(target.dtype.element_ty), mask=gl.expand_dims(h < heads, 1))


@gluon.jit
def attend_kernel(q, entries, block_table, slots, lens, window_delta, firsts, counts, sinks, cos, sin, out, part_out,
                  part_lse, queries, heads, k, splits, scale_log2, stride_qt, stride_qh, stride_p, stride_b, stride_w,
                  stride_ot, stride_oh, WINDOW: gl.constexpr, ENTRIES: gl.constexpr, SELECTED: gl.constexpr,
                  SPLIT: gl.constexpr):  # fmt: skip
    """64 heads of one query over its share of the list: attention.py's _attend_kernel."""
    t = gl.program_id(0).to(gl.int64)
    part = gl.program_id(2)
    h0 = gl.program_id(1) * H
    sequence = t // queries
    compressed = gl.load(lens + t)
    first = gl.load(firsts + t)
    listed = compressed + gl.load(counts + t)
    tiles = (listed + N - 1) // N
    begin = tiles * part // splits
    end = tiles * (part + 1) // splits
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
    full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    ready = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    done = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for b in gl.static_range(2):
        mbarrier.init(full.index(b), count=1)
        mbarrier.init(empty.index(b), count=2)
        mbarrier.init(ready.index(b), count=1)
    mbarrier.init(done, count=1)
    gl.warp_specialize(
        [
            (_scorer, (q, sinks, target, part_lse, stride_qh, row_stride, h0, heads, scale_log2, begin, end, listed,
                       q_left, q_right, left, right, full, empty, probabilities, shrinks, inverses, ready, done,
                       SPLIT)),
            (_summer, (cos, sin, target, row_stride, h0, heads, begin, end, right, full, empty, probabilities, shrinks,
                       inverses, ready, done, SPLIT)),
            (_loader, (entries, block_table, slots, stride_p, window_offset, begin, end, listed, compressed, first,
                       left, right, full, empty, SELECTED, ENTRIES, WINDOW)),
        ],
        [4, 4],
        [160, 136],
    )  # fmt: skip
