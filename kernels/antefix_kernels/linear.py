"""Matrix products whose rows do not depend on one another: the same tile and the same order of sums for any row count.

Libraries choose a product's algorithm by its shape, so a token's numbers would depend on how many tokens are computed
next to it. In this module a tile's shape depends on the weight alone, a sum runs over K in steps of fixed size, and is
never split. Three products share one kernel: plain, block-diagonal (groups side by side), and routed (rows to experts).

Shapes:  N = rows, K = addends, O = outputs, G = groups, E = experts, R = routed rows (a row for each token and pick).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from antefix_kernels import expert_routing, few_rows
from antefix_kernels.finish import store_output
from antefix_kernels.number_formats import check

_FLOATS = (torch.bfloat16, torch.float32)
# Rows, outputs, addends, warps and stages of a tile. Experts' tiles have fewer rows, because a chunk gives each expert
# few. Routed tiles have the same number of rows in float32, or `route` would cut them wrongly.
_TILE_WIDE = (128, 256, 64, 8, 3)
_TILE_NARROW = (128, 128, 64, 8, 3)
_TILE_ROUTED = (64, 256, 64, 8, 3)
# Float32 models are small; their products are exact and use no tensor cores.
_TILE_FLOAT32 = (64, 64, 32, 4, 2)
# From this many outputs on, the wide tile is used.
_OUTPUTS_WIDE = 2048
# For so few rows and outputs at most, whose time is that of reading weights, what measured best on an H200. A sum runs
# over the same addends in the same instructions as in the tiles above, so its bits are the same: compared by
# benchmarks/decode_on_card.py, and by the probe of a worker's arithmetic at every start.
_TILES_FEW = (
    (32, 4224, (64, 32, 128, 4, 5)), (32, 8192, (64, 64, 128, 4, 4)), (32, 1 << 30, (64, 128, 64, 4, 5)),
    (64, 2048, (64, 32, 128, 4, 5)), (64, 8192, (64, 64, 128, 4, 4)), (128, 8192, (128, 32, 128, 4, 4)),
)  # fmt: skip
# The tile for few rows that are routed to experts.
_TILE_PICKS = (64, 128, 64, 4, 4)
_PICKS = range(64, 1025)
# Where at least half of the tiles' rows are missing, these are not read. Missing rows that repeat the last row make all
# threads read the same address: on an H200 the products of a step of one sequence took 2,146 us so, and now take 1,400.
SKIPS_MISSING_ROWS = True
# Whether products of few rows have the kernel of their own (`few_rows`); a benchmark compares it with the one below.
FEW_ROWS = True
# How many tiles of rows run side by side, so that they read weights from the cache.
_ROW_TILES_TOGETHER = 8


@dataclass(frozen=True, slots=True)
class Routing:
    """Which rows go to which expert, sorted by expert. The routing is computed on the GPU; the host never waits for
    it.

    order: [R] int64, the (token, pick) pair of each sorted row.  place: [R] int64, its inverse.
    experts, firsts, stops: [tiles] int32, each tile's expert (E for none) and its range of sorted rows.
    """

    order: torch.Tensor
    place: torch.Tensor
    experts: torch.Tensor
    firsts: torch.Tensor
    stops: torch.Tensor
    num_picked: int


@triton.jit
def place_of_program(columns, TOGETHER: tl.constexpr):
    """The tile of rows and the column of outputs, both int32, that this program of a product computes.

    TOGETHER tiles of rows compute one column before they go to the next, so that each column of a weight is read from
    memory once for all of them.
    """
    row_tiles = tl.num_programs(0) // columns
    span = TOGETHER * columns
    first_tile = tl.program_id(0) // span * TOGETHER
    together = tl.minimum(row_tiles - first_tile, TOGETHER)
    tile = first_tile + tl.program_id(0) % span % together
    column = tl.program_id(0) % span // together
    return tile, column


@triton.jit(do_not_specialize=["num_rows"])
def _product_kernel(x, weights, out, experts, firsts, stops, sources, num_rows, num_outputs, num_addends, num_experts,
                    stride_xn, stride_xg, stride_wg, stride_wo, stride_on, stride_og, ROUTED: tl.constexpr,
                    GATHERED: tl.constexpr, PICKED: tl.constexpr, EVEN: tl.constexpr, EXACT: tl.constexpr,
                    WIDEN: tl.constexpr, SKIPS: tl.constexpr,
                    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, TOGETHER: tl.constexpr,
                    STAGES: tl.constexpr):  # fmt: skip
    """One tile [M, N] of x times weights transposed, of one group or expert."""
    tile, column = place_of_program(tl.cdiv(num_outputs, N), TOGETHER)
    if ROUTED:
        group = tl.load(experts + tile)
        first = tl.load(firsts + tile)
        stop = tl.load(stops + tile)
    else:
        group = tl.program_id(1)
        first = tile * M
        stop = num_rows
    if group < num_experts:
        rows = tl.minimum(first + tl.arange(0, M), stop - 1)
        source = rows
        if GATHERED:
            source = (tl.load(sources + rows) // PICKED).to(tl.int32)
        o = column * N + tl.arange(0, N)
        k = tl.arange(0, K)
        # Rows and outputs past the end repeat the last one and are not stored; with SKIPS such rows are zeros.
        has_row = (first + tl.arange(0, M) < stop)[:, None]
        at_x = x + source.to(tl.int64)[:, None] * stride_xn + (0 if ROUTED else group * stride_xg) + k[None, :]
        outputs = tl.minimum(o, num_outputs - 1)
        at_w = weights + group.to(tl.int64) * stride_wg + outputs.to(tl.int64)[None, :] * stride_wo + k[:, None]
        acc = tl.zeros((M, N), tl.float32)
        for step in tl.range(0, tl.cdiv(num_addends, K), num_stages=STAGES):
            left = num_addends - step * K
            if SKIPS:
                a = tl.load(at_x, has_row & (k < left)[None, :], other=0.0)
            elif EVEN:
                a = tl.load(at_x)
            else:
                a = tl.load(at_x, (k < left)[None, :], other=0.0)
            if EVEN:
                b = tl.load(at_w)
            else:
                b = tl.load(at_w, (k < left)[:, None], other=0.0)
            if WIDEN:
                a, b = a.to(tl.float32), b.to(tl.float32)
            if EXACT:
                acc = tl.dot(a, b, acc, input_precision="ieee")
            else:
                acc = tl.dot(a, b, acc)
            at_x += K
            at_w += K
        live = (first + tl.arange(0, M) < stop)[:, None] & (o < num_outputs)[None, :]
        at = (first + tl.arange(0, M)).to(tl.int64)[:, None] * stride_on + (0 if ROUTED else group * stride_og)
        store_output(out, at + o[None, :], acc, live)


def multiply(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x times weight transposed.

    Shapes:  x [N, K], weight [O, K], both float32 or both bfloat16, last dim contiguous. Returns [N, O] of their type.
    Raises:  ValueError: wrong dtype, shape or stride.
    """
    out = torch.empty(x.shape[0], weight.shape[0], dtype=x.dtype, device=x.device)
    _launch(x.unsqueeze(1), weight.unsqueeze(0), out.unsqueeze(1), None, gathered=False)
    return out


def multiply_groups(x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Block-diagonal product: each group's inputs times its own weight.

    Shapes:  x [N, G, K], weights [G, O, K]; as multiply. Returns [N, G, O].
    Raises:  ValueError: wrong dtype, shape or stride.
    """
    out = torch.empty(x.shape[0], x.shape[1], weights.shape[1], dtype=x.dtype, device=x.device)
    _launch(x, weights, out, None, gathered=False)
    return out


def route(experts: torch.Tensor, num_experts: int, *, tile: int = _TILE_ROUTED[0]) -> Routing:
    """Sort picks by expert and cut each expert's rows into tiles.

    Shapes:  experts [N, P] int64 in [0, num_experts).  tile: how many rows the tiles of the following product have.
    """
    rows, device = experts.numel(), experts.device
    flat = experts.flatten().contiguous()
    if expert_routing.ENABLED and rows <= expert_routing.FEW_PICKS:
        num_tiles = min(rows, rows // tile + num_experts)
        return Routing(*expert_routing.sort_picks(flat, num_experts, num_tiles, tile), num_picked=experts.shape[1])
    order = flat.argsort(stable=True)
    counts = torch.zeros(num_experts, dtype=torch.int64, device=device).scatter_add_(0, flat, torch.ones_like(flat))
    ends = counts.cumsum(0)
    tile_ends = ((counts + tile - 1) // tile).cumsum(0)
    # The largest possible number of tiles, because only the GPU knows the actual number.
    number = torch.arange(min(rows, rows // tile + num_experts), device=device)
    owner = torch.searchsorted(tile_ends, number, right=True)
    held = owner.clamp(max=num_experts - 1)
    tiles_before = torch.where(held > 0, tile_ends[(held - 1).clamp(min=0)], 0)
    firsts = ends[held] - counts[held] + (number - tiles_before) * tile
    return Routing(
        order=order,
        place=torch.empty_like(order).scatter_(0, order, torch.arange(rows, device=device)),
        experts=owner.int(),
        firsts=firsts.int(),
        stops=torch.minimum(firsts + tile, ends[held]).int(),
        num_picked=experts.shape[1],
    )


def multiply_routed(x: torch.Tensor, weights: torch.Tensor, routing: Routing, *, gathered: bool) -> torch.Tensor:
    """Each row times its expert's weight; rows and results in the routing's order.

    Shapes:  x [R, K] sorted, or with `gathered` the tokens' rows [N, K]; weights [E, O, K]. Returns [R, O].
    Raises:  ValueError: wrong dtype, shape or stride.
    """
    out = torch.empty(len(routing.order), weights.shape[1], dtype=x.dtype, device=x.device)
    _launch(x.unsqueeze(1), weights, out.unsqueeze(1), routing, gathered=gathered)
    return out


def _launch(
    x: torch.Tensor, weights: torch.Tensor, out: torch.Tensor, routing: Routing | None, *, gathered: bool
) -> None:
    """x [N, G, K], weights [G or E, O, K], out [N, G, O]."""
    check(x.dtype in _FLOATS and x.dtype == weights.dtype, f"need float32 or bfloat16, got {x.dtype}, {weights.dtype}")
    check(x.stride(2) == 1 and weights.stride(2) == 1, "the last dims must be contiguous")
    check(x.shape[2] == weights.shape[2], f"inputs have {x.shape[2]} addends, weights {weights.shape[2]}")
    check(routing is not None or x.shape[1] == weights.shape[0], "inputs and weights have other numbers of groups")
    num_groups, num_outputs, num_addends = weights.shape
    if not out.shape[0]:
        return
    num_tokens = out.shape[0] if routing is None else len(routing.order) // routing.num_picked
    if FEW_ROWS and num_tokens <= few_rows.ROWS_MAX and x.dtype is torch.bfloat16:
        few_rows.launch(x, weights, out, routing, gathered=gathered)
        return
    all_outputs = num_outputs * (1 if routing is not None else num_groups)
    m, n, k, warps, stages = _tile(x.dtype, out.shape[0], num_outputs, all_outputs, is_routed=routing is not None)
    row_tiles = triton.cdiv(out.shape[0], m) if routing is None else len(routing.experts)
    empty = x if routing is None else routing.order
    _product_kernel[(row_tiles * triton.cdiv(num_outputs, n), 1 if routing else num_groups)](
        x,
        weights,
        out,
        empty if routing is None else routing.experts,
        empty if routing is None else routing.firsts,
        empty if routing is None else routing.stops,
        empty,
        out.shape[0],
        num_outputs,
        num_addends,
        num_groups,
        x.stride(0),
        x.stride(1),
        weights.stride(0),
        weights.stride(1),
        out.stride(0),
        out.stride(1),
        ROUTED=routing is not None,
        GATHERED=gathered,
        PICKED=routing.num_picked if routing else 1,
        EVEN=num_addends % k == 0,
        EXACT=x.dtype is torch.float32,
        # On a CPU this is the interpreter, whose dot takes BF16's bits for integers.
        WIDEN=x.device.type == "cpu" and x.dtype is torch.bfloat16,
        SKIPS=SKIPS_MISSING_ROWS and 2 * out.shape[0] <= row_tiles * m,
        M=m,
        N=n,
        K=k,
        TOGETHER=_ROW_TILES_TOGETHER,
        STAGES=stages,
        num_warps=warps,
        enable_fp_fusion=False,
    )


def _tile(
    dtype: torch.dtype, num_rows: int, num_outputs: int, all_outputs: int, *, is_routed: bool
) -> tuple[int, int, int, int, int]:
    """Rows, outputs, addends, warps, stages. All tiles of one type add in the same order.

    num_outputs: of a group.  all_outputs: of all groups.
    """
    if dtype is torch.float32:
        return _TILE_FLOAT32
    if is_routed:
        return _TILE_PICKS if num_rows in _PICKS else _TILE_ROUTED
    for rows_max, outputs_max, tile in _TILES_FEW:
        if num_rows <= rows_max and all_outputs <= outputs_max:
            return tile
    return _TILE_WIDE if num_outputs >= _OUTPUTS_WIDE else _TILE_NARROW
