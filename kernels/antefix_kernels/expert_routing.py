"""Picks each token's experts, and sorts few picks by expert: one launch each, where torch takes some thirty.

Shapes:  N = tokens, E = experts, P = picked experts per token, R = N * P picks, V = vocabulary.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice

from antefix_kernels import chained
from antefix_kernels.chained import follow
from antefix_kernels.number_formats import check

# Whether the model uses these kernels. If not, it uses torch's operations, with which a benchmark compares them.
ENABLED = True
# Most picks that one program sorts: those of a decode step.
FEW_PICKS = 2048
# How many picks are counted at once.
_TOGETHER = 16


@triton.jit
def _pick_kernel(scores, bias, tokens, table, experts, weights, num_experts, scaling, P: tl.constexpr,
                 E: tl.constexpr, HASHED: tl.constexpr, LOGITS: tl.constexpr, PRECISE: tl.constexpr,
                 CHAINED: tl.constexpr = 0):  # fmt: skip
    """One token's experts in ascending order, and their weights: by score plus bias, or from the table.

    LOGITS: `scores` holds logits, whose scores are the roots of their softplus. PRECISE: with CUDA's own functions, as
    torch computes them.
    """
    follow(CHAINED)
    n = tl.program_id(0).to(tl.int64)
    e = tl.arange(0, E)
    inside = e < num_experts
    score = tl.load(scores + n * num_experts + e, inside, other=0.0).to(tl.float32)
    if LOGITS:
        if PRECISE:
            soft = tl.where(score > 20.0, score, libdevice.log1p(libdevice.exp(score)))
        else:
            power = tl.exp(tl.minimum(score, 20.0))
            rounded = 1.0 + power
            # Kahan's log(1 + x), which is right for small x too.
            least = rounded == 1.0
            log = tl.where(least, power, tl.log(rounded) * (power / tl.where(least, 1.0, rounded - 1.0)))
            soft = tl.where(score > 20.0, score, log)
        score = tl.sqrt_rn(soft)
    picked = e < 0
    if HASHED:
        token = tl.load(tokens + n)
        for p in tl.static_range(P):
            picked = picked | (e == tl.load(table + token * P + p))
    else:
        ranked = tl.where(inside, score + tl.load(bias + e, inside, other=0.0), float("-inf"))
        for _ in tl.static_range(P):
            best = tl.max(tl.where(picked, float("-inf"), ranked), 0)
            # Of equal scores the lowest id wins.
            first = tl.min(tl.where((ranked == best) & inside & (picked == 0), e, E), 0)
            picked = picked | (e == first)
    rank = tl.cumsum(picked.to(tl.int32), 0) - 1
    total = 0.0
    for p in tl.static_range(P):
        total += tl.sum(tl.where(picked & (rank == p), score, 0.0), 0)
    at = n * P + rank
    tl.store(experts + at, e.to(tl.int64), picked)
    # 1e-20 as in the reference. It matters only if all scores are zero.
    tl.store(weights + at, score / (total + 1e-20) * scaling, picked)


@triton.jit(do_not_specialize=["num_picks", "num_tiles"])
def _route_kernel(picks, order, place, experts, firsts, stops, num_picks, num_tiles, num_experts, TILE: tl.constexpr,
                  E: tl.constexpr, ROWS: tl.constexpr, TILES: tl.constexpr, CHAINED: tl.constexpr = 0):  # fmt: skip
    """Sort picks by expert (of one expert, in their order), and cut each expert's rows into tiles."""
    follow(CHAINED)
    e = tl.arange(0, E)
    counts = tl.zeros((E,), tl.int32)
    for start in range(0, num_picks, ROWS):
        r = start + tl.arange(0, ROWS)
        pick = tl.load(picks + r, r < num_picks, other=-1)
        counts += tl.sum((pick[:, None] == e[None, :]).to(tl.int32), 0)
    begins = tl.cumsum(counts, 0) - counts
    next_row = begins
    for start in range(0, num_picks, ROWS):
        r = start + tl.arange(0, ROWS)
        pick = tl.load(picks + r, r < num_picks, other=-1)
        same = (pick[:, None] == e[None, :]).to(tl.int32)
        before = tl.cumsum(same, 0) - same
        row = tl.sum(same * (before + next_row[None, :]), 1).to(tl.int64)
        tl.store(place + r, row, r < num_picks)
        tl.store(order + row, r.to(tl.int64), r < num_picks)
        next_row += tl.sum(same, 0)
    tiles = (counts + TILE - 1) // TILE
    tile_begins = tl.cumsum(tiles, 0) - tiles
    used = tl.sum(tiles, 0)
    for number in range(tl.max(tiles, 0)):
        has = number < tiles
        at = tile_begins + number
        first = begins + number * TILE
        tl.store(experts + at, e, has)
        tl.store(firsts + at, first, has)
        tl.store(stops + at, tl.minimum(first + TILE, begins + counts), has)
    for start in range(0, num_tiles, TILES):
        t = start + tl.arange(0, TILES)
        rest = (t >= used) & (t < num_tiles)
        # The remaining possible tiles belong to no expert.
        tl.store(experts + t, num_experts + tl.zeros((TILES,), tl.int32), rest)
        tl.store(firsts + t, tl.zeros((TILES,), tl.int32), rest)
        tl.store(stops + t, tl.zeros((TILES,), tl.int32), rest)


def pick_experts(
    scores: torch.Tensor,
    num_picked: int,
    scaling: float,
    *,
    bias: torch.Tensor | None = None,
    tokens: torch.Tensor | None = None,
    table: torch.Tensor | None = None,
    are_logits: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each token's experts in ascending order and their weights, which add up to `scaling`.

    are_logits: `scores` are logits, and a score is the root of a logit's softplus.

    Shapes:  scores [N, E] float32 (logits: or bfloat16); bias [E] float32, or tokens [N] and table [V, P] int64, of P
             different experts each; all contiguous. Returns experts [N, P] int64 and weights [N, P] float32.
             The experts with the largest score plus bias are picked; of equal ones the lowest id. Scores have no NaN.
    Raises:  ValueError: wrong dtype, shape or stride.
    Source:  V4 report, section 2.1; oracle: antefix.model.moe.ExpertRouter.
    """
    num_tokens, num_experts = scores.shape
    may_be_half = are_logits and scores.dtype is torch.bfloat16
    check((scores.dtype is torch.float32 or may_be_half) and scores.is_contiguous(), "scores: contiguous float32")
    check(
        (bias is None) != (tokens is None) and (tokens is None) == (table is None), "either bias, or tokens and table"
    )
    check(0 < num_picked <= num_experts, f"{num_picked} of {num_experts} experts cannot be picked")
    if bias is not None:
        check(
            bias.shape == (num_experts,) and bias.dtype is torch.float32 and bias.is_contiguous(), "bias: [E] float32"
        )
    if tokens is not None and table is not None:
        check(tokens.shape == (num_tokens,) and tokens.dtype is torch.int64, "tokens must be [N] int64")
        check(table.shape[1] == num_picked and table.dtype is torch.int64, "table must be [V, P] int64")
        check(tokens.is_contiguous() and table.is_contiguous(), "tokens and table must be contiguous")
    experts = torch.empty(num_tokens, num_picked, dtype=torch.int64, device=scores.device)
    weights = torch.empty(num_tokens, num_picked, dtype=torch.float32, device=scores.device)
    if num_tokens:
        _pick_kernel[(num_tokens,)](
            scores,
            scores if bias is None else bias,
            experts if tokens is None else tokens,
            experts if table is None else table,
            experts,
            weights,
            num_experts,
            scaling,
            P=num_picked,
            E=triton.next_power_of_2(num_experts),
            HASHED=tokens is not None,
            LOGITS=are_logits,
            PRECISE=scores.is_cuda,
            num_warps=1 if num_experts <= 256 else 4,
            enable_fp_fusion=False,
            **chained.options(scores),
        )
    return experts, weights


def sort_picks(
    picks: torch.Tensor, num_experts: int, num_tiles: int, tile: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The order, place, experts, firsts and stops of a `linear.Routing`, for picks [R] int64, R at most FEW_PICKS.

    num_tiles: the largest number of tiles that these picks can need.
    """
    check(picks.dtype is torch.int64 and picks.is_contiguous(), "picks must be contiguous int64")
    order, place = torch.empty_like(picks), torch.empty_like(picks)
    tiles = [torch.empty(num_tiles, dtype=torch.int32, device=picks.device) for _ in range(3)]
    if len(picks):
        _route_kernel[(1,)](
            picks,
            order,
            place,
            *tiles,
            len(picks),
            num_tiles,
            num_experts,
            TILE=tile,
            E=triton.next_power_of_2(num_experts),
            ROWS=_TOGETHER,
            TILES=256,
            num_warps=4,
            enable_fp_fusion=False,
            **chained.options(picks),
        )
    return order, place, tiles[0], tiles[1], tiles[2]
