"""Device functions that round to the stored formats, and decode them. Bit arithmetic only, so that the interpreter
and the GPU agree to the bit: Triton's interpreter truncates where the GPU rounds to nearest even.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def power_of_two(k):
    """2.0^k as float32 for integer k in -126 .. 127."""
    return ((k + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def fp8_exponent(amax):
    """Smallest k with amax <= 448 * 2^k (448 = 1.75 * 2^8), after the released floor of 1e-4."""
    bits = tl.maximum(amax, 1e-4).to(tl.int32, bitcast=True)
    return (bits >> 23) - 135 + ((bits & 0x7FFFFF) > 0x600000).to(tl.int32)


@triton.jit
def fp4_exponent(amax):
    """Smallest k with amax <= 6 * 2^k (6 = 1.5 * 2^2), after the released floor of 6 * 2^-126."""
    bits = tl.maximum(amax, 7.052966104933725e-38).to(tl.int32, bitcast=True)
    return (bits >> 23) - 129 + ((bits & 0x7FFFFF) > 0x400000).to(tl.int32)


@triton.jit
def e4m3_code(x):
    """FP8 E4M3 codes of float32 x with |x| <= 448, to nearest even, as int32 in 0 .. 255."""
    bits = x.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    # Normal codes: round the mantissa at bit 20, then move the exponent's bias from 127 to 7.
    normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - (120 << 3)
    # Below 2^-6 codes are multiples of 2^-9: adding 2^14 leaves just that many bits, rounded by the adder.
    small = (magnitude.to(tl.float32, bitcast=True) + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    return tl.where(magnitude < 0x3C800000, small, normal) | ((bits >> 24) & 0x80)


@triton.jit
def e2m1_code(x):
    """FP4 E2M1 codes of float32 x with |x| <= 6, to nearest even, as int32 in 0 .. 15."""
    a = tl.abs(x)
    # Midpoints between levels 0 .5 1 1.5 2 3 4 6; a tie goes to the even code, so > and >= alternate.
    code = (a > 0.25).to(tl.int32) + (a >= 0.75).to(tl.int32) + (a > 1.25).to(tl.int32) + (a >= 1.75).to(tl.int32)
    code += (a > 2.5).to(tl.int32) + (a >= 3.5).to(tl.int32) + (a > 5.0).to(tl.int32)
    return code | ((x.to(tl.int32, bitcast=True) >> 28) & 8)


@triton.jit
def bf16_bits(x):
    """BF16 bits of finite float32 x, to nearest even, as int16."""
    bits = x.to(tl.int32, bitcast=True)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.int16)


@triton.jit
def hadamard_rows(x, ROWS: tl.constexpr, DIM: tl.constexpr, LOG2_DIM: tl.constexpr):
    """Walsh-Hadamard rotation of each row of x [ROWS, DIM], natural order, scaled by DIM^-1/2.

    Each step pairs neighbours and writes sums to the first half, differences to the second; after log2(DIM) such
    steps every index bit has been rotated through once, which is the natural order again.
    """
    for _ in tl.static_range(LOG2_DIM):
        a, b = tl.split(tl.reshape(x, (ROWS, DIM // 2, 2)))
        x = tl.reshape(tl.permute(tl.join(a + b, a - b), (0, 2, 1)), (ROWS, DIM))
    return x * (DIM**-0.5)
