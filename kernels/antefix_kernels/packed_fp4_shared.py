"""A candidate for products with FP4 weights: 128 addends in one sum of the tensor cores, where packed_fp8 takes 32.

In packed_fp8, each sum of 32 addends is multiplied by its scale, which takes about as long as the tensor cores do.
In this candidate, codes get their group's scale before they enter: an E2M1 number times a power of two is an E4M3
number too, as long as the scales of 128 addends lie within a factor of 2^11. So a sum is that of FP8 weights,
    total = fma(sum of 128 addends, scale of the inputs * least scale of the weights, total),
in another order than packed_fp8's: other bits, other names of KV. No worker uses this candidate;
benchmarks/packed_products.py measures it.

Shapes:  as in packed_fp8.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from antefix_kernels.linear import Routing, place_of_program
from antefix_kernels.number_formats import check
from antefix_kernels.packed_fp8 import Inputs, Tile, operands_of
from antefix_kernels.packed_fp8_tiles import (
    _bytes,
    _dot,
    _gated,
    _halves,
    _outputs,
    _quarters,
    _rows_of_tile,
    _store_tile,
    _words,
)
from antefix_kernels.packed_linear import INPUT_GROUP, Weight

# Scales of one block of 128 addends may differ by so many powers of two: FP8's exponents but those of FP4's numbers.
_SPREAD_MAX = 11
_ROW_TILES_TOGETHER = 8


def takes(weight: Weight) -> bool:
    """Whether a weight's scales lie close enough in each block of 128 addends. Reads them all."""
    if not weight.is_fp4 or weight.num_addends % INPUT_GROUP:
        return False
    groups = weight.scales.view(torch.uint8).view(-1, INPUT_GROUP // 32).short()
    # Codes' scales end at 128, as packed_fp8 has it.
    return bool(((groups.amax(1) - groups.amin(1)) <= _SPREAD_MAX).all()) and int(groups.max()) <= 128


@triton.jit
def _scaled_codes(words, spread, N: tl.constexpr, ASM: tl.constexpr):
    """FP8 codes [N, 32], even addends first, of 32 FP4 codes in words [N, 4] times 2^(spread + 1), spread [N]: numbers
    0, 0.5, 1, 1.5, 2, 3, 4 and 6 are codes 0, 8, 16, 20, 24, 28, 32 and 36, and a power of two adds 8 to all but 0.
    """
    if ASM:
        first = tl.broadcast_to((0x14100800 + spread * 0x08080800)[:, None], (N, 4))
        second = tl.broadcast_to((0x24201C18 + spread * 0x08080808)[:, None], (N, 4))
        even, odd = tl.inline_asm_elementwise(
            """{
            .reg .b32 m, h, a, b, s;
            and.b32 m, $2, 0x77777777; shr.u32 h, m, 16;
            prmt.b32 a, $3, $4, m; prmt.b32 b, $3, $4, h;
            shl.b32 s, $2, 4;
            prmt.b32 m, a, b, 0x6420; prmt.b32 h, a, b, 0x7531;
            lop3.b32 $0, s, 0x80808080, m, 0xEA; lop3.b32 $1, $2, 0x80808080, h, 0xEA;
            }""",
            "=r,=r,r,r,r", [words, first, second], dtype=(tl.int32, tl.int32), is_pure=False, pack=1,
        )  # fmt: skip
    else:
        even = (words << 4) & -2139062144
        odd = words & -2139062144
        for byte in tl.static_range(4):
            for half in tl.static_range(2):
                number = (words >> (8 * byte + 4 * half)) & 7
                code = tl.where(number > 1, 8 + 4 * number, 8 * number)
                code = tl.where(number > 0, code + 8 * spread[:, None], 0) << (8 * byte)
                if half == 0:
                    even = even | code
                else:
                    odd = odd | code
    pair = tl.join(_bytes(even, N, ASM), _bytes(odd, N, ASM))
    return tl.reshape(tl.permute(pair, (0, 2, 1)), (N, 32)).to(tl.float8e4nv, bitcast=True)


@triton.jit
def _block(acc, words, byte_scales, input_scales, at_x, at, N: tl.constexpr, M: tl.constexpr, ASM: tl.constexpr,
           EXACT: tl.constexpr):  # fmt: skip
    """128 addends: words [N, 16], their scales' four bytes [N] int32, the inputs' scales [M]."""
    quarters = _quarters(words, N, 16)
    least = byte_scales & 255
    for g in tl.static_range(1, 4):
        least = tl.minimum(least, (byte_scales >> (8 * g)) & 255)
    product = tl.zeros((N, M), tl.float32)
    for g in tl.static_range(4):
        a = tl.load(at_x + (at + 32 * g)).to(tl.float8e4nv, bitcast=True)
        w = _scaled_codes(quarters[g], ((byte_scales >> (8 * g)) & 255) - least, N, ASM)
        if EXACT:
            product += _dot(w, a, EXACT)
        else:
            product = tl.dot(w, a, product)
    # Biased as the inputs' scales have it; codes are larger by a factor of two.
    scale = ((least + 63) << 23).to(tl.float32, bitcast=True)
    return tl.fma(product, input_scales[None, :] * scale[:, None], acc)


@triton.jit(do_not_specialize=["num_rows"])
def shared_kernel(x, x_scales, codes, scales, out, experts, firsts, stops, sources, num_rows, num_outputs, num_addends,
                  num_weights, limit, stride_xn, stride_an, stride_cg, stride_co, stride_sg, stride_so, stride_on,
                  GATHERED: tl.constexpr, PICKED: tl.constexpr, GATED: tl.constexpr, BULK: tl.constexpr,
                  WIDE: tl.constexpr, EXACT: tl.constexpr, ASM: tl.constexpr, N: tl.constexpr, M: tl.constexpr,
                  TOGETHER: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """One tile of an expert times its rows, as packed_fp8_tiles.fp4_kernel."""
    COLUMNS: tl.constexpr = N // 2 if GATED else N
    tile, column = place_of_program(tl.cdiv(num_outputs, COLUMNS), TOGETHER)
    group, first, stop, source = _rows_of_tile(tile, experts, firsts, stops, sources, num_rows, True, GATHERED,
                                               PICKED, M)  # fmt: skip
    if group < num_weights:
        outputs = _outputs(column * COLUMNS, num_outputs, N, GATED)
        BLOCKS: tl.constexpr = 2 if WIDE else 1
        w = tl.arange(0, 16 * BLOCKS)
        at_x = x + source[None, :] * stride_xn + tl.arange(0, 32)[:, None]
        at_a = x_scales + source * stride_an
        at_c = outputs[:, None] * stride_co + w[None, :]
        if not BULK:
            at_c = codes + (group.to(tl.int64) * stride_cg + at_c)
        at_s = scales + group.to(tl.int64) * stride_sg + outputs * stride_so
        acc = tl.zeros((N, M), tl.float32)
        for step in tl.range(0, num_addends // (128 * BLOCKS), num_stages=STAGES):
            offset = step * (16 * BLOCKS)
            words = _words(codes, at_c, offset, group, column * COLUMNS, num_outputs, GATED, BULK, COLUMNS, 16 * BLOCKS)
            s = tl.load(at_s + step)
            if WIDE:
                left, right = _halves(words, N, 32)
                acc = _block(acc, left, s.to(tl.int32), tl.load(at_a + 2 * step), at_x, step * 256, N, M, ASM, EXACT)
                acc = _block(acc, right, (s >> 32).to(tl.int32), tl.load(at_a + (2 * step + 1)), at_x,
                             step * 256 + 128, N, M, ASM, EXACT)  # fmt: skip
            else:
                acc = _block(acc, words, s, tl.load(at_a + step), at_x, step * 128, N, M, ASM, EXACT)
        if GATED:
            acc = _gated(acc, out, limit, N, M)
        _store_tile(out, acc, group, first, stop, column * COLUMNS, num_outputs, tl.program_id(2), stride_on, 0, 0,
                    True, COLUMNS, M)  # fmt: skip


def multiply_routed(
    inputs: Inputs,
    weight: Weight,
    routing: Routing,
    dtype: torch.dtype,
    *,
    gathered: bool,
    tile: Tile,
    gate_limit: float | None = None,
) -> torch.Tensor:
    """As packed_fp8.multiply_routed, for a weight for which `takes` is true; this is not checked here."""
    check(weight.is_fp4, "these products are of FP4 weights")
    is_gated, device = gate_limit is not None, inputs.codes.device
    on_card = device.type == "cuda"
    num_outputs = weight.codes.shape[1] // (2 if is_gated else 1)
    out = torch.empty(len(routing.order), num_outputs, dtype=dtype, device=device)
    columns = tile.outputs // (2 if is_gated else 1)
    _, codes, scales, choices = operands_of(weight, splits=1, columns=columns, on_card=on_card)
    shared_kernel[(len(routing.experts) * triton.cdiv(num_outputs, columns),)](
        # The interpreter reads FP8 as bytes.
        inputs.codes if on_card else inputs.codes.view(torch.uint8),
        inputs.scales,
        codes,
        scales,
        out,
        routing.experts,
        routing.firsts,
        routing.stops,
        routing.order,
        len(out),
        num_outputs,
        weight.num_addends,
        len(weight.codes),
        0.0 if gate_limit is None else gate_limit,
        inputs.codes.stride(0),
        inputs.scales.stride(0),
        weight.codes.stride(0) // 4,
        weight.codes.stride(1) // 4,
        scales.stride(0),
        scales.stride(1),
        out.stride(0),
        GATHERED=gathered,
        PICKED=routing.num_picked,
        GATED=is_gated,
        EXACT=not on_card,
        N=tile.outputs,
        M=tile.rows,
        TOGETHER=_ROW_TILES_TOGETHER,
        STAGES=tile.stages,
        num_warps=tile.warps,
        enable_fp_fusion=False,
        **choices,
    )
    return out
