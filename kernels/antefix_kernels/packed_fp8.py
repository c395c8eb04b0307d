"""Products with packed weights on FP8 tensor cores: inputs are FP8 codes, weights are read packed.

Rounded inputs are FP8 codes times a power of two per 128 addends, so they enter the tensor cores as they are, in half
of BF16's bytes and at twice its rate. FP4 codes become FP8 codes in registers by moving bits: an E2M1 number is the
E4M3 number of the same bits, times 2^6. A weight tile is the product's left side, tokens are its right side.

The order of a sum, which decides its bits, is the same for every number of rows and every tile:
    FP8 weights    the tensor cores add up the 128 addends that share scales, in steps of 32; then, block by block,
                   total = fma(sum, scale of the inputs * scale of the weights, total) in float32
    FP4 weights    the tensor cores add up 32 addends; four such sums make one of 128 addends, from left to right
                   part = fma(sum, scale of the weights, part); then total = fma(part, scale of the inputs, total)
    few outputs    the addends are split into runs, whose number depends on the weight alone; the runs' float32 sums
                   are added up from left to right
So a row's bits depend neither on the other rows nor on their number. The bits differ from those of packed_linear, which
multiplies in BF16. At its start a worker computes a few fixed products, and a hash of their bits is part of the names
under which the worker stores KV.

Shapes:  N = rows, K = addends, O = outputs, B = bytes of a weight's row (K, or K / 2 for FP4), G = groups, E = experts,
         R = routed rows, S = runs.
Source:  fp8_gemm and fp4_gemm of the released inference/kernel.py; oracle: torch_reference.decode_weight.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from antefix_kernels.linear import Routing
from antefix_kernels.number_formats import check
from antefix_kernels.packed_fp8_tiles import fp4_kernel, fp8_kernel
from antefix_kernels.packed_linear import INPUT_GROUP, Weight, add_parts, check_weight, num_splits
from antefix_kernels.rounding import e4m3_code, fp8_exponent

# Added to the exponents of FP4's scales, so that the least scale, 2^-127, is a normal number too; the largest is 2.
_FP4_BIAS = 64
# FP4 codes read as FP8 codes are too small by 2^6. The inputs' scales make up for both.
_FP4_FACTOR = 2.0 ** (6 - _FP4_BIAS)
_ROW_TILES_TOGETHER = 8
# From so many tiles on, a program computes all runs of its sums: two tiles per multiprocessor of an H200.
_PROGRAMS_OF_ALL_RUNS = 264


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """The numbers of outputs and rows of a tile, its warps, and how many steps of addends are loaded ahead."""

    outputs: int
    rows: int
    warps: int
    stages: int


# Tiles by the largest number of rows (for experts: on average): the fastest on an H200 at V4-Flash's products.
TILES_FP8 = (
    (16, Tile(outputs=128, rows=16, warps=8, stages=4)),
    (32, Tile(outputs=128, rows=32, warps=4, stages=4)),
    (64, Tile(outputs=128, rows=64, warps=4, stages=4)),
    (None, Tile(outputs=64, rows=128, warps=4, stages=3)),
)
TILES_FP4 = (
    (12, Tile(outputs=128, rows=16, warps=4, stages=3)),
    (24, Tile(outputs=128, rows=32, warps=4, stages=3)),
    (None, Tile(outputs=64, rows=64, warps=4, stages=3)),
)
_TILE_INTERPRETED = Tile(outputs=64, rows=64, warps=4, stages=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """Rows as FP8 codes.

    codes: [N, K] float8_e4m3fn; for FP4 weights each 32 addends with the even ones before the odd ones.
    scales: [N, K / 128] float32, powers of two; for FP4 weights times _FP4_FACTOR.
    """

    codes: torch.Tensor
    scales: torch.Tensor

    def view(self, num_rows: int, num_groups: int) -> Inputs:
        """[N, K] as [N / G, G, K]."""
        codes = self.codes.view(num_rows, num_groups, self.codes.shape[-1])
        return Inputs(codes=codes, scales=self.scales.view(num_rows, num_groups, self.scales.shape[-1]))


@triton.jit
def _prepare_kernel(x, codes, scales, num_addends, stride_n, factor, HALVES: tl.constexpr, GROUPS: tl.constexpr,
                    GROUP: tl.constexpr):  # fmt: skip
    """GROUPS groups of one row."""
    row = tl.program_id(0).to(tl.int64)
    g = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    k = g[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    live = k < num_addends
    v = tl.load(x + row * stride_n + k, live, other=0.0).to(tl.float32)
    exponent = fp8_exponent(tl.max(tl.abs(v), 1))
    # Exact: the scale is a power of two. By its choice no magnitude exceeds 448.
    y = v * ((127 - exponent) << 23).to(tl.float32, bitcast=True)[:, None]
    target = k
    if HALVES:
        target = k // 32 * 32 + k % 2 * 16 + k % 32 // 2
        # NaN and infinity become NaN, as on a CPU: 127 is E4M3's NaN.
    code = tl.where(tl.abs(v) < float("inf"), e4m3_code(y), 127)
    tl.store(codes + row * num_addends + target, code.to(tl.uint8), live)
    scale = ((127 + exponent) << 23).to(tl.float32, bitcast=True)
    tl.store(scales + row * (num_addends // GROUP) + g, scale * factor, g < num_addends // GROUP)


def takes(weight: Weight) -> bool:
    """Whether these kernels can multiply with this weight; if they cannot, packed_linear is used."""
    return weight.num_addends % INPUT_GROUP == 0 and (weight.is_fp4 or weight.block[1] == INPUT_GROUP)


def runs_on(x: torch.Tensor) -> bool:
    """Whether these kernels run on x's device: only on Hopper, whose instructions decide the bits of the sums."""
    return x.is_cuda and torch.cuda.get_device_capability(x.device) == (9, 0)


def prepare_inputs(x: torch.Tensor, *, is_fp4: bool) -> Inputs:
    """Rows rounded to FP8.

    Shapes:  x [N, K] float32 or bfloat16, last dim contiguous, K a multiple of 128.
    Raises:  ValueError: wrong dtype, shape or stride.
    """
    check(x.dim() == 2 and x.stride(1) == 1, "rows must be [N, K] with a contiguous last dim")
    check(x.dtype in (torch.bfloat16, torch.float32), f"need float32 or bfloat16, got {x.dtype}")
    num_rows, num_addends = x.shape
    check(num_addends % INPUT_GROUP == 0, f"{num_addends} addends are no multiple of {INPUT_GROUP}")
    num_groups = num_addends // INPUT_GROUP
    codes = torch.empty(num_rows, num_addends, dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty(num_rows, num_groups, dtype=torch.float32, device=x.device)
    if codes.numel():
        together = min(8, triton.next_power_of_2(num_groups))
        _prepare_kernel[(num_rows, triton.cdiv(num_groups, together))](
            x, codes.view(torch.uint8), scales, num_addends, x.stride(0), _FP4_FACTOR if is_fp4 else 1.0, HALVES=is_fp4,
            GROUPS=together, GROUP=INPUT_GROUP, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return Inputs(codes=codes, scales=scales)


def multiply(
    inputs: Inputs, weight: Weight, dtype: torch.dtype, *, tile: Tile | None = None, splits: int | None = None
) -> torch.Tensor:
    """Rows times a packed weight; or, group by group, times the weights of G groups.

    splits: into how many runs the addends are split, which decides the bits; None: `num_splits` of the weight.

    Shapes:  inputs [N, G, K], weight of G. Returns [N, G, O] of dtype.
    Raises:  ValueError: wrong dtype, shape or stride.
    """
    num_rows, num_groups = inputs.codes.shape[:2]
    check(num_groups == len(weight.codes), "inputs and weights have other numbers of groups")
    num_outputs = weight.codes.shape[1]
    tile = tile or tile_of(weight, num_rows, inputs.codes.device)
    splits = splits or num_splits(weight)
    out = torch.empty(num_rows, num_groups, num_outputs, dtype=dtype, device=inputs.codes.device)
    row_tiles = triton.cdiv(num_rows, tile.rows)
    num_programs = row_tiles * num_groups * triton.cdiv(num_outputs, tile.outputs)
    takes_all = takes_all_runs(weight, splits, num_programs)
    apart = splits > 1 and not takes_all
    parts = torch.empty(splits, *out.shape, dtype=torch.float32, device=out.device) if apart else out
    _launch(inputs, weight, parts, None, tile=tile, splits=splits, row_tiles=row_tiles, takes_all=takes_all)
    if apart:
        add_parts(parts, out)
    return out


def takes_all_runs(weight: Weight, splits: int, num_programs: int) -> bool:
    """Whether a program computes all runs of its sums and adds them up itself. The bits are the same. Adding all runs
    in one program saves writing and reading the runs' sums, and needs no more programs than there are tiles.
    """
    has_equal_runs = weight.num_addends // INPUT_GROUP % splits == 0
    return not weight.is_fp4 and splits > 1 and has_equal_runs and num_programs >= _PROGRAMS_OF_ALL_RUNS


def multiply_routed(
    inputs: Inputs,
    weight: Weight,
    routing: Routing,
    dtype: torch.dtype,
    *,
    gathered: bool,
    tile: Tile | None = None,
    gate_limit: float | None = None,
) -> torch.Tensor:
    """Each row times its expert's weight; rows and results in the routing's order.

    Shapes:  inputs [R, K] sorted, or with `gathered` the tokens' rows [N, K]; weight of E experts. Returns [R, O] of
             dtype; with `gate_limit` [R, O / 2]: the outputs are gates, then ups, and `tokens.swiglu` of both is
             returned.
    Raises:  ValueError: wrong dtype, shape or stride.
    """
    num_rows, device = len(routing.order), inputs.codes.device
    tile = tile or tile_of(weight, num_rows // len(weight.codes), device)
    num_outputs = weight.codes.shape[1] // (1 if gate_limit is None else 2)
    out = torch.empty(num_rows, num_outputs, dtype=dtype, device=device)
    rows = inputs.view(len(inputs.codes), 1)
    _launch(
        rows, weight, out.unsqueeze(1), routing, tile=tile, splits=1, row_tiles=len(routing.experts), gathered=gathered,
        gate_limit=gate_limit,
    )  # fmt: skip
    return out


def routed_tile(weight: Weight, num_rows: int, device: torch.device) -> int:
    """How many rows a tile has for `num_rows` picks, for `linear.route`."""
    return tile_of(weight, num_rows // len(weight.codes), device).rows


def tile_of(weight: Weight, num_rows: int, device: torch.device) -> Tile:
    """The tile for `num_rows` rows; for experts: rows of an expert on average."""
    if device.type != "cuda":
        return _TILE_INTERPRETED
    tiles = TILES_FP4 if weight.is_fp4 else TILES_FP8
    return next(tile for most, tile in tiles if most is None or num_rows <= most)


def _launch(
    inputs: Inputs,
    weight: Weight,
    out: torch.Tensor,
    routing: Routing | None,
    *,
    tile: Tile,
    splits: int,
    row_tiles: int,
    gathered: bool = False,
    gate_limit: float | None = None,
    takes_all: bool = False,
) -> None:
    """inputs [N, G, K], weight of G or E, out [N, G, O], or [S, N, G, O] of parts."""
    _check_operands(inputs, weight)
    if not out.numel():
        return
    num_weights, num_outputs, _ = weight.codes.shape
    is_gated = gate_limit is not None
    num_outputs //= 2 if is_gated else 1
    on_card = inputs.codes.device.type == "cuda"
    columns = tile.outputs // (2 if is_gated else 1)
    kernel, codes, scales, choices = operands_of(weight, splits=splits, columns=columns, on_card=on_card)
    if not weight.is_fp4:
        choices["ALL_RUNS"] = takes_all
    codes_per_word = 4 if weight.is_fp4 else 1
    steps = triton.cdiv(weight.num_addends // INPUT_GROUP, splits) // (2 if choices.get("WIDE") else 1)
    empty = inputs.codes if routing is None else routing.order
    kernel[(row_tiles * triton.cdiv(num_outputs, columns), 1 if routing else num_weights, 1 if takes_all else splits)](
        # The interpreter reads FP8 as bytes.
        inputs.codes if on_card else inputs.codes.view(torch.uint8),
        inputs.scales,
        codes,
        scales,
        out,
        empty if routing is None else routing.experts,
        empty if routing is None else routing.firsts,
        empty if routing is None else routing.stops,
        empty,
        out.shape[-3],
        num_outputs,
        weight.num_addends,
        num_weights,
        0.0 if gate_limit is None else gate_limit,
        inputs.codes.stride(0),
        inputs.codes.stride(1),
        inputs.scales.stride(0),
        inputs.scales.stride(1),
        weight.codes.stride(0) // codes_per_word,
        weight.codes.stride(1) // codes_per_word,
        scales.stride(0),
        scales.stride(1),
        out.stride(-3),
        out.stride(-2),
        out.stride(0) if out.dim() == 4 else 0,
        steps,
        ROUTED=routing is not None,
        GATHERED=gathered,
        PICKED=routing.num_picked if routing else 1,
        GATED=is_gated,
        # On a CPU this is the interpreter, whose dot takes codes for integers.
        EXACT=not on_card,
        N=tile.outputs,
        M=tile.rows,
        TOGETHER=_ROW_TILES_TOGETHER,
        STAGES=tile.stages,
        num_warps=tile.warps,
        enable_fp_fusion=False,
        **choices,
    )


def operands_of(
    weight: Weight, *, splits: int, columns: int, on_card: bool
) -> tuple[Any, torch.Tensor | TensorDescriptor, torch.Tensor, dict[str, Any]]:
    """The kernel for a weight, the weight's codes and scales as that kernel reads them, and its other arguments."""
    blocks = weight.num_addends // INPUT_GROUP
    if not weight.is_fp4:
        is_power = weight.scales.dtype is torch.float8_e8m0fnu
        scales = weight.scales.view(torch.uint8) if is_power else weight.scales
        codes = weight.codes if on_card else weight.codes.view(torch.uint8)
        return fp8_kernel, codes, scales, {"POWERS": is_power, "BLOCK_O": weight.block[0]}
    is_wide = blocks % (2 * splits) == 0
    scales = weight.scales.view(torch.int64 if is_wide else torch.int32)
    words: torch.Tensor | TensorDescriptor = weight.codes.view(torch.int32)
    if on_card:
        words = TensorDescriptor.from_tensor(weight.codes.view(torch.int32), [1, columns, 32 if is_wide else 16])
    return fp4_kernel, words, scales, {"WIDE": is_wide, "ASM": on_card, "BULK": on_card}


def _check_operands(inputs: Inputs, weight: Weight) -> None:
    check_weight(weight)
    check(takes(weight), f"{weight.num_addends} addends in blocks of {weight.block} are not for these kernels")
    num_rows, num_groups, num_addends = inputs.codes.shape
    check(num_addends == weight.num_addends, f"inputs have {num_addends} addends, weights {weight.num_addends}")
    check(inputs.codes.dtype is torch.float8_e4m3fn and inputs.codes.stride(2) == 1, "inputs must be FP8 codes")
    check(tuple(inputs.scales.shape) == (num_rows, num_groups, num_addends // INPUT_GROUP), "inputs' scales do not fit")
    check(inputs.scales.dtype is torch.float32 and inputs.scales.stride(2) == 1, "inputs' scales must be float32")
