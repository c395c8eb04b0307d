"""Products with packed weights: FP8 and FP4 codes are read packed and decoded in registers, next to the product.

A weight tile is the product's left side, so that decoded numbers never pass through shared memory; tokens are its
right side. A product with few outputs is split over its addends, in a number of parts that depends on the weight alone,
and the parts are added up in order. If there are few rows, a tile has fewer rows. A tile of fewer rows changes no bit:
an element's sum has the same addends in the same instructions whatever the tile (benchmarks/weights_on_card.py compares
them to the bit, and so does the probe of a worker's arithmetic at every start).

Decoded values are exact in BF16: an FP8 or FP4 code times a power of two, and inputs that `prepare_inputs` rounded.
Scales that are not powers of two (float32 scales of FP8) multiply the sum over their block instead.

Shapes:  N = rows, K = addends, O = outputs, B = bytes of a weight's row (K, or K / 2 for FP4), G = groups, E = experts,
         R = routed rows, S = splits.
Source:  fp8_gemm and fp4_gemm of the released inference/kernel.py; oracle: torch_reference.decode_weight.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from antefix_kernels.finish import store_output
from antefix_kernels.linear import SKIPS_MISSING_ROWS, Routing, place_of_program
from antefix_kernels.number_formats import check
from antefix_kernels.rounding import fp8_exponent

# Addends that share a scale when inputs are rounded, and in FP4.
INPUT_GROUP = 128
FP4_BLOCK = 32
# Outputs, rows, addends, warps and stages of a tile, by the largest number of rows it is used for (for experts: rows of
# an expert on average): the fastest on an H200 at 32, 128 and 2,048 tokens of V4-Flash's products.
_TILES_FP8 = ((32, (64, 32, 128, 4, 4)), (64, (128, 64, 128, 8, 4)), (None, (128, 128, 128, 8, 3)))
_TILES_FP4 = ((8, (64, 16, 128, 4, 4)), (None, (128, 64, 128, 8, 3)))
# The number of splits is computed with this many outputs per tile, whatever the tile is.
_SPLIT_OUTPUTS = 128
# Float32 models are small; their products use no tensor cores.
_TILE_FLOAT32 = (32, 32, 32, 4, 1)
# Programs that keep a GPU of 132 processors busy: fewer tiles of outputs are split over their addends.
_PROGRAMS_MIN = 128
# A part has at least this many addends.
_SPLIT_ADDENDS_MIN = 512
_ROW_TILES_TOGETHER = 8
_ROUND_GROUPS = 8

# Four bytes and their scales to the values of their four low and four high codes, as BF16: sign to bit 15, the other
# three bits to bits 6 to 8, where they are the number times 2^-126; then times the scale, which is given times 2^126.
_DECODE_FP4: tl.constexpr = tl.constexpr("""
{
.reg .b32 a, b, c, d;
prmt.b32 a, $4, 0, 0x4140;
prmt.b32 b, $4, 0, 0x4342;
shl.b32 c, a, 12;
and.b32 c, c, 0x80008000;
shl.b32 d, a, 6;
and.b32 d, d, 0x01C001C0;
or.b32 c, c, d;
mul.rn.bf16x2 $0, c, $5;
shl.b32 c, b, 12;
and.b32 c, c, 0x80008000;
shl.b32 d, b, 6;
and.b32 d, d, 0x01C001C0;
or.b32 c, c, d;
mul.rn.bf16x2 $1, c, $6;
shl.b32 c, a, 8;
and.b32 c, c, 0x80008000;
shl.b32 d, a, 2;
and.b32 d, d, 0x01C001C0;
or.b32 c, c, d;
mul.rn.bf16x2 $2, c, $5;
shl.b32 c, b, 8;
and.b32 c, c, 0x80008000;
shl.b32 d, b, 2;
and.b32 d, d, 0x01C001C0;
or.b32 c, c, d;
mul.rn.bf16x2 $3, c, $6;
}
""")


@dataclass(frozen=True, slots=True, kw_only=True)
class Weight:
    """A packed weight as kernels read it.

    codes: [G or E, O, B] float8_e4m3fn, or uint8 for FP4 (the even addend in the low nibble).
    scales: [G or E, ceil(O / block[0]), ceil(K / block[1])] float8_e8m0fnu or float32, last dim contiguous; of FP4 at
        most 2 (the byte 128), or decoded numbers overflow: its maker checks it.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    block: tuple[int, int]

    @property
    def is_fp4(self) -> bool:
        return self.codes.dtype is torch.uint8

    @property
    def num_addends(self) -> int:
        return self.codes.shape[2] * (2 if self.is_fp4 else 1)


@triton.jit
def _prepare_kernel(x, out, num_rows, num_addends, stride_n, ROUND: tl.constexpr, SPLIT: tl.constexpr,
                    GROUPS: tl.constexpr, GROUP: tl.constexpr):  # fmt: skip
    """GROUPS groups of one row: rounded to FP8 if ROUND, even addends before odd ones if SPLIT."""
    row = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * GROUPS * GROUP + tl.arange(0, GROUPS * GROUP)
    live = k < num_addends
    v = tl.load(x + row * stride_n + k, live, other=0.0).to(tl.float32)
    if ROUND:
        groups = tl.reshape(v, (GROUPS, GROUP))
        exponent = fp8_exponent(tl.max(tl.abs(groups), 1)) + 127
        scale = (exponent << 23).to(tl.float32, bitcast=True)
        # Exact: the scale is a power of two.
        inverse = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
        y = groups * inverse[:, None]
        y = tl.minimum(tl.maximum(y, -448.0), 448.0)
        # E4M3's steps: an eighth of the power of two below a number, at least 2^-9. Adding 1.5 * 2^23 rounds to even.
        power = tl.maximum((y.to(tl.int32, bitcast=True) >> 23) & 0xFF, 121)
        step = ((power - 3) << 23).to(tl.float32, bitcast=True)
        unstep = ((257 - power) << 23).to(tl.float32, bitcast=True)
        y = ((y * unstep + 12582912.0) - 12582912.0) * step
        v = tl.reshape(y * scale[:, None], (GROUPS * GROUP,))
    target = k
    if SPLIT:
        target = k // 2 + (k % 2) * (num_addends // 2)
    store_output(out, row * num_addends + target, v, live)


@triton.jit
def _power(byte):
    """float32 powers of two of E8M0 bytes; 0 is 2^-127, a subnormal number."""
    exponent = byte.to(tl.int32)
    return tl.where(exponent == 0, 0x400000, exponent << 23).to(tl.float32, bitcast=True)


@triton.jit
def _spread(values, scale, N: tl.constexpr, HALF: tl.constexpr):
    """values [N, HALF] times scale [N, HALF / 16], each for 16 neighbours."""
    groups = tl.reshape(values, (N, HALF // 16, 16)) * scale[:, :, None]
    return tl.reshape(groups, (N, HALF))


@triton.jit
def _fp4_values(nibble):
    """float32 values of E2M1 codes: exponent and mantissa bits as they are, times 2^126."""
    bits = ((nibble & 8).to(tl.uint32) << 28) | ((nibble & 7).to(tl.uint32) << 22)
    return bits.to(tl.float32, bitcast=True) * 8.507059173023462e37


@triton.jit(do_not_specialize=["num_rows"])
def _product_kernel(x, codes, scales, out, experts, firsts, stops, sources, num_rows, num_outputs, num_addends,
                    num_weights, stride_xn, stride_xg, stride_cg, stride_co, stride_sg, stride_so, stride_on, stride_og,
                    stride_os, steps_a_split, ROUTED: tl.constexpr, GATHERED: tl.constexpr, PICKED: tl.constexpr,
                    FP4: tl.constexpr, POWERS: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_K: tl.constexpr,
                    EVEN: tl.constexpr, EXACT: tl.constexpr, ASM: tl.constexpr, N: tl.constexpr, M: tl.constexpr,
                    K: tl.constexpr, TOGETHER: tl.constexpr, STAGES: tl.constexpr,
                    SKIPS: tl.constexpr):  # fmt: skip
    """One tile [N outputs, M rows] of a weight times rows, over one split's addends."""
    tile, column = place_of_program(tl.cdiv(num_outputs, N), TOGETHER)
    if ROUTED:
        group = tl.load(experts + tile)
        first = tl.load(firsts + tile)
        stop = tl.load(stops + tile)
    else:
        group = tl.program_id(1)
        first = tile * M
        stop = num_rows
    if group < num_weights:
        rows = tl.minimum(first + tl.arange(0, M), stop - 1)
        source = rows
        if GATHERED:
            source = (tl.load(sources + rows) // PICKED).to(tl.int32)
        o = column * N + tl.arange(0, N)
        # Outputs and rows past the end repeat the last one and are not stored.
        outputs = tl.minimum(o, num_outputs - 1).to(tl.int64)
        split = tl.program_id(2)
        BYTES: tl.constexpr = K // 2 if FP4 else K
        half = num_addends // 2
        b = tl.arange(0, BYTES)
        start = split * steps_a_split
        at_x = x + source.to(tl.int64)[None, :] * stride_xn + (0 if ROUTED else group * stride_xg) + b[:, None]
        at_c = codes + group.to(tl.int64) * stride_cg + outputs[:, None] * stride_co + b[None, :]
        at_s = scales + group.to(tl.int64) * stride_sg + (outputs // BLOCK_O) * stride_so
        acc = tl.zeros((N, M), tl.float32)
        for step in tl.range(start, start + steps_a_split, num_stages=STAGES):
            at = step * BYTES
            if EVEN:
                c = tl.load(at_c + at)
            else:
                inside = at + b < (half if FP4 else num_addends)
                c = tl.load(at_c + at, inside[None, :], other=0)
            if FP4:
                g = tl.arange(0, K // 32)
                known = step * (K // 32) + g < num_addends // 32
                s = tl.load(at_s[:, None] + (step * (K // 32) + g)[None, :], known[None, :], other=127)
                if EVEN:
                    even = tl.load(at_x + at)
                    odd = tl.load(at_x + half + at)
                else:
                    even = tl.load(at_x + at, inside[:, None], other=0.0)
                    odd = tl.load(at_x + half + at, inside[:, None], other=0.0)
                if ASM:
                    # BF16 bits of 2^(byte - 127) times 2^126; `Weight` promises that this is a number.
                    power = ((s.to(tl.int16) + 126) << 7).to(tl.bfloat16, bitcast=True)
                    wide = tl.broadcast_to(power[:, :, None], (N, BYTES // 16, 16))
                    low, high = tl.inline_asm_elementwise(
                        _DECODE_FP4, "=r,=r,=r,=r,r,r,r", [c, tl.reshape(wide, (N, BYTES))],
                        dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=4,
                    )  # fmt: skip
                else:
                    code = c.to(tl.int32)
                    scale = _power(s)
                    low = _spread(_fp4_values(code & 15), scale, N, BYTES)
                    high = _spread(_fp4_values(code >> 4), scale, N, BYTES)
                if EXACT:
                    acc = tl.dot(low, even.to(tl.float32), acc, input_precision="ieee")
                    acc = tl.dot(high, odd.to(tl.float32), acc, input_precision="ieee")
                else:
                    acc = tl.dot(low, even, acc)
                    acc = tl.dot(high, odd, acc)
            else:
                c = c.to(tl.float8e4nv, bitcast=True)
                if SKIPS:
                    # Rows past the end are zeros instead of copies of the last one, as in linear.
                    has_row = (first + tl.arange(0, M) < stop)[None, :]
                    a = tl.load(at_x + at, has_row & (at + b < num_addends)[:, None], other=0.0)
                elif EVEN:
                    a = tl.load(at_x + at)
                else:
                    a = tl.load(at_x + at, inside[:, None], other=0.0)
                at_scale = step * K // BLOCK_K
                last = (num_addends - 1) // BLOCK_K
                s = tl.load(at_s + tl.minimum(at_scale, last))
                if EXACT:
                    part = tl.dot(c.to(tl.float32), a.to(tl.float32), input_precision="ieee")
                    acc = tl.fma(part, (_power(s) if POWERS else s)[:, None], acc)
                elif POWERS:
                    w = c.to(tl.bfloat16) * _power(s).to(tl.bfloat16)[:, None]
                    acc = tl.dot(w, a, acc)
                else:
                    acc = tl.fma(tl.dot(c.to(tl.bfloat16), a), s[:, None], acc)
        live = (o < num_outputs)[:, None] & (first + tl.arange(0, M) < stop)[None, :]
        place = (first + tl.arange(0, M)).to(tl.int64)[None, :] * stride_on + o[:, None]
        place += (0 if ROUTED else group.to(tl.int64) * stride_og) + split.to(tl.int64) * stride_os
        store_output(out, place, acc, live)


@triton.jit
def _sum_kernel(parts, out, size, SPLITS: tl.constexpr, COLUMNS: tl.constexpr):
    """SPLITS parts of float32 added up in order."""
    i = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.load(parts + i, i < size, other=0.0)
    for part in tl.static_range(1, SPLITS):
        total += tl.load(parts + part * size + i, i < size, other=0.0)
    store_output(out, i, total, i < size)


def prepare_inputs(x: torch.Tensor, *, rounds: bool, is_fp4: bool) -> torch.Tensor:
    """Rows as packed products need them: rounded to FP8 if `rounds`; for FP4, even addends before odd ones.

    Shapes:  x [N, K] float32 or bfloat16, last dim contiguous. Returns [N, K] of its type, contiguous.
    Raises:  ValueError: wrong dtype, shape or stride.
    """
    check(x.dim() == 2 and x.stride(1) == 1, "rows must be [N, K] with a contiguous last dim")
    check(x.dtype in (torch.bfloat16, torch.float32), f"need float32 or bfloat16, got {x.dtype}")
    if not rounds and not is_fp4:
        return x
    num_rows, num_addends = x.shape
    out = torch.empty(num_rows, num_addends, dtype=x.dtype, device=x.device)
    if out.numel():
        grid = (num_rows, triton.cdiv(num_addends, _ROUND_GROUPS * INPUT_GROUP))
        _prepare_kernel[grid](
            x, out, num_rows, num_addends, x.stride(0), ROUND=rounds, SPLIT=is_fp4, GROUPS=_ROUND_GROUPS,
            GROUP=INPUT_GROUP, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return out


def multiply(x: torch.Tensor, weight: Weight, *, splits: int | None = None) -> torch.Tensor:
    """Prepared rows times a packed weight, or group by group times the weights of as many groups.

    splits: into how many runs the addends are split, which decides the bits; None: `num_splits` of the weight.

    Shapes:  x [N, G, K] prepared, weight of G. Returns [N, G, O] of x's type.
    Raises:  ValueError: wrong dtype, shape or stride.
    """
    num_groups, num_outputs = weight.codes.shape[:2]
    check(x.dim() == 3 and x.shape[1] == num_groups, "inputs and weights have other numbers of groups")
    tile = _tile(x, weight, len(x))
    m = tile[1]
    splits = splits or num_splits(weight)
    out = torch.empty(x.shape[0], num_groups, num_outputs, dtype=x.dtype, device=x.device)
    if splits == 1:
        _launch(x, weight, out, None, tile=tile, splits=1, row_tiles=triton.cdiv(len(x), m), gathered=False)
        return out
    parts = torch.empty(splits, *out.shape, dtype=torch.float32, device=x.device)
    _launch(x, weight, parts, None, tile=tile, splits=splits, row_tiles=triton.cdiv(len(x), m), gathered=False)
    add_parts(parts, out)
    return out


def add_parts(parts: torch.Tensor, out: torch.Tensor) -> None:
    """parts [S, ...] float32, contiguous, added up in order into out [...]."""
    if out.numel():
        grid = (triton.cdiv(out.numel(), 1024),)
        _sum_kernel[grid](parts, out, out.numel(), SPLITS=len(parts), COLUMNS=1024, enable_fp_fusion=False)


def routed_tile(x: torch.Tensor, num_rows: int, weight: Weight) -> int:
    """How many rows a tile has for `num_rows` picks, for `linear.route`."""
    return _tile(x, weight, num_rows // len(weight.codes))[1]


def multiply_routed(x: torch.Tensor, weight: Weight, routing: Routing, *, gathered: bool) -> torch.Tensor:
    """Each prepared row times its expert's weight; rows and results in the routing's order.

    Shapes:  x [R, K] sorted, or with `gathered` the tokens' rows [N, K]; weight of E experts. Returns [R, O].
    Raises:  ValueError: wrong dtype, shape or stride.
    """
    out = torch.empty(len(routing.order), weight.codes.shape[1], dtype=x.dtype, device=x.device)
    tile = _tile(x, weight, len(routing.order) // len(weight.codes))
    row_tiles = len(routing.experts)
    _launch(
        x.unsqueeze(1), weight, out.unsqueeze(1), routing, tile=tile, splits=1, row_tiles=row_tiles, gathered=gathered
    )
    return out


def _launch(
    x: torch.Tensor,
    weight: Weight,
    out: torch.Tensor,
    routing: Routing | None,
    *,
    tile: tuple[int, int, int, int, int],
    splits: int,
    row_tiles: int,
    gathered: bool,
) -> None:
    """x [N, G, K], weight of G or E, out [N, G, O], or [S, N, G, O] of parts."""
    num_weights, num_outputs, _ = weight.codes.shape
    num_addends = weight.num_addends
    _check_operands(x, weight)
    if not out.numel():
        return
    n, m, k, warps, stages = tile
    on_card = x.device.type == "cuda"
    powers = weight.scales.dtype is torch.float8_e8m0fnu
    scales = weight.scales.view(torch.uint8) if powers else weight.scales
    steps = triton.cdiv(triton.cdiv(num_addends, k), splits)
    empty = x if routing is None else routing.order
    grid = (row_tiles * triton.cdiv(num_outputs, n), 1 if routing else num_weights, splits)
    _product_kernel[grid](
        x,
        weight.codes.view(torch.uint8),
        scales,
        out,
        empty if routing is None else routing.experts,
        empty if routing is None else routing.firsts,
        empty if routing is None else routing.stops,
        empty,
        out.shape[-3],
        num_outputs,
        num_addends,
        num_weights,
        x.stride(0),
        x.stride(1),
        weight.codes.stride(0),
        weight.codes.stride(1),
        scales.stride(0),
        scales.stride(1),
        out.stride(-3),
        out.stride(-2),
        out.stride(0) if splits > 1 else 0,
        steps,
        ROUTED=routing is not None,
        GATHERED=gathered,
        PICKED=routing.num_picked if routing else 1,
        FP4=weight.is_fp4,
        POWERS=powers,
        BLOCK_O=weight.block[0],
        BLOCK_K=weight.block[1],
        EVEN=num_addends % (k * splits) == 0,
        # On a CPU this is the interpreter, whose dot takes BF16's bits for integers.
        EXACT=x.dtype is torch.float32 or not on_card,
        ASM=on_card and x.dtype is torch.bfloat16,
        N=n,
        M=m,
        K=k,
        TOGETHER=_ROW_TILES_TOGETHER,
        STAGES=stages,
        SKIPS=SKIPS_MISSING_ROWS and 2 * out.shape[-3] <= row_tiles * m,
        num_warps=warps,
        enable_fp_fusion=False,
    )


def _check_operands(x: torch.Tensor, weight: Weight) -> None:
    num_addends = weight.num_addends
    check(x.dtype in (torch.bfloat16, torch.float32), f"need float32 or bfloat16, got {x.dtype}")
    check(x.stride(2) == 1, "the last dims must be contiguous")
    check(x.shape[2] == num_addends, f"inputs have {x.shape[2]} addends, weights {num_addends}")
    check_weight(weight)


def check_weight(weight: Weight) -> None:
    """Raises ValueError: a weight that the kernels would read wrongly."""
    num_weights, num_outputs, _ = weight.codes.shape
    num_addends = weight.num_addends
    check(weight.codes.stride(2) == 1, "the last dims must be contiguous")
    check(weight.codes.dtype in (torch.float8_e4m3fn, torch.uint8), f"codes of {weight.codes.dtype} are not known")
    rows, addends = weight.block
    shape = (num_weights, triton.cdiv(num_outputs, rows), triton.cdiv(num_addends, addends))
    check(tuple(weight.scales.shape) == shape and weight.scales.stride(2) == 1, f"scales must be {shape}")
    check(weight.scales.dtype in (torch.float8_e8m0fnu, torch.float32), f"scales of {weight.scales.dtype}")
    if weight.is_fp4:
        is_known = weight.block == (1, FP4_BLOCK) and weight.scales.dtype is torch.float8_e8m0fnu
        check(is_known and num_addends % FP4_BLOCK == 0, "FP4 weights have E8M0 scales over 32 addends")
    else:
        check(addends >= 32 and addends & (addends - 1) == 0, "FP8 blocks have a power of two of addends, 32 at least")


def _tile(x: torch.Tensor, weight: Weight, num_rows: int) -> tuple[int, int, int, int, int]:
    """Outputs, rows, addends, warps, stages.  num_rows: of all, or of an expert on average."""
    if x.dtype is torch.float32 or x.device.type != "cuda":
        return _TILE_FLOAT32
    tiles = _TILES_FP4 if weight.is_fp4 else _TILES_FP8
    n, m, k, warps, stages = next(tile for most, tile in tiles if most is None or num_rows <= most)
    return n, m, k if weight.is_fp4 else min(k, weight.block[1]), warps, stages


def num_splits(weight: Weight) -> int:
    """The number of runs into which addends are split if outputs are few: a power of two, by the weight alone."""
    num_groups, num_outputs = weight.codes.shape[:2]
    num_tiles = num_groups * triton.cdiv(num_outputs, _SPLIT_OUTPUTS)
    splits = 1
    while num_tiles * splits < _PROGRAMS_MIN and weight.num_addends // (2 * splits) >= _SPLIT_ADDENDS_MIN:
        splits *= 2
    return splits
