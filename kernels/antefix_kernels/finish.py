"""Device functions that finish rows of KV: RMSNorm, RoPE, rounding, record bytes; and undoing RoPE on outputs.

Shapes:  x [ROWS, D] float32, D the power of two that holds DIM columns; base [ROWS] byte pointers; live [ROWS] bool.
"""

from __future__ import annotations

import triton
import triton.language as tl

from antefix_kernels.rounding import (
    bf16_bits,
    e2m1_code,
    e4m3_code,
    fp4_exponent,
    fp8_exponent,
    hadamard_rows,
    power_of_two,
)


@triton.jit
def record_offsets(slots, stride_p, ENTRIES: tl.constexpr, RECORD: tl.constexpr, ALIGN: tl.constexpr):
    block = (slots // ENTRIES).to(tl.int64)
    return tl.multiple_of(block * stride_p + (slots % ENTRIES).to(tl.int64) * RECORD, ALIGN)


@triton.jit
def norm_rope(x, rows, live, weight, cos, sin, eps, ROWS: tl.constexpr, D: tl.constexpr, DIM: tl.constexpr,
               ROPE: tl.constexpr):  # fmt: skip
    """RMSNorm, then RoPE on the last ROPE of DIM dims, of x [ROWS, D] whose columns from DIM on are zero."""
    d = tl.arange(0, D)
    x = x * (1.0 / tl.sqrt(tl.sum(x * x, 1) / DIM + eps))[:, None] * tl.load(weight + d, d < DIM, other=0.0)[None, :]
    even, odd = tl.split(tl.reshape(x, (ROWS, D // 2, 2)))
    pair = tl.arange(0, D // 2) - (DIM - ROPE) // 2
    turned = live[:, None] & (pair >= 0)[None, :] & (pair < ROPE // 2)[None, :]
    at = rows[:, None] * (ROPE // 2) + pair[None, :]
    c = tl.load(cos + at, turned, other=1.0)
    s = tl.load(sin + at, turned, other=0.0)
    return tl.reshape(tl.join(even * c - odd * s, even * s + odd * c), (ROWS, D))


@triton.jit
def store_entries(x, base, live, ROWS: tl.constexpr, D: tl.constexpr, DIM: tl.constexpr, ROPE: tl.constexpr,
                   SCALE_OFFSET: tl.constexpr, RECORD: tl.constexpr, CONVERTS: tl.constexpr):  # fmt: skip
    """Write x [ROWS, D] float32 as FP8 entries at byte pointers base [ROWS]."""
    NOPE: tl.constexpr = DIM - ROPE
    d = tl.arange(0, D)
    store_codes(x, base, live, ROWS, D, NOPE, SCALE_OFFSET, RECORD, CONVERTS)
    rope = (base + NOPE).to(tl.pointer_type(tl.int16))
    tl.store(rope[:, None] + (d - NOPE)[None, :], bf16_bits(x), live[:, None] & ((d >= NOPE) & (d < DIM))[None, :])


@triton.jit
def store_codes(x, base, live, ROWS: tl.constexpr, D: tl.constexpr, NOPE: tl.constexpr, SCALE_OFFSET: tl.constexpr,
                 RECORD: tl.constexpr, CONVERTS: tl.constexpr):  # fmt: skip
    """Write columns 0 to NOPE of x [ROWS, D] float32 as FP8 codes, their scales, and the record's padding.

    CONVERTS: the GPU has an instruction that rounds to FP8 (compute capability 8.9 and newer).
    """
    GROUP: tl.constexpr = 64 if D > 64 else D
    GROUPS: tl.constexpr = D // GROUP
    d = tl.arange(0, D)
    nope = tl.reshape(tl.where((d < NOPE)[None, :], x, 0.0), (ROWS, GROUPS, GROUP))
    k = fp8_exponent(tl.max(tl.abs(nope), 2))
    # k is chosen so that no magnitude exceeds 448.
    scaled = tl.reshape(nope * power_of_two(-k)[:, :, None], (ROWS, D))
    codes = scaled.to(tl.float8e4nv).to(tl.uint8, bitcast=True) if CONVERTS else e4m3_code(scaled).to(tl.uint8)
    tl.store(base[:, None] + d[None, :], codes, live[:, None] & (d < NOPE)[None, :])
    # The scales, and zeros in the record's last bytes, of which the columns without codes write the first.
    TAIL: tl.constexpr = RECORD - SCALE_OFFSET
    g = tl.arange(0, GROUPS)
    scales = tl.where((g * GROUP < NOPE)[None, :], k + 127, 0).to(tl.uint8)
    tl.store(base[:, None] + (SCALE_OFFSET + g)[None, :], scales, live[:, None] & (g < TAIL)[None, :])
    if GROUPS < TAIL:
        pad = GROUPS + tl.arange(0, 8)
        zero = tl.zeros((ROWS, 8), tl.uint8)
        tl.store(base[:, None] + (SCALE_OFFSET + pad)[None, :], zero, live[:, None] & (pad < TAIL)[None, :])


@triton.jit
def store_keys(x, base, live, ROWS: tl.constexpr, D: tl.constexpr, LOG2_D: tl.constexpr):
    """Rotate x [ROWS, D] float32 and write it as FP4 keys at byte pointers base [ROWS]."""
    GROUP: tl.constexpr = 32 if D > 32 else D
    GROUPS: tl.constexpr = D // GROUP
    x = tl.reshape(hadamard_rows(x, ROWS, D, LOG2_D), (ROWS, GROUPS, GROUP))
    k = fp4_exponent(tl.max(tl.abs(x), 2))
    codes = e2m1_code(tl.minimum(tl.maximum(x * power_of_two(-k)[:, :, None], -6.0), 6.0))
    low, high = tl.split(tl.reshape(codes, (ROWS, D // 2, 2)))
    at = base[:, None] + tl.arange(0, D // 2)[None, :]
    tl.store(at, (low | (high << 4)).to(tl.uint8), live[:, None] & (tl.arange(0, D // 2) < D // 2)[None, :])
    g = tl.arange(0, GROUPS)
    tl.store(base[:, None] + (D // 2 + g)[None, :], (k + 127).to(tl.uint8), live[:, None] & (g < GROUPS)[None, :])


@triton.jit
def rotate_back(x, cos, sin, AT: tl.constexpr, C: tl.constexpr, NOPE: tl.constexpr, ROPE: tl.constexpr,
                 H: tl.constexpr):  # fmt: skip
    """Undo RoPE on dims AT to AT + C of x [H, C], as far as they are RoPE dims."""
    even, odd = tl.split(tl.reshape(x, (H, C // 2, 2)))
    pair = tl.arange(0, C // 2) + (AT - NOPE) // 2
    turned = (pair >= 0) & (pair < ROPE // 2)
    c = tl.load(cos + pair, turned, other=1.0)[None, :]
    s = tl.load(sin + pair, turned, other=0.0)[None, :]
    return tl.reshape(tl.join(even * c + odd * s, odd * c - even * s), (H, C))


@triton.jit
def store_output(pointer, at, x, mask):
    """Write float32 x to a BF16 or float32 output."""
    if pointer.dtype.element_ty == tl.float32:
        tl.store(pointer + at, x, mask)
    else:
        tl.store(pointer.to(tl.pointer_type(tl.int16)) + at, bf16_bits(x), mask)
