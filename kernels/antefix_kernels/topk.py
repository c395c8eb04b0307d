"""Exact top-k of index scores, ties to the lowest index, whatever the length.

One program per query:

1. Find the k-th largest of the group maxima by bisection. The k groups that reach it (of ties the first ones) hold the
   top k: their maxima are k scores that no score outside exceeds, and equal scores outside have higher indices.
2. List those groups, in order.
3. Find the k-th largest score among the listed groups' scores by bisection, starting at the bound of step 1.
4. Write the indices above it, and of those equal to it the first few, in order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from antefix_kernels import chained
from antefix_kernels.chained import follow
from antefix_kernels.index_scores import IndexScores
from antefix_kernels.number_formats import check

# With fewer queries than this, multiprocessors stay idle; each query's program then uses more threads.
_FEW_QUERIES = 132
# In its first rounds the search halves the range of values, later the number of floats in the range.
_VALUE_ROUNDS = tl.constexpr(16)


@triton.jit
def _ordered(x):
    """Integers that compare as float32 x does; -0.0 counts as 0.0."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, -2147483648 - bits, bits)


@triton.jit
def _value(i):
    """The float32 that _ordered makes i of."""
    return tl.where(i < 0, -2147483648 - i, i).to(tl.float32, bitcast=True)


@triton.jit
def _bisect(keys, low, high, k):
    """A bound that exactly k of the keys reach; if ties make this impossible, the k-th largest key itself.

    At least k keys must reach `low`, and none may exceed `high`. The first rounds halve the range of values, which
    suits scores of one magnitude. Later rounds halve the number of floats in the range, which ends for any scores.
    """
    low, high = _ordered(low), _ordered(high)
    found = False
    rounds = 0
    while (low < high) & (not found):
        middle = _ordered(_value(low) * 0.5 + _value(high) * 0.5)
        middle = tl.minimum(tl.maximum(middle, low + 1), high)
        middle = tl.where(rounds < _VALUE_ROUNDS, middle, (low >> 1) + (high >> 1) + ((low | high) & 1))
        count = tl.sum((keys >= _value(middle)).to(tl.int32))
        found = count == k
        low = tl.where(count >= k, middle, low)
        high = tl.where(count >= k, high, middle - 1)
        rounds += 1
    return _value(low)


@triton.jit
def _ranks(picked, N: tl.constexpr):
    """How many of picked [N] come before each of them, and how many there are.

    Counts of eight neighbours lie in the nibbles of a word, those of four eights in its bytes: a product with ones sums
    what precedes. Only every 32nd count is left for a scan, because scans of all counts made half of the kernel's
    instructions.
    """
    ones = picked.to(tl.int32)
    if N % 32 == 0:
        j = 4 * tl.arange(0, 8)[None, None, :]
        r = 8 * tl.arange(0, 4)[None, :]
        eights = tl.reshape(ones, (N // 32, 4, 8))
        within = tl.sum(eights << j, 2) * 0x11111111
        counts = (within >> 28) & 15
        to_here = tl.sum(counts << r, 1) * 0x01010101
        count = (to_here >> 24) & 0xFF
        before = (tl.cumsum(count, 0) - count)[:, None] + ((to_here[:, None] >> r) & 0xFF) - counts
        rank = before[:, :, None] + ((within[:, :, None] >> j) & 15) - eights
        return tl.reshape(rank, (N,)), tl.sum(count)
    else:  # noqa: RET505 - Triton compiles one branch only where they are branches
        return tl.cumsum(ones, 0) - ones, tl.sum(ones)


@triton.jit
def _first_k(keys, bound, k, N: tl.constexpr):
    """Which k of keys are picked: those above bound, then those equal to it, lowest first; and their places."""
    picked = keys >= bound
    place, count = _ranks(picked, N)
    if count > k:
        above = keys > bound
        equal = keys == bound
        rank, ties = _ranks(equal, N)
        picked = above | (equal & (rank < k - (count - ties)))
        place, count = _ranks(picked, N)
    return picked, place


@triton.jit
def _topk_kernel(scores, maxima, lens, block_table, groups, indices, slots, counts, queries, k, stride_s, stride_m,
                 stride_b, ENTRIES: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr, LISTED: tl.constexpr,
                 K: tl.constexpr, CHAINED: tl.constexpr = 0):  # fmt: skip
    follow(CHAINED)
    t = tl.program_id(0).to(tl.int64)
    length = tl.load(lens + t)
    scores += t * stride_s
    maxima += t * stride_m
    groups += t * LISTED
    indices += t * k
    slots += t * k
    table = block_table + (t // queries) * stride_b
    tl.store(counts + t, tl.minimum(length, k))
    j = tl.arange(0, K)
    if length <= k:
        # Everything is picked.
        tl.store(indices + j, tl.where(j < length, j, -1), j < k)
        home = tl.load(table + j // ENTRIES, j < length, other=0)
        tl.store(slots + j, tl.where(j < length, home * ENTRIES + j % ENTRIES, -1), j < k)
    else:
        used = tl.cdiv(length, GROUP)
        i = tl.arange(0, LISTED)
        if used <= LISTED:
            listed = used
            g = i
            low = 0.0
        else:
            listed = tl.minimum(LISTED, k)
            every = tl.arange(0, GROUPS)
            best = tl.load(maxima + every, every < used, other=float("nan"))
            low = tl.min(tl.where(every < used, best, float("inf")), 0)
            high = tl.max(tl.where(every < used, best, float("-inf")), 0)
            low = _bisect(best, low, high, k)
            picked, place = _first_k(best, low, k, GROUPS)
            tl.store(groups + place, every, picked)
            # The list is read back by other threads than wrote it.
            tl.debug_barrier()
            g = tl.load(groups + i, i < listed, other=0)
        n = tl.reshape(g[:, None] * GROUP + tl.arange(0, GROUP)[None, :], (LISTED * GROUP,))
        inside = tl.reshape(tl.broadcast_to((i < listed)[:, None], (LISTED, GROUP)), (LISTED * GROUP,)) & (n < length)
        keys = tl.load(scores + n, inside, other=float("nan"))
        if used <= LISTED:
            low = tl.min(tl.where(inside, keys, float("inf")), 0)
        # Else k groups reach low, so k scores do.
        bound = _bisect(keys, low, tl.max(tl.where(inside, keys, float("-inf")), 0), k)
        picked, place = _first_k(keys, bound, k, LISTED * GROUP)
        tl.store(indices + place, n, picked)
        block = tl.load(table + n // ENTRIES, picked, other=0)
        tl.store(slots + place, block * ENTRIES + n % ENTRIES, picked)


@dataclass(frozen=True, slots=True, kw_only=True)
class Picks:
    """The picked entries: indices in the sequence and slots in the pool, both [T, k] int32, ascending by index; of a
    row, the first counts[t] [T] int32 are valid, the rest -1.
    """

    indices: torch.Tensor
    slots: torch.Tensor
    counts: torch.Tensor


def topk_entries(
    scored: IndexScores, lens: torch.Tensor, block_table: torch.Tensor, entries_per_block: int, k: int
) -> Picks:
    """Pick each query's k best entries among its first lens[t].

    Shapes:  scored as index_scores returns it, T = S * Q; lens [T] int32; block_table [S, B] int32 of the pool that
             the picks will be read from. Scores must not be NaN.
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
    picks = Picks(indices=indices, slots=torch.empty_like(indices), counts=torch.empty_like(lens))
    if not num_queries:
        return picks
    groups_pad = triton.next_power_of_2(maxima.shape[1])
    listed = min(groups_pad, triton.next_power_of_2(k))
    groups = torch.empty(num_queries, listed, dtype=torch.int32, device=scores.device)
    _topk_kernel[(num_queries,)](
        scores,
        maxima,
        lens,
        block_table,
        groups,
        picks.indices,
        picks.slots,
        picks.counts,
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
        num_warps=_warps(max(groups_pad, listed * scored.group), num_queries),
        enable_fp_fusion=False,
        **chained.options(scores),
    )
    return picks


def _warps(width: int, num_queries: int) -> int:
    """Enough threads that each holds at most 32 of the wider search's keys, 8 where queries are few."""
    keys = 8 if num_queries < _FEW_QUERIES else 32
    return max(4, min(16, width // (32 * keys)))
