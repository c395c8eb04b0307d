"""The placement policies that the router offers, by name: least_work, and round_robin as a baseline."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping

import numpy as np

from antefix.errors import InvalidRequest
from antefix_router.placement.work import Loads, Policy, Work, own_work, rendezvous

# Costs that differ by this little count as equal. Predictions are not more exact than a block or two, and better
# criteria can choose among equals.
TIE_TOKENS = 256.0
# Each request at a worker stands for others that will wait behind the work placed there now. Without a store, the later
# requests for a prefix need the worker that holds it, so keeping this request out of that queue helps them less.
QUEUE_WEIGHT, QUEUE_WEIGHT_MEMORY = 1.0, 0.25
# Computing tokens that another worker holds in memory wastes compute, and the copy takes memory. Waiting delays one
# request only. So computing counts this much more. From 4 to 16, the hit tokens come from 0.25 points below the maximum
# of any placement to 0.02 below, and the p90 rises by 8% (docs/results/routing.md). With a shared store all workers
# compute the same tokens, except a worker that is already computing the prompt's beginning.
COMPUTE_WEIGHT = 8.0


class LeastWork:
    """Chooses the worker with the least work until this request's first token. The request's own work also counts for
    the requests that will wait behind it.

    cost = pending + own * (1 + queue_weight * requests there) + compute_weight * computing, in tokens of prefill, where
    own is computing and loading. Within `own`, blocks in memory cost less than on disk, and on disk less than remote.
    If two workers are equal, the one with fewer requests is chosen, then the conversation's last worker. If they are
    still equal, rendezvous hashing decides for a prefix that no worker holds, and history for any other prefix. The
    last tie is random.
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
        # 1. The work. A worker that just failed is chosen last whatever it holds.
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
        # 3. The caller's hint: the conversation's last worker probably has blocks that no event reported, such as the
        # last turn's output.
        if len(rows) > 1 and loads.hinted in rows:
            return loads.hinted
        # 4. A prefix that no worker holds: equal prompts go to the same worker. Any other prefix: the worker that has
        # served least.
        if len(rows) > 1 and not loads.resident_tokens[rows].any():
            return int(rows[np.argmin(rendezvous(work.affinity, loads.seeds[rows]))])
        if len(rows) > 1:
            rows = rows[loads.resident_tokens[rows] == loads.resident_tokens[rows].max()]
            rows = rows[loads.num_served[rows] == loads.num_served[rows].min()]
        # 5. Chance.
        return int(rows[0]) if len(rows) == 1 else int(rows[self._rng.randrange(len(rows))])


class RoundRobin:
    """Chooses the workers in turn."""

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
    """compute_weight: used by least_work only; the other policies have no such weight.

    Raises:  InvalidRequest: no policy has this name.
    """
    if name not in policies:
        raise InvalidRequest(f"unknown policy {name!r}: use one of {', '.join(policies)}")
    return LeastWork(seed, compute_weight=compute_weight) if name == "least_work" else policies[name](seed)
