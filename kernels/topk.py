"""Exact top-k of index scores, ties to the lowest index, whatever the length.

Scores are compared as integers of the same order (float bits, negatives flipped). One program a query:

1. A lower bound of the k-th largest score: the k-th largest of the group maxima, by bisection. Those k maxima are k
   scores, so every score of the top k lies in a group whose maximum reaches the bound.
2. List those groups, in order: for scores without structure little more than k of them.
3. Bisect the k-th largest score itself over the listed groups' scores.
4. Write the indices above it, and of those equal to it the first few, in order.

Ties and clusters can make the list long, up to all groups; then steps 3 and 4 loop over it in pieces: slower, as exact.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.formats import check
from kernels.indexer import IndexScores

_LOWEST = tl.constexpr(-(2**31))


@triton.jit
def _ordered(x):
    """Integers that compare as float32 x does; -0.0 counts as 0.0."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, -2147483648 - bits, bits)


@triton.jit
def _bisect(keys, low, high, k):
    """Largest bound b in [low, high] with at least k of keys >= b, or any bound with exactly k.

    low must have at least k. Midpoints are taken so that sums cannot overflow.
    """
    found = False
    while (low < high) & (not found):
        middle = (low >> 1) + (high >> 1) + ((low | high) & 1)
        count = tl.sum((keys >= middle).to(tl.int32))
        found = count == k
        low = tl.where(count >= k, middle, low)
        high = tl.where(count >= k, high, middle - 1)
    return low


@triton.jit
def _listed_scores(scores, groups, first, listed, length, LISTED: tl.constexpr, GROUP: tl.constexpr):
    """Indices and ordered scores [LISTED * GROUP] of the listed groups from `first` on, in ascending order."""
    i = first + tl.arange(0, LISTED)
    g = tl.load(groups + i, i < listed, other=0)
    n = tl.reshape(g[:, None] * GROUP + tl.arange(0, GROUP)[None, :], (LISTED * GROUP,))
    inside = tl.reshape(tl.broadcast_to((i < listed)[:, None], (LISTED, GROUP)), (LISTED * GROUP,)) & (n < length)
    return n, tl.where(inside, _ordered(tl.load(scores + n, inside, other=0.0)), _LOWEST)


@triton.jit
def _write(n, keys, bound, ties, taken, tied, k, indices, slots, table, ENTRIES: tl.constexpr):
    """Write the picks among keys in order, after `taken` earlier ones; returns taken and tied counts so far."""
    above, equal = keys > bound, keys == bound
    tie_rank = tied + tl.cumsum(equal.to(tl.int32), 0) - 1
    picked = above | (equal & (tie_rank < ties))
    at = taken + tl.cumsum(picked.to(tl.int32), 0) - 1
    picked = picked & (at < k)
    tl.store(indices + at, n, picked)
    block = tl.load(table + n // ENTRIES, picked, other=0)
    tl.store(slots + at, block * ENTRIES + n % ENTRIES, picked)
    return taken + tl.sum(picked.to(tl.int32)), tied + tl.sum(equal.to(tl.int32))


@triton.jit
def _topk_kernel(scores, maxima, lens, block_table, groups, indices, slots, queries, k, stride_s, stride_m, stride_b,
                 ENTRIES: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr, LISTED: tl.constexpr,
                 K: tl.constexpr):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    length = tl.load(lens + t)
    scores += t * stride_s
    maxima += t * stride_m
    groups += t * stride_m
    indices += t * k
    slots += t * k
    table = block_table + (t // queries) * stride_b
    j = tl.arange(0, K)
    if length <= k:
        # Everything is picked.
        tl.store(indices + j, tl.where(j < length, j, -1), j < k)
        block = tl.load(table + j // ENTRIES, j < length, other=0)
        tl.store(slots + j, tl.where(j < length, block * ENTRIES + j % ENTRIES, -1), j < k)
    else:
        # 1. A bound from the group maxima.
        g = tl.arange(0, GROUPS)
        used = g < tl.cdiv(length, GROUP)
        best = tl.where(used, _ordered(tl.load(maxima + g, used, other=0.0)), _LOWEST)
        highest = tl.max(best, 0)
        lowest = tl.min(tl.where(used, best, highest), 0)
        bound = lowest
        if tl.cdiv(length, GROUP) > k:
            bound = _bisect(best, lowest, highest, k)
        # 2. The groups that reach it.
        reach = used & (best >= bound)
        listed = tl.sum(reach.to(tl.int32))
        if (listed <= LISTED) | (tl.cdiv(length, GROUP) > k):
            tl.store(groups + tl.cumsum(reach.to(tl.int32), 0) - 1, g, reach)
        tl.debug_barrier()
        if listed <= LISTED:
            # 3. and 4. on one piece.
            n, keys = _listed_scores(scores, groups, 0, listed, length, LISTED, GROUP)
            floor = tl.min(tl.where(keys == _LOWEST, highest, keys), 0)
            bound = _bisect(keys, floor, highest, k)
            ties = k - tl.sum((keys > bound).to(tl.int32))
            _write(n, keys, bound, ties, 0, 0, k, indices, slots, table, ENTRIES)
        else:
            low = _LOWEST + 1
            high = highest
            while low < high:
                middle = (low >> 1) + (high >> 1) + ((low | high) & 1)
                count = 0
                for first in range(0, listed, LISTED):
                    n, keys = _listed_scores(scores, groups, first, listed, length, LISTED, GROUP)
                    count += tl.sum((keys >= middle).to(tl.int32))
                low = tl.where(count >= k, middle, low)
                high = tl.where(count >= k, high, middle - 1)
            above = 0
            for first in range(0, listed, LISTED):
                n, keys = _listed_scores(scores, groups, first, listed, length, LISTED, GROUP)
                above += tl.sum((keys > low).to(tl.int32))
            taken = 0
            tied = 0
            for first in range(0, listed, LISTED):
                n, keys = _listed_scores(scores, groups, first, listed, length, LISTED, GROUP)
                taken, tied = _write(n, keys, low, k - above, taken, tied, k, indices, slots, table, ENTRIES)


def topk_entries(
    scored: IndexScores, lens: torch.Tensor, block_table: torch.Tensor, entries_per_block: int, k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pick each query's k best entries among its first lens[t].

    Shapes:  scored as index_scores returns it, T = S * Q; lens [T] int32; block_table [S, B] int32 of the pool that
             the picks will be read from. Returns indices and pool slots, both [T, k] int32, ascending by index,
             padded with -1. Scores must not be NaN.
    Raises:  ValueError: wrong dtype, shape or stride.
    Source:  oracle: reference.topk_lowest, equal to the element for equal scores.
    """
    scores, maxima = scored.scores, scored.maxima
    num_queries = scores.shape[0]
    check(lens.shape == (num_queries,) and lens.dtype is torch.int32 and lens.is_contiguous(), "lens: [T] int32")
    check(block_table.dim() == 2 and block_table.dtype is torch.int32, "block_table must be [S, B] int32")
    check(block_table.stride(1) == 1, "block_table's rows must be contiguous")
    check(scores.stride(1) == 1 and maxima.stride(1) == 1, "scores and maxima must have contiguous rows")
    check(maxima.shape == (num_queries, scores.shape[1] // scored.group), "maxima do not belong to scores")
    check(k >= 1 and num_queries % block_table.shape[0] == 0, "k must be positive and T a multiple of S")
    indices = torch.empty(num_queries, k, dtype=torch.int32, device=scores.device)
    slots = torch.empty_like(indices)
    if not num_queries:
        return indices, slots
    groups = torch.empty_like(maxima, dtype=torch.int32)
    groups_pad = triton.next_power_of_2(maxima.shape[1])
    # Twice k groups cover scores without structure; where there are fewer groups, all of them fit.
    listed = min(groups_pad, triton.next_power_of_2(2 * k))
    _topk_kernel[(num_queries,)](
        scores,
        maxima,
        lens,
        block_table,
        groups,
        indices,
        slots,
        num_queries // block_table.shape[0],
        k,
        scores.stride(0),
        maxima.stride(0),
        block_table.stride(0),
        ENTRIES=entries_per_block,
        GROUP=scored.group,
        GROUPS=groups_pad,
        LISTED=listed,
        K=triton.next_power_of_2(k),
        num_warps=16 if groups_pad >= 8192 else 8,
    )
    return indices, slots
