"""The kernels that packed_fp8.py launches: tiles of products with packed weights on FP8 tensor cores.

FP4 codes are decoded in words of four bytes, which the compiler keeps in the registers that the tensor cores read. So
no weight has to be exchanged between threads through shared memory.

Shapes:  a tile is N outputs times M rows; a word holds 4 FP8 or 8 FP4 codes.
"""

from __future__ import annotations

import triton
import triton.language as tl

from antefix_kernels.finish import store_output
from antefix_kernels.linear import place_of_program
from antefix_kernels.rounding import bf16_bits


@triton.jit
def _power(byte):
    """float32 powers of two of E8M0 bytes; 0 is 2^-127, a subnormal number."""
    exponent = byte.to(tl.int32)
    return tl.where(exponent == 0, 0x400000, exponent << 23).to(tl.float32, bitcast=True)


@triton.jit
def _rows_of_tile(tile, experts, firsts, stops, sources, num_rows, ROUTED: tl.constexpr, GATHERED: tl.constexpr,
                  PICKED: tl.constexpr, M: tl.constexpr):  # fmt: skip
    """A tile's group, its first row, the row after its last, and where the inputs of its rows are."""
    if ROUTED:
        group = tl.load(experts + tile)
        first = tl.load(firsts + tile)
        stop = tl.load(stops + tile)
    else:
        group = tl.program_id(1)
        first = tile * M
        stop = num_rows
    # Rows past the end repeat the last one and are not stored. A tile without an expert loads nothing.
    rows = tl.minimum(first + tl.arange(0, M), tl.maximum(stop, 1) - 1)
    source = rows
    if GATHERED:
        source = (tl.load(sources + rows) // PICKED).to(tl.int32)
    return group, first, stop, source.to(tl.int64)


@triton.jit
def _halves(words, N: tl.constexpr, W: tl.constexpr):
    return tl.split(tl.permute(tl.reshape(words, (N, 2, W // 2)), (0, 2, 1)))


@triton.jit
def _quarters(words, N: tl.constexpr, W: tl.constexpr):
    left, right = _halves(words, N, W)
    a, b = _halves(left, N, W // 2)
    c, d = _halves(right, N, W // 2)
    return a, b, c, d


@triton.jit
def _bytes(words, N: tl.constexpr, ASM: tl.constexpr):
    """FP8 codes [N, 16] of words [N, 4]."""
    wide = tl.broadcast_to(words[:, :, None], (N, 4, 4))
    if ASM:
        # Not declared pure: the compiler would then broadcast the result instead, and pack four rows into a word.
        codes = tl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=r,r,r,r,r", [wide], dtype=tl.uint8, is_pure=False, pack=4
        )
    else:
        codes = ((wide >> (tl.arange(0, 4) * 8)[None, None, :]) & 255).to(tl.uint8)
    return tl.reshape(codes, (N, 16))


@triton.jit
def _fp8_of_fp4(words, N: tl.constexpr, ASM: tl.constexpr):
    """FP8 codes [N, 32], even addends first, of 32 FP4 codes in words [N, 4]: the sign to bit 7, the other bits to 4, 3
    and 2.
    """
    low = ((words << 4) & -2139062144) | ((words << 2) & 0x1C1C1C1C)
    high = (words & -2139062144) | ((words >> 2) & 0x1C1C1C1C)
    pair = tl.join(_bytes(low, N, ASM), _bytes(high, N, ASM))
    return tl.reshape(tl.permute(pair, (0, 2, 1)), (N, 32)).to(tl.float8e4nv, bitcast=True)


@triton.jit
def _dot(w, a, EXACT: tl.constexpr):
    if EXACT:
        product = tl.dot(w.to(tl.float32), a.to(tl.float32), input_precision="ieee")
    else:
        product = tl.dot(w, a)
    return product


@triton.jit
def _block_of_fp4(part, words, byte_scales, at_x, at, N: tl.constexpr, M: tl.constexpr, ASM: tl.constexpr,
                  EXACT: tl.constexpr):  # fmt: skip
    """128 addends: words [N, 16], their scales' four bytes [N] int32."""
    quarters = _quarters(words, N, 16)
    # Scales are at most 2, the byte 128: no sum reaches the next byte.
    biased = byte_scales + 0x40404040
    for g in tl.static_range(4):
        a = tl.load(at_x + (at + 32 * g)).to(tl.float8e4nv, bitcast=True)
        product = _dot(_fp8_of_fp4(quarters[g], N, ASM), a, EXACT)
        scale = (((biased >> (8 * g)) & 255) << 23).to(tl.float32, bitcast=True)
        part = tl.fma(product, tl.broadcast_to(scale[:, None], (N, M)), part)
    return part


@triton.jit
def _outputs(first, num_outputs, N: tl.constexpr, GATED: tl.constexpr):
    """The outputs of a tile's rows; GATED: eight gates, then the eight that they gate, so that a thread has both.

    Outputs past the end repeat the last one and are not stored.
    """
    n = tl.arange(0, N)
    if GATED:
        outputs = tl.minimum(first + n // 16 * 8 + n % 8, num_outputs - 1) + n // 8 % 2 * num_outputs
    else:
        outputs = tl.minimum(first + n, num_outputs - 1)
    return outputs.to(tl.int64)


@triton.jit
def _words(codes, at, offset, group, output, num_outputs, GATED: tl.constexpr, BULK: tl.constexpr,
           COLUMNS: tl.constexpr, W: tl.constexpr):  # fmt: skip
    """A step's words of a tile: W of each output, in the order of _outputs."""
    if BULK:
        words = tl.reshape(codes.load([group, output, offset]), (COLUMNS, W))
        if GATED:
            up = tl.reshape(codes.load([group, num_outputs + output, offset]), (COLUMNS, W))
            pairs = tl.reshape(tl.join(words, up), (COLUMNS // 8, 8, W, 2))
            words = tl.reshape(tl.permute(pairs, (0, 3, 1, 2)), (2 * COLUMNS, W))
    else:
        words = tl.load(at + offset)
    return words


@triton.jit(do_not_specialize=["num_rows"])
def fp4_kernel(x, x_scales, codes, scales, out, experts, firsts, stops, sources, num_rows, num_outputs, num_addends,
               num_weights, limit, stride_xn, stride_xg, stride_an, stride_ag, stride_cg, stride_co, stride_sg,
               stride_so, stride_on, stride_og, stride_os, steps_a_split, ROUTED: tl.constexpr, GATHERED: tl.constexpr,
               PICKED: tl.constexpr, GATED: tl.constexpr, BULK: tl.constexpr, WIDE: tl.constexpr, EXACT: tl.constexpr,
               ASM: tl.constexpr, N: tl.constexpr, M: tl.constexpr, TOGETHER: tl.constexpr,
               STAGES: tl.constexpr):  # fmt: skip
    """One tile of a weight times rows. codes and scales come as words, of 4 and of 4 or (WIDE) 8 bytes.

    BULK: codes is a tensor descriptor [E, O, words], by which Hopper's copy engine loads tiles. The copy engine stores
    tiles in an order from which registers are filled without conflicts of banks.

    GATED: half of the tile's outputs are gates and the other half the values that they gate. num_outputs counts gates,
    and the activation of the two is stored.
    """
    COLUMNS: tl.constexpr = N // 2 if GATED else N
    tile, column = place_of_program(tl.cdiv(num_outputs, COLUMNS), TOGETHER)
    group, first, stop, source = _rows_of_tile(tile, experts, firsts, stops, sources, num_rows, ROUTED, GATHERED,
                                               PICKED, M)  # fmt: skip
    if group < num_weights:
        outputs = _outputs(column * COLUMNS, num_outputs, N, GATED)
        split = tl.program_id(2)
        start = split * steps_a_split
        stop_step = tl.minimum(start + steps_a_split, num_addends // (128 * (2 if WIDE else 1)))
        BLOCKS: tl.constexpr = 2 if WIDE else 1
        w = tl.arange(0, 16 * BLOCKS)
        at_x = x + source[None, :] * stride_xn + (0 if ROUTED else group * stride_xg) + tl.arange(0, 32)[:, None]
        at_a = x_scales + source * stride_an + (0 if ROUTED else group * stride_ag)
        at_c = outputs[:, None] * stride_co + w[None, :]
        if not BULK:
            at_c = codes + (group.to(tl.int64) * stride_cg + at_c)
        at_s = scales + group.to(tl.int64) * stride_sg + outputs * stride_so
        acc = tl.zeros((N, M), tl.float32)
        for step in tl.range(start, stop_step, num_stages=STAGES):
            offset = step * (16 * BLOCKS)
            words = _words(codes, at_c, offset, group, column * COLUMNS, num_outputs, GATED, BULK, COLUMNS, 16 * BLOCKS)
            s = tl.load(at_s + step)
            zero = tl.zeros((N, M), tl.float32)
            if WIDE:
                left, right = _halves(words, N, 32)
                low = s.to(tl.int32)
                part = _block_of_fp4(zero, left, low, at_x, step * 256, N, M, ASM, EXACT)
                acc = tl.fma(part, tl.broadcast_to(tl.load(at_a + 2 * step)[None, :], (N, M)), acc)
                high = (s >> 32).to(tl.int32)
                part = _block_of_fp4(zero, right, high, at_x, step * 256 + 128, N, M, ASM, EXACT)
                acc = tl.fma(part, tl.broadcast_to(tl.load(at_a + (2 * step + 1))[None, :], (N, M)), acc)
            else:
                part = _block_of_fp4(zero, words, s, at_x, step * 128, N, M, ASM, EXACT)
                acc = tl.fma(part, tl.broadcast_to(tl.load(at_a + step)[None, :], (N, M)), acc)
        if GATED:
            acc = _gated(acc, out, limit, N, M)
        _store_tile(out, acc, group, first, stop, column * COLUMNS, num_outputs, split, stride_on, stride_og, stride_os,
                    ROUTED, COLUMNS, M)  # fmt: skip


@triton.jit(do_not_specialize=["num_rows"])
def fp8_kernel(x, x_scales, codes, scales, out, experts, firsts, stops, sources, num_rows, num_outputs, num_addends,
                num_weights, limit, stride_xn, stride_xg, stride_an, stride_ag, stride_cg, stride_co, stride_sg,
                stride_so, stride_on, stride_og, stride_os, steps_a_split, ROUTED: tl.constexpr, GATHERED: tl.constexpr,
                PICKED: tl.constexpr, GATED: tl.constexpr, POWERS: tl.constexpr, BLOCK_O: tl.constexpr,
                EXACT: tl.constexpr, ALL_RUNS: tl.constexpr, N: tl.constexpr, M: tl.constexpr, TOGETHER: tl.constexpr,
                STAGES: tl.constexpr):  # fmt: skip
    """One tile of a weight times rows, as fp4_kernel; a scale is of BLOCK_O outputs and 128 addends.

    ALL_RUNS: this program computes all runs of its addends, steps_a_split steps each, and adds them up.
    """
    COLUMNS: tl.constexpr = N // 2 if GATED else N
    tile, column = place_of_program(tl.cdiv(num_outputs, COLUMNS), TOGETHER)
    group, first, stop, source = _rows_of_tile(tile, experts, firsts, stops, sources, num_rows, ROUTED, GATHERED,
                                               PICKED, M)  # fmt: skip
    if group < num_weights:
        outputs = _outputs(column * COLUMNS, num_outputs, N, GATED)
        split = tl.program_id(2)
        start = split * steps_a_split
        stop_step = num_addends // 128
        if not ALL_RUNS:
            stop_step = tl.minimum(start + steps_a_split, stop_step)
        k = tl.arange(0, 128)
        at_x = x + source[None, :] * stride_xn + (0 if ROUTED else group * stride_xg) + k[:, None]
        at_a = x_scales + source * stride_an + (0 if ROUTED else group * stride_ag)
        at_c = codes + group.to(tl.int64) * stride_cg + outputs[:, None] * stride_co + k[None, :]
        at_s = scales + group.to(tl.int64) * stride_sg
        if BLOCK_O % N == 0 and not GATED:
            # One scale for the whole tile.
            at_s += (column * N // BLOCK_O).to(tl.int64) * stride_so
        else:
            at_s += (outputs // BLOCK_O) * stride_so
        acc = tl.zeros((N, M), tl.float32)
        total = tl.zeros((N, M), tl.float32)
        for step in tl.range(start, stop_step, num_stages=STAGES):
            c = tl.load(at_c + step * 128).to(tl.float8e4nv, bitcast=True)
            a = tl.load(at_x + step * 128).to(tl.float8e4nv, bitcast=True)
            s = tl.load(at_s + step)
            if POWERS:
                s = _power(s)
            product = _dot(c, a, EXACT)
            if BLOCK_O % N == 0 and not GATED:
                factor = tl.load(at_a + step)[None, :] * s
            else:
                factor = tl.load(at_a + step)[None, :] * s[:, None]
            acc = tl.fma(product, tl.broadcast_to(factor, (N, M)), acc)
            if ALL_RUNS:  # noqa: SIM102 - the compiler must not see the other condition where this one is false
                # The end of a run: what _sum_kernel does with the runs of several programs, in its order.
                if (step + 1) % steps_a_split == 0:
                    total = tl.where(step < steps_a_split, acc, total + acc)
                    acc = tl.zeros((N, M), tl.float32)
        if ALL_RUNS:
            acc = total
        if GATED:
            acc = _gated(acc, out, limit, N, M)
        _store_tile(out, acc, group, first, stop, column * COLUMNS, num_outputs, split, stride_on, stride_og, stride_os,
                    ROUTED, COLUMNS, M)  # fmt: skip


@triton.jit
def _as_bf16(x):
    """float32 rounded to BF16."""
    return (bf16_bits(x).to(tl.int32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def _gated(acc, out, limit, N: tl.constexpr, M: tl.constexpr):
    """silu(gate) * up, both clamped, of rows in the order of _outputs: the numbers of `tokens.swiglu`."""
    gate, up = tl.split(tl.permute(tl.reshape(acc, (N // 16, 2, 8, M)), (0, 2, 3, 1)))
    gate, up = tl.reshape(gate, (N // 2, M)), tl.reshape(up, (N // 2, M))
    if out.dtype.element_ty == tl.bfloat16:
        gate, up = _as_bf16(gate), _as_bf16(up)
    gate = tl.minimum(gate, limit)
    up = tl.minimum(tl.maximum(up, -limit), limit)
    return gate * (1.0 / (1.0 + tl.exp(-gate))) * up


@triton.jit
def _store_tile(out, acc, group, first, stop, first_output, num_outputs, split, stride_on, stride_og, stride_os,
                ROUTED: tl.constexpr, COLUMNS: tl.constexpr, M: tl.constexpr):  # fmt: skip
    o = first_output + tl.arange(0, COLUMNS)
    rows = first + tl.arange(0, M)
    place = rows.to(tl.int64)[None, :] * stride_on + o[:, None]
    place += (0 if ROUTED else group.to(tl.int64) * stride_og) + split.to(tl.int64) * stride_os
    store_output(out, place, acc, (o < num_outputs)[:, None] & (rows < stop)[None, :])
