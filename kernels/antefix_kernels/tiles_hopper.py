"""Packed records to FP16 tiles in shared memory: the loading role of decode_attention_hopper.py, and its prefetch.

Two loaders of 4 warps load half of every tile each, independently of one another. A query's list has the compressed
entries first (selected: row t of slots; HCA: through the block table), then the window's.

Shapes:  a tile is N entries of 512 dims in two halves, left and right [2, N, HALF], two tiles deep; raw records are
         read in words of 8 bytes, which is what their addresses allow.
"""

# mypy: ignore-errors
# (device code: Gluon's types are those of its compiler)
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

N = gl.constexpr(64)
HALF = gl.constexpr(256)
# In units of 8 bytes: one record, its codes, its RoPE values.
RECORD = gl.constexpr(73)
CODES = gl.constexpr(56)
ROPE = gl.constexpr(16)
GROUPS = gl.constexpr(7)
# Entries of a tile that a loader takes, and tiles whose records it places at once.
ROWS = gl.constexpr(32)
PLACED = gl.constexpr(4)

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
# Brings a record's 584 bytes to the L2 cache: bulk copies take whole pieces of 16 bytes, and no piece that holds a byte
# of a record reaches beyond its page. What is read once leaves the cache first, there and below: queries that were just
# written, parts and outputs then stay.
PREFETCH = gl.constexpr("""{
.reg .pred p; .reg .b64 c; setp.ne.s32 p, $2, 0;
createpolicy.fractional.L2::evict_first.b64 c, 1.0;
@p cp.async.bulk.prefetch.L2.global.L2::cache_hint [$1], 592, c;
mov.u32 $0, 0;
}""")


@builtin
def view(memory, dtype, shape, layout, _semantic=None):
    """Shared memory under another type and shape: Triton 3.9 renamed what 3.6 calls _reinterpret."""
    how = getattr(memory, "reinterpret", None) or memory._reinterpret
    return how(dtype, shape, layout, _semantic=_semantic)


@gluon.jit
def share(lens, firsts, counts, splits, SPLIT: gl.constexpr):
    """Facts about a program's query: its compressed entries, its window's first row, its list's length; and about the
    program: its first tile, and the one after its last. Every role loads these numbers for itself, so that no role
    waits for another.
    """
    compressed = gl.load(lens)
    first = gl.load(firsts)
    listed = compressed + gl.load(counts)
    tiles = (listed + N - 1) // N
    begin = 0
    end = tiles
    if SPLIT:
        part = gl.program_id(2)
        begin = tiles * part // splits
        end = tiles * (part + 1) // splits
    return compressed, first, listed, begin, end


@gluon.jit
def _slots(n, compressed, slots, k, block_table, SELECTED: gl.constexpr, ENTRIES: gl.constexpr):
    """For entries n of the list: their slots, or their blocks; entries that are not compressed get any value. A row of
    slots is read before it is known how many slots it has.
    """
    if SELECTED:
        return gl.load(slots + n, mask=n < k, other=0)
    return gl.load(block_table + n // ENTRIES, mask=n < compressed, other=0)


@gluon.jit
def _offsets(n, slot, compressed, first, stride_p, window_offset, SELECTED: gl.constexpr, ENTRIES: gl.constexpr,
             WINDOW: gl.constexpr):  # fmt: skip
    """Where the records of entries n of the list are, from their _slots: offsets in words of 8 bytes."""
    if SELECTED:
        stored = (slot // ENTRIES).to(gl.int64) * stride_p + (slot % ENTRIES) * RECORD
    else:
        stored = slot.to(gl.int64) * stride_p + (n % ENTRIES) * RECORD
    ring = (first + gl.maximum(n - compressed, 0)) % WINDOW
    return gl.where(n < compressed, stored, window_offset + ring * RECORD)


@gluon.jit
def _placed(group, begin, PART: gl.constexpr):
    """The entries of the list that a loader takes of PLACED tiles, PLACED * ROWS of them, some past the list's end.
    In place of these entries the list's first entry comes again, so that every address and value stays valid.
    """
    i = gl.arange(0, PLACED * ROWS, gl.BlockedLayout([1], [32], [4], [0]))
    return (begin + group * PLACED + i // ROWS) * N + PART * ROWS + i % ROWS


@gluon.jit
def prefetch(tile, entries, listed, compressed, first, slots, k, block_table, stride_p, window_offset,
              SELECTED: gl.constexpr, ENTRIES: gl.constexpr, WINDOW: gl.constexpr):  # fmt: skip
    """Ask the GPU's L2 cache to load the records of a tile."""
    # A warp issues bulk copies one by one, so each of the four has sixteen.
    lane: gl.constexpr = gl.DistributedLinearLayout([], [[1], [2], [4], [8], [64]], [[16], [32]], [], [2 * N])
    i = gl.arange(0, 2 * N, lane)
    n = tile * N + i
    mine = (i < N) & (n < listed)
    slot = _slots(n, compressed, slots, k, block_table, SELECTED, ENTRIES)
    offset = _offsets(n, slot, compressed, first, stride_p, window_offset, SELECTED, ENTRIES, WINDOW)
    at = (entries.to(gl.pointer_type(gl.int64)) + offset).to(gl.int64) & -16
    gl.inline_asm_elementwise(PREFETCH, "=r,l,r", [at, mine.to(gl.int32)], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _decode_codes(word, scales, g: gl.constexpr):
    """Words [ROWS, 8] of a group times byte g of scales [N]: [ROWS, 64] FP16."""
    byte = (scales >> (8 * g)) & 0xFF
    factor = gl.inline_asm_elementwise(SCALE_PAIR, "=r,r", [byte], dtype=gl.int32, is_pure=True, pack=1)
    factor = gl.expand_dims(factor, 1).broadcast_to([ROWS, 8])
    wide = gl.inline_asm_elementwise(
        DECODE_FP8, "=r,=r,=r,=r,l,l,l,l,l,l,l,l,r,r,r,r,r,r,r,r",
        [gl.expand_dims(word, 2).broadcast_to([ROWS, 8, 8]), gl.expand_dims(factor, 2).broadcast_to([ROWS, 8, 8])],
        dtype=gl.float16, is_pure=True, pack=8,
    )  # fmt: skip
    return gl.reshape(wide, [ROWS, 64])


@gluon.jit
def _decode_rope(word):
    wide = gl.inline_asm_elementwise(
        DECODE_BF16, "=r,=r,l,l,l,l", [gl.expand_dims(word, 2).broadcast_to([ROWS, ROPE, 4])],
        dtype=gl.float16, is_pure=True, pack=4,
    )  # fmt: skip
    return gl.reshape(wide, [ROWS, 64])


@gluon.jit
def _side_by_side(a, b, c, d):
    """[N, 256] of four [N, 64], without moving anything between threads."""
    pairs = gl.join(gl.join(a, c), gl.join(b, d))
    return gl.reshape(gl.permute(pairs, (0, 2, 3, 1)), [ROWS, HALF])


@gluon.jit
def load_tiles(entries, block_table, slots, k, lens, firsts, counts, splits, stride_p, window_offset, left, right, full,
               empty, table, SELECTED: gl.constexpr, SPLIT: gl.constexpr, ENTRIES: gl.constexpr, WINDOW: gl.constexpr,
               PART: gl.constexpr):  # fmt: skip
    """Rows PART * ROWS and on of every tile, as FP16, to shared memory."""
    # Eight threads a row: what they store at once is a whole row of the swizzle, in all banks.
    wide: gl.constexpr = gl.DistributedLinearLayout(
        [[0, 0, 1], [0, 0, 2], [0, 0, 4], [4, 0, 0]],
        [[0, 1, 0], [0, 2, 0], [0, 4, 0], [1, 0, 0], [2, 0, 0]],
        [[8, 0, 0], [16, 0, 0]], [], [ROWS, 8, 8],
    )  # fmt: skip
    wide_rope: gl.constexpr = gl.DistributedLinearLayout(
        [[0, 0, 1], [0, 0, 2], [0, 1, 0], [4, 0, 0]],
        [[0, 2, 0], [0, 4, 0], [0, 8, 0], [1, 0, 0], [2, 0, 0]],
        [[8, 0, 0], [16, 0, 0]], [], [ROWS, 16, 4],
    )  # fmt: skip
    words: gl.constexpr = gl.SliceLayout(2, wide)
    words_rope: gl.constexpr = gl.SliceLayout(2, wide_rope)
    rows: gl.constexpr = gl.SliceLayout(1, words)
    rows_rope: gl.constexpr = gl.SliceLayout(1, words_rope)
    w = gl.expand_dims(gl.arange(0, 8, gl.SliceLayout(0, words)), 0)
    w_rope = gl.expand_dims(gl.arange(0, 16, gl.SliceLayout(0, words_rope)), 0)
    memory = entries.to(gl.pointer_type(gl.int64))

    # Slots are loaded two groups of tiles ahead and placed one ahead: nobody waits for them among loads of records.
    places = view(table, gl.int64, [4, PLACED * ROWS], table.layout)
    compressed, first, listed, begin, end = share(lens, firsts, counts, splits, SPLIT)
    head = gl.load(slots, mask=k > 0, other=0) if SELECTED else gl.load(block_table, mask=compressed > 0, other=0)
    early = ()
    for g in gl.static_range(2):
        early = early + (_slots(_placed(g, begin, PART), compressed, slots, k, block_table, SELECTED, ENTRIES),)
    for g in gl.static_range(2):
        n = _placed(g, begin, PART)
        slot = gl.where(n < listed, early[g], head)
        n = gl.where(n < listed, n, 0)
        places.index(PART * 2 + g).store(
            _offsets(n, slot, compressed, first, stride_p, window_offset, SELECTED, ENTRIES, WINDOW)
        )
    for start in range(begin, end, PLACED):
        group = (start - begin) // PLACED
        n = _placed(group + 2, begin, PART)
        n = gl.where(n < listed, n, 0)
        slot = _slots(n, compressed, slots, k, block_table, SELECTED, ENTRIES)
        for tile in range(start, gl.minimum(start + PLACED, end)):
            i = tile - begin
            buffer = i % 2
            # All of a tile's loads are on their way before the first is used. Loads carried over from the tile before
            # share their scoreboards with later ones, and so were waited for too long.
            base = memory + table.index(PART * 2 * PLACED + i % (2 * PLACED)).load(rows)
            at = gl.expand_dims(base, 1) + w
            raw = ()
            for g in gl.static_range(GROUPS):
                raw = raw + (gl.load(at + g * 8, eviction_policy="evict_first"),)
            at_rope = gl.expand_dims(gl.convert_layout(base, rows_rope, assert_trivial=True), 1) + w_rope
            rope = gl.load(at_rope + CODES, eviction_policy="evict_first")
            scales = gl.load(base + (CODES + ROPE), eviction_policy="evict_first")
            low = (scales & 0xFFFFFFFF).to(gl.int32)
            high = (scales >> 32).to(gl.int32)
            mbarrier.wait(empty.index(buffer), ((i // 2) & 1) ^ 1)
            values = ()
            for g in gl.static_range(GROUPS):
                values = values + (_decode_codes(raw[g], low if g < 4 else high, g % 4),)
            left.index(buffer).slice(PART * ROWS, ROWS).store(_side_by_side(values[0], values[1], values[2], values[3]))
            tail = gl.convert_layout(_decode_rope(rope), values[0].type.layout, assert_trivial=True)
            right.index(buffer).slice(PART * ROWS, ROWS).store(_side_by_side(values[4], values[5], values[6], tail))
            # Those who wait do the fence.
            mbarrier.arrive(full.index(buffer), count=1)
        places.index(PART * 2 + group % 2).store(
            _offsets(n, slot, compressed, first, stride_p, window_offset, SELECTED, ENTRIES, WINDOW)
        )
