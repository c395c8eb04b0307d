"""Placement rules of other routers, from their documents, to compare with ours. The router of Antefix does not offer
these rules.

The baselines get the same information as our policies: the same directory, and the same clock for finished work. Ties
are broken at random.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np

from antefix_router.placement.policy import COMPUTE_WEIGHT, POLICIES
from antefix_router.placement.policy import make_policy as make_served_policy
from antefix_router.placement.work import Amounts, Flags, Loads, Policy, Work, cached_tokens, rendezvous


class LeastLoaded:
    """Places each request on the worker with the fewest requests."""

    def __init__(self, seed: int = 0) -> None:
        self._rng = random.Random(seed)

    def choose(self, work: Work, loads: Loads) -> int:
        return _lowest(loads.num_requests.astype(np.float64), ~loads.shunned, self._rng)


class Rendezvous:
    """Places each request by a hash of its prompt's first two blocks, whatever the load. The first block alone may
    belong to a system prompt that many requests share.
    """

    def __init__(self, seed: int = 0) -> None:
        self._seed = seed

    def choose(self, work: Work, loads: Loads) -> int:
        rows = np.flatnonzero(~loads.shunned)
        return int(rows[np.argmin(rendezvous(work.head ^ self._seed, loads.seeds[rows]))])


class DynamoLinear:
    """NVIDIA Dynamo's KV router: max(0, queued prefill + prompt - overlap credit) + active blocks, in tokens.

    Credits as documented: memory 1.0, disk 0.25; prefill load scale 1; ties are broken at random.
    """

    CREDIT_DISK = 0.25

    def __init__(self, seed: int = 0) -> None:
        self._rng = random.Random(seed)

    def choose(self, work: Work, loads: Loads) -> int:
        on_disk = np.maximum(0.0, (work.stored_tokens or 0) - loads.resident_tokens)
        credit = loads.resident_tokens + self.CREDIT_DISK * on_disk
        prefill = np.maximum(0.0, loads.pending_tokens + work.num_tokens - credit)
        return _lowest(prefill + loads.active_tokens + work.num_tokens, ~loads.shunned, self._rng)


class LMetric:
    """New prefill tokens times batch size (arXiv 2603.15202). The store's tokens count as cached, which favours this
    rule.
    """

    def __init__(self, seed: int = 0) -> None:
        self._rng = random.Random(seed)

    def choose(self, work: Work, loads: Loads) -> int:
        prefill = loads.pending_tokens + work.num_tokens - cached_tokens(work, loads)
        return _lowest(prefill * (1 + loads.num_requests), ~loads.shunned, self._rng)


class SglangThreshold:
    """SGLang's cache-aware rule: shortest queue when out of balance, else the best match, else the least loaded."""

    BALANCE_ABSOLUTE = 64
    BALANCE_RELATIVE = 1.5
    MATCH_MIN = 0.3

    def __init__(self, seed: int = 0) -> None:
        self._rng = random.Random(seed)

    def choose(self, work: Work, loads: Loads) -> int:
        allowed = ~loads.shunned
        queues = loads.num_requests[allowed]
        most, least = int(queues.max()), int(queues.min())
        requests = loads.num_requests.astype(np.float64)
        if most - least > self.BALANCE_ABSOLUTE and most > self.BALANCE_RELATIVE * least:
            return _lowest(requests, allowed, self._rng)
        best = int(loads.resident_tokens[allowed].max())
        if best / work.num_tokens > self.MATCH_MIN:
            return _lowest(requests, allowed & (loads.resident_tokens == best), self._rng)
        return _lowest(requests, allowed, self._rng)


def _lowest(costs: Amounts, allowed: Flags, rng: random.Random) -> int:
    costs = np.where(allowed, costs, np.inf)
    rows = np.flatnonzero(costs == costs.min())
    return int(rows[0]) if len(rows) == 1 else int(rows[rng.randrange(len(rows))])


# The policies that the router offers, and the baselines.
ALL_POLICIES: dict[str, Callable[[int], Policy]] = {
    **POLICIES,
    "least_loaded": LeastLoaded,
    "rendezvous": Rendezvous,
    "dynamo_linear": DynamoLinear,
    "lmetric": LMetric,
    "sglang_threshold": SglangThreshold,
}


def make_policy(name: str, seed: int = 0, *, compute_weight: float = COMPUTE_WEIGHT) -> Policy:
    """A policy of ours or a baseline, by its name. Raises: InvalidRequest: neither a policy nor a baseline has this
    name.
    """
    return make_served_policy(name, seed, compute_weight=compute_weight, policies=ALL_POLICIES)
