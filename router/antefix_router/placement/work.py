"""The data that placement needs: the request's work, the workers' loads, and the interface of a policy.

Workers are rows of arrays, so that a few vector operations compare a thousand of them. Pure: no clock, no RPC.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

# Loading a stored token costs this fraction of computing one: V4-Flash reads 3.5 KB at some GB/s, where prefill takes
# 55 us.
FETCH_WEIGHT = 0.02

Counts = npt.NDArray[np.int64]
Amounts = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]
Seeds = npt.NDArray[np.uint64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """The work of a request.

    stored_tokens: the leading tokens that the store holds; None if the store did not answer.
    affinity: 64 bits that name the first block that no worker holds. Placing new prefixes by these bits sends equal
    prompts to the same worker. head: names the first two blocks. Only a baseline policy places by `head`, because it
    would send all prompts with one system prompt to one worker. replay_tokens: how many tokens must be replayed to
    rebuild window state from blocks alone; 0: none. places: with several stores, the stored prefix as a series of runs:
    the length of each in tokens, and the names of the stores that hold it.
    """

    num_tokens: int
    stored_tokens: int | None
    affinity: int
    head: int = 0
    replay_tokens: int = 0
    places: tuple[tuple[int, frozenset[str]], ...] = ()


@dataclass(slots=True, kw_only=True)
class Loads:
    """The workers, one row each; all arrays have the same length.

    seeds: derived from their addresses.  pending_tokens: work placed and not done.  active_tokens: the lengths of the
    prompts of that work.  resident_tokens: tokens of this prompt that are probably in the worker's memory.  num_served:
    requests ended since the start.
    far_tokens: those of resident_tokens that the worker has to load from a slower medium of its own; None: none.
    loading_tokens: the measured cost on each worker of loading the stored part of this prompt; None: not known.
    hinted: the row of the conversation's last worker; -1: none.  leading: the row of the worker that is computing the
    beginning of this prompt for another request, soon_tokens of it; -1: none.
    """

    seeds: Seeds
    pending_tokens: Amounts
    active_tokens: Amounts
    num_requests: Counts
    resident_tokens: Counts
    num_served: Counts
    shunned: Flags
    far_tokens: Counts | None = None
    loading_tokens: Amounts | None = None
    hinted: int = -1
    leading: int = -1
    soon_tokens: int = 0

    def __len__(self) -> int:
        return len(self.seeds)


class Policy(Protocol):
    """A placement policy. A policy may keep state, for example a counter or a random generator."""

    def choose(self, work: Work, loads: Loads) -> int:
        """The row of the worker that the policy chose. The caller guarantees at least one row, and at least one worker
        that may be chosen.
        """


def seed_of(address: str) -> int:
    """A worker's number in rendezvous hashing: the same in every process."""
    return int.from_bytes(hashlib.blake2b(address.encode(), digest_size=8).digest(), "little")


def seeds_of(addresses: Sequence[str]) -> Seeds:
    return np.array([seed_of(address) for address in addresses], np.uint64)


def rendezvous(key: int, seeds: Seeds) -> Seeds:
    """A weight per worker for rendezvous hashing (Thaler and Ravishankar, 1998). The worker with the lowest weight
    wins, so a lost worker moves only its own prefixes.
    """
    mixed = seeds ^ np.uint64(key & 0xFFFFFFFFFFFFFFFF)
    # The finaliser of splitmix64 (Steele, Lea and Flood, 2014): each bit of key and seed reaches each bit of weight.
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def cached_tokens(work: Work, loads: Loads) -> Amounts:
    """Tokens of the prompt that each worker need not compute.

    If the store answered, its answer decides. Blocks that the store lacks do not count, because a worker's memory is
    only guessed.
    """
    if work.stored_tokens is None:
        return loads.resident_tokens.astype(np.float64)
    return np.full(len(loads), float(work.stored_tokens))


def saved_by_replay(prefix_tokens: npt.ArrayLike, replay_tokens: int) -> Amounts:
    """Tokens of prefill that blocks in memory save if window state has to be rebuilt from them.

    Each layer recomputes fewer tokens than the layer below it, and the top layer none. So half of a replay of R tokens
    is work. For a shorter prefix of P tokens, whose replay starts at its beginning, the work is P - P^2 / 2R.
    """
    prefix = np.asarray(prefix_tokens, np.float64)
    if not replay_tokens:
        return prefix
    return np.where(prefix < replay_tokens, prefix * prefix / (2 * replay_tokens), prefix - replay_tokens / 2)


def own_work(work: Work, loads: Loads) -> tuple[Amounts, Amounts]:
    """The request's own work on each worker, in tokens: computing uncached tokens, and loading tokens held
    elsewhere.
    """
    resident = loads.resident_tokens.astype(np.float64)
    soon = float(loads.soon_tokens)
    if work.stored_tokens is None:
        computing = work.num_tokens - saved_by_replay(resident, work.replay_tokens)
        loading = (
            np.zeros(len(loads)) if loads.far_tokens is None else FETCH_WEIGHT * loads.far_tokens.astype(np.float64)
        )
        soon = float(saved_by_replay(soon, work.replay_tokens))
    else:
        computing = np.full(len(loads), float(work.num_tokens - work.stored_tokens))
        loading = FETCH_WEIGHT * np.maximum(0.0, work.stored_tokens - resident)
        if loads.loading_tokens is not None:
            loading = loads.loading_tokens.copy()
    if loads.leading >= 0 and computing[loads.leading] > work.num_tokens - soon:
        # On that worker this request runs after the other one, and finds those blocks in memory.
        computing[loads.leading], loading[loads.leading] = work.num_tokens - soon, 0.0
    return computing, loading
