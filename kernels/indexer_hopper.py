"""Index scores for Hopper in Gluon: keys are decoded straight to the registers that the tensor cores read them from.

A key's 16 words of eight FP4 codes are loaded by the four threads that hold its row of the product, four words each,
and stay there: nothing passes through shared memory but the queries. Decode: one query a program, keys stream by.
Prefill: two groups of warps keep 128 keys each and queries stream by, brought by a third.

The same functions as indexer.py's kernels, for V4's indexer alone (64 heads at most, 128 dims, 68-byte keys at
multiples of 4) on compute capability 9.0; everything else takes the plain kernels, and Triton's interpreter does too.

Shapes:  as in indexer.py; H heads padded to 64.
"""

# mypy: ignore-errors
# (device code: Gluon's types are those of its compiler)
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

H = gl.constexpr(64)
DIM = gl.constexpr(128)
# Words of 4 bytes: one key, its codes.
KEY = gl.constexpr(17)
CODES = gl.constexpr(16)
# Four warps' 16 rows of a product, as the rows of its first operand lie.
SIXTEENS = gl.constexpr(
    gl.DistributedLinearLayout([[0, 8]], [[0, 0], [0, 0], [0, 1], [0, 2], [0, 4]], [[1, 0], [2, 0]], [], [4, 16])
)
# Query tiles in flight in prefill.
STAGES = gl.constexpr(4)

# The same call before and after Triton 3.9's change of names.
bring = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared

# Eight FP4 codes of a word times a pair of FP16 factors. A code s e e m is an FP16 s 0 0 0 e e m 0.. times 2^14: codes
# i and i + 4 move at once, one to each half.
DECODE_FP4 = gl.constexpr("""{
.reg .b32 a, b;
shl.b32 a, $4, 9; and.b32 a, a, 0x0E000E00; shl.b32 b, $4, 12; lop3.b32 $0, b, 0x80008000, a, 0xEA;
shl.b32 a, $4, 5; and.b32 a, a, 0x0E000E00; shl.b32 b, $4, 8; lop3.b32 $1, b, 0x80008000, a, 0xEA;
shl.b32 a, $4, 1; and.b32 a, a, 0x0E000E00; shl.b32 b, $4, 4; lop3.b32 $2, b, 0x80008000, a, 0xEA;
shr.u32 a, $4, 3; and.b32 a, a, 0x0E000E00; lop3.b32 $3, $4, 0x80008000, a, 0xEA;
mul.rn.f16x2 $0, $0, $12; mul.rn.f16x2 $1, $1, $12; mul.rn.f16x2 $2, $2, $12; mul.rn.f16x2 $3, $3, $12;
}""")


@gluon.jit
def _block_ids(start, last, block_table, ENTRIES: gl.constexpr):
    """Block ids [4] of four times 16 keys from start on; past the last key its block again. Needs ENTRIES % 16 == 0."""
    n = gl.minimum(start + 16 * gl.arange(0, 4, gl.SliceLayout(1, SIXTEENS)), last)
    return gl.load(block_table + (n.to(gl.uint32) // ENTRIES).to(gl.int32))


@gluon.jit
def _offsets(start, block, stride_p, N: gl.constexpr, ENTRIES: gl.constexpr, rows: gl.constexpr):
    """Offsets [64] of the keys from start on, in words: 16 neighbours, which a warp holds, lie in one block."""
    i = gl.arange(0, 4, gl.SliceLayout(1, SIXTEENS))
    j = gl.arange(0, 16, gl.SliceLayout(0, SIXTEENS))
    inside = ((start + 16 * i).to(gl.uint32) % ENTRIES).to(gl.int32) * KEY
    at = gl.expand_dims(block.to(gl.int64) * stride_p + inside, 1) + gl.expand_dims(j * KEY, 0)
    return gl.convert_layout(gl.reshape(at, [N]), rows, assert_trivial=True)


@gluon.jit
def _decode(words, scales, N: gl.constexpr, wide: gl.constexpr, operand: gl.constexpr):
    """Words [N, 16] and scales [N] to row factors [N] float32 and FP16 [N, 128] relative to them, as operand A.

    Column 32 * (word / 4) + 8 * i + 2 * (word % 4) + j is code i + 4 * j of a word.
    """
    top = gl.maximum(
        gl.maximum(scales & 0xFF, (scales >> 8) & 0xFF), gl.maximum((scales >> 16) & 0xFF, (scales >> 24) & 0xFF)
    )
    group = gl.arange(0, CODES, gl.SliceLayout(0, gl.SliceLayout(2, wide))) // 4
    scale = (gl.expand_dims(scales, 1) >> gl.expand_dims(group * 8, 0)) & 0xFF
    # FP16's exponent field of 2^(14 + scale - top), in both halves; zero under its normal range.
    share = gl.maximum(scale + gl.expand_dims(29 - top, 1), 0) * 0x04000400
    values = gl.inline_asm_elementwise(
        DECODE_FP4, "=r,=r,=r,=r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r",
        [gl.expand_dims(words, 2).broadcast_to([N, CODES, 8]), gl.expand_dims(share, 2).broadcast_to([N, CODES, 8])],
        dtype=gl.float16, is_pure=True, pack=8,
    )  # fmt: skip
    values = gl.permute(gl.reshape(values, [N, 4, 4, 4, 2]), (0, 1, 3, 2, 4))
    factor = (gl.maximum(top, 1) << 23).to(gl.float32, bitcast=True)
    return factor, gl.convert_layout(gl.reshape(values, [N, DIM]), operand, assert_trivial=True)


@gluon.jit
def _weigh(s, weights, factor, layout: gl.constexpr):
    """Scores [N] of products s [N, H]: relu, head weights, the rows' factors."""
    s = gl.sum(gl.maximum(s, 0.0) * gl.expand_dims(weights, 0), 1)
    return s * gl.convert_layout(factor, gl.SliceLayout(1, layout), assert_trivial=True)


@gluon.jit
def _write(s, start, length, scores, maxima, N: gl.constexpr, GROUP: gl.constexpr, layout: gl.constexpr):
    n = start + gl.arange(0, N, gl.SliceLayout(1, layout))
    gl.store(scores + n, s, mask=n < length)
    best = gl.max(gl.reshape(gl.where(n < length, s, float("-inf")), [N // GROUP, GROUP]), 1)
    group = start // GROUP + gl.arange(0, N // GROUP, best.type.layout)
    gl.store(maxima + group, best, mask=group * GROUP < length)


@gluon.jit
def decode_kernel(codes, weights, records, block_table, lens, scores, maxima, heads, stride_p, stride_b, stride_s,
                  stride_m, ENTRIES: gl.constexpr, GROUP: gl.constexpr):  # fmt: skip
    """One query against its share of its sequence's keys: indexer.py's _decode_kernel."""
    N: gl.constexpr = 64
    products: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, products, 2)
    wide: gl.constexpr = gl.DistributedLinearLayout(
        [[0, 0, 1], [0, 0, 2], [0, 0, 4], [0, 4, 0], [0, 8, 0], [8, 0, 0]],
        [[0, 1, 0], [0, 2, 0], [1, 0, 0], [2, 0, 0], [4, 0, 0]],
        [[16, 0, 0], [32, 0, 0]], [], [N, 16, 8],
    )  # fmt: skip
    rows: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, wide))
    spread: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])

    t = gl.program_id(1).to(gl.int64)
    length = gl.load(lens + t)
    tiles = (length + N - 1) // N
    begin = tiles * gl.program_id(0) // gl.num_programs(0)
    end = tiles * (gl.program_id(0) + 1) // gl.num_programs(0)
    block_table += t * stride_b
    scores += t * stride_s
    maxima += t * stride_m
    if begin < end:
        memory = records.to(gl.pointer_type(gl.int32))
        word = gl.expand_dims(gl.arange(0, CODES, gl.SliceLayout(0, gl.SliceLayout(2, wide))), 0)
        last = length - 1
        block = _block_ids(begin * N, last, block_table, ENTRIES)

        query = gl.allocate_shared_memory(gl.float16, [H, DIM], gl.NVMMASharedLayout(128, 16, 2))
        h = gl.arange(0, H, gl.SliceLayout(1, spread))
        d = gl.arange(0, DIM, gl.SliceLayout(0, spread))
        at = codes + t * heads * DIM + gl.expand_dims(h * DIM, 1) + gl.expand_dims(d, 0)
        query.store(gl.load(at, mask=gl.expand_dims(h < heads, 1), other=0.0))
        fence_async_shared()
        head = gl.arange(0, H, gl.SliceLayout(0, products))
        w = gl.load(weights + t * heads + head, mask=head < heads, other=0.0)

        base = memory + _offsets(begin * N, block, stride_p, N, ENTRIES, rows)
        words = gl.load(gl.expand_dims(base, 1) + word)
        scales = gl.load(base + CODES)
        block = _block_ids((begin + 1) * N, last, block_table, ENTRIES)
        zero = gl.full([N, H], 0.0, gl.float32, products)
        # A tile's products are under way while the tile before is weighed, its records while that one's are decoded.
        factor, keys = _decode(words, scales, N, wide, operand)
        s = warpgroup_mma(keys, query.permute((1, 0)), zero, use_acc=False, is_async=True)
        base = memory + _offsets((begin + 1) * N, block, stride_p, N, ENTRIES, rows)
        words = gl.load(gl.expand_dims(base, 1) + word)
        scales = gl.load(base + CODES)
        block = _block_ids((begin + 2) * N, last, block_table, ENTRIES)
        s, _ = warpgroup_mma_wait(0, deps=(s, keys))
        for tile in range(begin + 1, end):
            next_factor, keys = _decode(words, scales, N, wide, operand)
            following = warpgroup_mma(keys, query.permute((1, 0)), zero, use_acc=False, is_async=True)
            base = memory + _offsets((tile + 1) * N, block, stride_p, N, ENTRIES, rows)
            words = gl.load(gl.expand_dims(base, 1) + word)
            scales = gl.load(base + CODES)
            block = _block_ids((tile + 2) * N, last, block_table, ENTRIES)
            _write(_weigh(s, w, factor, products), (tile - 1) * N, length, scores, maxima, N, GROUP, products)
            s, _ = warpgroup_mma_wait(0, deps=(following, keys))
            factor = next_factor
        _write(_weigh(s, w, factor, products), (end - 1) * N, length, scores, maxima, N, GROUP, products)


@gluon.jit
def _queries(queries, t0, count, ring, full, empty):
    """Bring each query's codes, STAGES ahead."""
    for i in range(count):
        stage = i % STAGES
        mbarrier.wait(empty.index(stage), ((i // STAGES) & 1) ^ 1)
        mbarrier.expect(full.index(stage), H * DIM * 2)
        bring(queries, [(t0 + i) * H, 0], full.index(stage), ring.index(stage))


@gluon.jit
def _score(weights, records, block_table, lens, scores, maxima, stride_p, stride_s, stride_m, start, most, t0, count,
           ring, full, empty, ENTRIES: gl.constexpr, GROUP: gl.constexpr):  # fmt: skip
    """128 keys from start on, kept in registers, against every query that comes."""
    N: gl.constexpr = 128
    products: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, products, 2)
    wide: gl.constexpr = gl.DistributedLinearLayout(
        [[0, 0, 1], [0, 0, 2], [0, 0, 4], [0, 4, 0], [0, 8, 0], [8, 0, 0], [64, 0, 0]],
        [[0, 1, 0], [0, 2, 0], [1, 0, 0], [2, 0, 0], [4, 0, 0]],
        [[16, 0, 0], [32, 0, 0]], [], [N, 16, 8],
    )  # fmt: skip
    rows: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, wide))
    n = gl.minimum(start + gl.arange(0, N, rows), most - 1)
    block = gl.load(block_table + n // ENTRIES)
    base = records.to(gl.pointer_type(gl.int32)) + block.to(gl.int64) * stride_p + (n % ENTRIES) * KEY
    word = gl.expand_dims(gl.arange(0, CODES, gl.SliceLayout(0, gl.SliceLayout(2, wide))), 0)
    factor, keys = _decode(gl.load(gl.expand_dims(base, 1) + word), gl.load(base + CODES), N, wide, operand)
    head = gl.arange(0, H, gl.SliceLayout(0, products))
    w = gl.load(weights + t0 * H + head)
    length = gl.load(lens + t0)
    zero = gl.full([N, H], 0.0, gl.float32, products)
    for i in range(count):
        stage = i % STAGES
        mbarrier.wait(full.index(stage), (i // STAGES) & 1)
        s = warpgroup_mma(keys, ring.index(stage).permute((1, 0)), zero, use_acc=False, is_async=True)
        t = (t0 + i).to(gl.int64)
        following = gl.minimum(i + 1, count - 1)
        w_next = gl.load(weights + (t0 + following) * H + head)
        length_next = gl.load(lens + t0 + following)
        s = warpgroup_mma_wait(0, deps=(s,))
        mbarrier.arrive(empty.index(stage), count=1)
        s = _weigh(s, w, factor, products)
        _write(s, start, length, scores + t * stride_s, maxima + t * stride_m, N, GROUP, products)
        w = w_next
        length = length_next


@gluon.jit
def prefill_kernel(queries, weights, records, block_table, lens, scores, maxima, per_sequence, stride_p, stride_b,
                   stride_s, stride_m, Q_TILE: gl.constexpr, ENTRIES: gl.constexpr, GROUP: gl.constexpr):  # fmt: skip
    """256 keys against Q_TILE queries of one sequence: indexer.py's _prefill_kernel. queries: a TMA descriptor of
    codes [T * 64, 128], 64 heads."""
    tiles = (per_sequence + Q_TILE - 1) // Q_TILE
    sequence = gl.program_id(1) // tiles
    first = (gl.program_id(1) % tiles) * Q_TILE
    count = gl.minimum(per_sequence - first, Q_TILE)
    t0 = sequence * per_sequence + first
    start = gl.program_id(0) * 256
    # Later queries of a sequence see at least as much: the last one's length bounds the tile's.
    most = gl.load(lens + t0 + count - 1)
    if start < most:
        block_table += sequence.to(gl.int64) * stride_b
        ring = gl.allocate_shared_memory(gl.float16, [STAGES, H, DIM], queries.layout)
        full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        for stage in gl.static_range(STAGES):
            mbarrier.init(full.index(stage), count=1)
            mbarrier.init(empty.index(stage), count=2)
        gl.warp_specialize(
            [
                (_score, (weights, records, block_table, lens, scores, maxima, stride_p, stride_s, stride_m, start,
                          most, t0, count, ring, full, empty, ENTRIES, GROUP)),
                (_score, (weights, records, block_table, lens, scores, maxima, stride_p, stride_s, stride_m,
                          start + 128, most, t0, count, ring, full, empty, ENTRIES, GROUP)),
                (_queries, (queries, t0, count, ring, full, empty)),
            ],
            [4, 1],
            [224, 24],
        )  # fmt: skip


def describe_queries(codes):
    """What prefill_kernel takes for codes [T, 64, 128] float16, contiguous."""
    num_queries, heads, dim = codes.shape
    rows = codes.view(num_queries * heads, dim)
    return TensorDescriptor.from_tensor(rows, [heads, dim], gl.NVMMASharedLayout(128, 16, 2))
