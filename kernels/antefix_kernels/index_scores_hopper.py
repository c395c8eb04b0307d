"""Index scores for Hopper in Gluon: keys are decoded straight to the registers that the tensor cores read them from.

A key's 16 words of eight FP4 codes are loaded by the four threads that hold its row of the product, four words each,
and stay there: nothing passes through shared memory but the queries. In decode each program has one query, and the
keys stream by. Prefill: two groups of warps keep 128 keys each and queries stream by, brought by a third.

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

# The same calls before and after Triton 3.9's change of names.
bring = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
meet = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier

# Eight FP4 codes of a word times a pair of FP16 factors. A code s e e m is an FP16 s 0 0 0 e e m 0.. times 2^14, all in
# its upper byte: four codes move to four bytes at once, then two bytes to two halves of a word, codes i and i + 4.
DECODE_FP4 = gl.constexpr("""{
.reg .b32 a, b, odd, even;
shr.u32 a, $4, 3; and.b32 a, a, 0x0E0E0E0E; lop3.b32 odd, $4, 0x80808080, a, 0xEA;
shl.b32 b, $4, 4; shl.b32 a, $4, 1; and.b32 a, a, 0x0E0E0E0E; lop3.b32 even, b, 0x80808080, a, 0xEA;
prmt.b32 $0, even, 0, 0x2404; prmt.b32 $1, odd, 0, 0x2404; and.b32 $2, even, 0xFF00FF00; and.b32 $3, odd, 0xFF00FF00;
mul.rn.f16x2 $0, $0, $12; mul.rn.f16x2 $1, $1, $12; mul.rn.f16x2 $2, $2, $12; mul.rn.f16x2 $3, $3, $12;
}""")

# Decode: 128 keys a tile, 32 neighbours a warp, 16 of them in each of two products of 64 rows.
TILE = gl.constexpr(128)
PRODUCTS = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16]))
# [row, word, code]: a thread holds the four words of one scale group of two keys.
WORDS = gl.constexpr(
    gl.DistributedLinearLayout(
        [[0, 0, 1], [0, 0, 2], [0, 0, 4], [0, 1, 0], [0, 2, 0], [8, 0, 0]],
        [[0, 4, 0], [0, 8, 0], [1, 0, 0], [2, 0, 0], [4, 0, 0]],
        [[16, 0, 0], [32, 0, 0]],
        [],
        [64, CODES.value, 8],
    )
)
# Sums over a thread's 16 heads [key, upper, lower bit of the lane in its four]: two keys of each half a thread. Key 16
# changes places with the lower bit and that is summed, then key 8 with the upper one: a sum is left to each thread, and
# the keys of a group lie in neighbouring lanes.
SUMS = gl.constexpr(
    gl.DistributedLinearLayout(
        [[8, 0, 0], [16, 0, 0]],
        [[0, 0, 1], [0, 1, 0], [1, 0, 0], [2, 0, 0], [4, 0, 0]],
        [[32, 0, 0], [64, 0, 0]],
        [],
        [128, 2, 2],
    )
)
SUMS_LOWER = gl.constexpr(
    gl.DistributedLinearLayout(
        [[8, 0, 0], [0, 0, 1]],
        [[16, 0, 0], [0, 1, 0], [1, 0, 0], [2, 0, 0], [4, 0, 0]],
        [[32, 0, 0], [64, 0, 0]],
        [],
        [128, 2, 2],
    )
)
SUMS_UPPER = gl.constexpr(
    gl.DistributedLinearLayout([[0, 1]], [[16, 0], [8, 0], [1, 0], [2, 0], [4, 0]], [[32, 0], [64, 0]], [], [128, 2])
)
SCORES = gl.constexpr(gl.DistributedLinearLayout([], [[16], [8], [1], [2], [4]], [[32], [64]], [], [128]))


@gluon.jit
def _top(scales):
    """The largest of a word's four scale bytes."""
    return gl.maximum(
        gl.maximum(scales & 0xFF, (scales >> 8) & 0xFF), gl.maximum((scales >> 16) & 0xFF, (scales >> 24) & 0xFF)
    )


@gluon.jit
def _factor(top):
    """2^(top - 127) as float32, by which a row's values are divided."""
    return (gl.maximum(top, 1) << 23).to(gl.float32, bitcast=True)


@gluon.jit
def _decode(words, scales, top, N: gl.constexpr, layout: gl.constexpr):
    """Words [N, 16] and the scale words [N] of their keys to FP16 [N, 16, 8] relative to the row's largest scale.

    Value 2 * i + j of a word is its code i + 4 * j.
    """
    group = gl.arange(0, CODES, gl.SliceLayout(0, gl.SliceLayout(2, layout))) // 4
    scale = (gl.expand_dims(scales, 1) >> gl.expand_dims(group * 8, 0)) & 0xFF
    # FP16's exponent field of 2^(14 + scale - top), in both halves; zero under its normal range.
    share = gl.maximum(scale + gl.expand_dims(29 - top, 1), 0) * 0x04000400
    return gl.inline_asm_elementwise(
        DECODE_FP4, "=r,=r,=r,=r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r",
        [gl.expand_dims(words, 2).broadcast_to([N, CODES, 8]), gl.expand_dims(share, 2).broadcast_to([N, CODES, 8])],
        dtype=gl.float16, is_pure=True, pack=8,
    )  # fmt: skip


@gluon.jit
def _block_ids(tile, last, block_table, ENTRIES: gl.constexpr):
    """Block ids [4] of the warps' 32 keys each; past the last key its block again. The number of entries must be a
    multiple of 32 (ENTRIES).
    """
    n = gl.minimum(tile * TILE + 32 * gl.arange(0, 4, gl.SliceLayout(1, SIXTEENS)), last)
    return gl.load(block_table + (n.to(gl.uint32) // ENTRIES).to(gl.int32))


@gluon.jit
def _offsets(tile, block, stride_p, ENTRIES: gl.constexpr):
    """Offsets [64], in words, of the first 16 keys of each warp in a tile."""
    i = gl.arange(0, 4, gl.SliceLayout(1, SIXTEENS))
    j = gl.arange(0, 16, gl.SliceLayout(0, SIXTEENS))
    inside = ((tile * TILE + 32 * i).to(gl.uint32) % ENTRIES).to(gl.int32) * KEY
    at = gl.expand_dims(block.to(gl.int64) * stride_p + inside, 1) + gl.expand_dims(j * KEY, 0)
    return gl.convert_layout(gl.reshape(at, [64]), gl.SliceLayout(1, gl.SliceLayout(2, WORDS)), assert_trivial=True)


@gluon.jit
def _load(at):
    """Words [64, 16] and scale words [64] of the keys at pointers [64]."""
    word = gl.expand_dims(gl.arange(0, CODES, gl.SliceLayout(0, gl.SliceLayout(2, WORDS))), 0)
    return gl.load(gl.expand_dims(at, 1) + word), gl.load(at + CODES)


@gluon.jit
def _multiply(words, scales, top, query):
    """Products [64, H] of 64 keys, under way, and the keys, which must stay where they are until then."""
    operand: gl.constexpr = gl.DotOperandLayout(0, PRODUCTS, 2)
    # Word 4 * t + g, of thread t's group, becomes columns 32 * g + 8 * i + 2 * t + j.
    keys = gl.permute(gl.reshape(_decode(words, scales, top, 64, WORDS), [64, 4, 4, 4, 2]), (0, 2, 3, 1, 4))
    keys = gl.convert_layout(gl.reshape(keys, [64, DIM]), operand, assert_trivial=True)
    zero = gl.full([64, H], 0.0, gl.float32, PRODUCTS)
    return warpgroup_mma(keys, query.permute((1, 0)), zero, use_acc=False, is_async=True), keys


@gluon.jit
def _weigh_part(s, weights, top):
    """Scores [64, 4] of products s [64, H], each a thread's 16 heads: relu, halved head weights, the rows' factors.

    s + |s| is twice relu(s), exactly: additions leave the pipe of maxima to the decoding.
    """
    s = (s + gl.abs(s)) * gl.expand_dims(weights, 0)
    s = gl.permute(gl.reshape(s, [64, 8, 4, 2]), (0, 2, 1, 3))
    s = gl.sum(gl.reshape(s, [64, 4, 16]), 2)
    factor = gl.convert_layout(_factor(top), gl.SliceLayout(1, s.type.layout), assert_trivial=True)
    return s * gl.expand_dims(factor, 1)


@gluon.jit
def _gather(first, second):
    """Scores [128] of a tile, one a thread, of the parts [64, 4] of its two products."""
    s = gl.reshape(gl.join(first, second), [4, 16, 4, 2])
    s = gl.reshape(gl.permute(s, (0, 3, 1, 2)), [TILE, 2, 2])
    s = gl.convert_layout(s, SUMS, assert_trivial=True)
    s = gl.sum(gl.convert_layout(s, SUMS_LOWER), 2)
    s = gl.sum(gl.convert_layout(s, SUMS_UPPER), 1)
    return gl.convert_layout(s, SCORES, assert_trivial=True)


@gluon.jit
def _write(s, start, length, scores, maxima, N: gl.constexpr, GROUP: gl.constexpr, layout: gl.constexpr):
    n = start + gl.arange(0, N, layout)
    gl.store(scores + n, s, mask=n < length)
    best = gl.max(gl.reshape(gl.where(n < length, s, float("-inf")), [N // GROUP, GROUP]), 1)
    group = start // GROUP + gl.arange(0, N // GROUP, best.type.layout)
    gl.store(maxima + group, best, mask=group * GROUP < length)


@gluon.jit
def decode_kernel(codes, weights, records, block_table, lens, scores, maxima, heads, stride_p, stride_b, stride_s,
                  stride_m, ENTRIES: gl.constexpr, GROUP: gl.constexpr):  # fmt: skip
    """Scores one query against its share of its sequence's keys, as indexer.py's _decode_kernel does.

    Four programs share a multiprocessor and fill each other's waits, so each goes in order: a half's words are asked
    for again as soon as they are decoded, and come while both halves are multiplied and weighed.
    """
    SECOND: gl.constexpr = 16 * KEY
    spread: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    t = gl.program_id(1).to(gl.int64)
    length = gl.load(lens + t)
    tiles = (length + TILE - 1) // TILE
    begin = tiles * gl.program_id(0) // gl.num_programs(0)
    end = tiles * (gl.program_id(0) + 1) // gl.num_programs(0)
    block_table += t * stride_b
    scores += t * stride_s
    maxima += t * stride_m
    if begin < end:
        memory = records.to(gl.pointer_type(gl.int32))
        last = length - 1
        block = _block_ids(begin, last, block_table, ENTRIES)

        query = gl.allocate_shared_memory(gl.float16, [H, DIM], gl.NVMMASharedLayout(128, 16, 2))
        h = gl.arange(0, H, gl.SliceLayout(1, spread))
        d = gl.arange(0, DIM, gl.SliceLayout(0, spread))
        at = codes + t * heads * DIM + gl.expand_dims(h * DIM, 1) + gl.expand_dims(d, 0)
        q = gl.load(at, mask=gl.expand_dims(h < heads, 1), other=0.0)
        # Columns change places as the keys' do.
        query.store(gl.reshape(gl.permute(gl.reshape(q, [H, 4, 4, 4, 2]), (0, 3, 2, 1, 4)), [H, DIM]))
        fence_async_shared()
        # The tensor cores read what all threads stored: met here, or the compiler lets them meet in every round.
        meet()
        head = gl.arange(0, H, gl.SliceLayout(0, PRODUCTS))
        w = gl.load(weights + t * heads + head, mask=head < heads, other=0.0) * 0.5

        at = memory + _offsets(begin, block, stride_p, ENTRIES)
        block = _block_ids(begin + 1, last, block_table, ENTRIES)
        words, scales = _load(at)
        second_words, second_scales = _load(at + SECOND)
        for tile in range(begin, end):
            at = memory + _offsets(tile + 1, block, stride_p, ENTRIES)
            block = _block_ids(tile + 2, last, block_table, ENTRIES)
            top = _top(scales)
            s, keys = _multiply(words, scales, top, query)
            words, scales = _load(at)
            s, _ = warpgroup_mma_wait(0, deps=(s, keys))
            first = _weigh_part(s, w, top)
            top = _top(second_scales)
            s, keys = _multiply(second_words, second_scales, top, query)
            second_words, second_scales = _load(at + SECOND)
            s, _ = warpgroup_mma_wait(0, deps=(s, keys))
            second = _weigh_part(s, w, top)
            _write(_gather(first, second), tile * TILE, length, scores, maxima, TILE, GROUP, SCORES)


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
    scales = gl.load(base + CODES)
    top = _top(scales)
    # Word 4 * g + t becomes columns 32 * g + 8 * i + 2 * t + j.
    keys = _decode(gl.load(gl.expand_dims(base, 1) + word), scales, top, N, wide)
    keys = gl.permute(gl.reshape(keys, [N, 4, 4, 4, 2]), (0, 1, 3, 2, 4))
    keys = gl.convert_layout(gl.reshape(keys, [N, DIM]), operand, assert_trivial=True)
    factor = gl.convert_layout(_factor(top), gl.SliceLayout(1, products), assert_trivial=True)
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
        s = gl.sum(gl.maximum(s, 0.0) * gl.expand_dims(w, 0), 1) * factor
        _write(s, start, length, scores + t * stride_s, maxima + t * stride_m, N, GROUP, gl.SliceLayout(1, products))
        w = w_next
        length = length_next


@gluon.jit
def prefill_kernel(queries, weights, records, block_table, lens, scores, maxima, per_sequence, stride_p, stride_b,
                   stride_s, stride_m, Q_TILE: gl.constexpr, ENTRIES: gl.constexpr, GROUP: gl.constexpr):  # fmt: skip
    """256 keys against Q_TILE queries of one sequence: indexer.py's _prefill_kernel. queries: a TMA descriptor of
    codes [T * 64, 128], 64 heads.
    """
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
