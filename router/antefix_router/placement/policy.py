"""The placement policies that the router offers, by name: least_work, and round_robin to measure it against."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping

import numpy as np

from antefix.errors import InvalidRequest
from antefix_router.placement.work import Loads, Policy, Work, own_work, rendezvous

# Costs this near are equal: predictions are not better than a block or two, and equals can be told apart by better.
TIE_TOKENS = 256.0
# Each request at a worker stands for others that will wait behind what is placed there now. Where only memory counts a
# prefix is where it is, and so is who comes for it: keeping this one from that queue serves them less.
QUEUE_WEIGHT, QUEUE_WEIGHT_MEMORY = 1.0, 0.25
# What one worker computes though another one has it in memory is lost to all, and so is the room that the copy takes
# there; waiting delays one. So computing counts this much more. From 4 to 16, tokens hit come from 0.25 points below
# the most that any placement gets to 0.02 below, and the p90 rises by 8% (docs/results/routing.md). Where a store is
# shared all workers compute the same, but for one that is computing the prompt's beginning already.
COMPUTE_WEIGHT = 8.0


class LeastWork:
    """Least work until this request's first token, its own counted for those who will queue behind it too.

    cost = pending + own * (1 + queue_weight * requests there) + compute_weight * computing, in tokens of prefill, where
    own is computing and loading. Resident beats disk beats remote within `own`. Ties: fewer requests; then where the
    conversation was; then an unseen prefix by rendezvous, another by history; then chance.
    """

    def __init__(
        self,
        seed: int = 0,
        *,
        queue_weight: float = QUEUE_WEIGHT,
        queue_weight_memory: float = QUEUE_WEIGHT_MEMORY,
        compute_weight: float = COMPUTE_WEIGHT,
        tie_tokens: float = TIE_TOKENS,
    ) -> None:
        self._rng = random.Random(seed)
        self._queue_weight = queue_weight
        self._queue_weight_memory = queue_weight_memory
        self._compute_weight = compute_weight
        self._tie_tokens = tie_tokens

    def choose(self, work: Work, loads: Loads) -> int:
        # 1. The work; a worker that just failed is the last choice whatever it has.
        computing, loading = own_work(work, loads)
        queue_weight = self._queue_weight_memory if work.stored_tokens is None else self._queue_weight
        costs = loads.pending_tokens + self._compute_weight * computing
        costs += (computing + loading) * (1 + queue_weight * loads.num_requests)
        if loads.shunned.any():
            costs = np.where(loads.shunned, np.inf, costs)
        rows = np.flatnonzero(costs <= costs.min() + self._tie_tokens)
        # 2. Load.
        if len(rows) > 1:
            rows = rows[loads.num_requests[rows] == loads.num_requests[rows].min()]
        # 3. The caller's hint: memory that no router was told of, such as the last turn's output, is likely there.
        if len(rows) > 1 and loads.hinted in rows:
            return loads.hinted
        # 4. What nobody has: twins meet. What somebody has: who has served least.
        if len(rows) > 1 and not loads.resident_tokens[rows].any():
            return int(rows[np.argmin(rendezvous(work.affinity, loads.seeds[rows]))])
        if len(rows) > 1:
            rows = rows[loads.resident_tokens[rows] == loads.resident_tokens[rows].max()]
            rows = rows[loads.num_served[rows] == loads.num_served[rows].min()]
        # 5. Chance.
        return int(rows[0]) if len(rows) == 1 else int(rows[self._rng.randrange(len(rows))])


class RoundRobin:
    """One after the other."""

    def __init__(self, seed: int = 0) -> None:
        self._next = seed

    def choose(self, work: Work, loads: Loads) -> int:
        rows = np.flatnonzero(~loads.shunned)
        self._next += 1
        return int(rows[self._next % len(rows)])


POLICIES: dict[str, Callable[[int], Policy]] = {"least_work": LeastWork, "round_robin": RoundRobin}


def make_policy(
    name: str,
    seed: int = 0,
    *,
    compute_weight: float = COMPUTE_WEIGHT,
    policies: Mapping[str, Callable[[int], Policy]] = POLICIES,
) -> Policy:
    """compute_weight: of least_work; the others have none.

    Raises:  InvalidRequest: there is no policy of that name.
    """
    if name not in policies:
        raise InvalidRequest(f"unknown policy {name!r}: use one of {', '.join(policies)}")
    return LeastWork(seed, compute_weight=compute_weight) if name == "least_work" else policies[name](seed)
