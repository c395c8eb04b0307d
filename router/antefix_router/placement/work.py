"""What placement decides by: the request's work, the workers' loads, and the one call that a policy answers.

Workers are rows of arrays, so that a thousand of them are weighed in some vector operations. Pure: no clock, no RPC.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

# Loading a stored token costs this part of computing one: V4-Flash reads 3.5 KB at some GB/s where prefill takes 55 us.
FETCH_WEIGHT = 0.02

Counts = npt.NDArray[np.int64]
Amounts = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]
Seeds = npt.NDArray[np.uint64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What a request needs.

    stored_tokens: its prefix that the store holds; None where the store did not answer.
    affinity: names the first block that nobody holds, 64 bits: where unseen prefixes part, so that twins meet.
    head: names the first two blocks; never placed by alone (a system prompt would send all to one), a baseline's key.
    replay_tokens: how far back window state is rebuilt from where blocks are all there is; 0: it need not be.
    places: of several stores, runs of the stored prefix: how many tokens, and the names of the stores that have them.
    """

    num_tokens: int
    stored_tokens: int | None
    affinity: int
    head: int = 0
    replay_tokens: int = 0
    places: tuple[tuple[int, frozenset[str]], ...] = ()


@dataclass(slots=True, kw_only=True)
class Loads:
    """The workers, a row each; all arrays have one length.

    seeds: from their addresses.  pending_tokens: of work placed and not done.  active_tokens: prompts' lengths of the
    same.  resident_tokens: of this prompt, probably in the worker's memory.  num_served: requests ended, ever.
    far_tokens: those of resident_tokens that the worker has to load from a slower medium of its own; None: none.
    loading_tokens: what loading the stored rest of this prompt is worth on each, as measured; None: not known.
    hinted: the row that the request's conversation was last at; -1: none.  leading: the row where the beginning of this
    prompt is being computed for another request, soon_tokens of it; -1: nowhere.
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
    """One way to place requests. May keep state of its own (a counter, a generator of chance)."""

    def choose(self, work: Work, loads: Loads) -> int:
        """The row of the worker that gets the request; there is at least one, and not all are shunned."""


def seed_of(address: str) -> int:
    """A worker's number in rendezvous hashing: the same in every process."""
    return int.from_bytes(hashlib.blake2b(address.encode(), digest_size=8).digest(), "little")


def seeds_of(addresses: Sequence[str]) -> Seeds:
    return np.array([seed_of(address) for address in addresses], np.uint64)


def rendezvous(key: int, seeds: Seeds) -> Seeds:
    """A weight a worker (Thaler and Ravishankar, 1998); the lowest wins: a lost worker moves only its own prefixes."""
    mixed = seeds ^ np.uint64(key & 0xFFFFFFFFFFFFFFFF)
    # The finaliser of splitmix64 (Steele, Lea and Flood, 2014): each bit of key and seed reaches each bit of weight.
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def cached_tokens(work: Work, loads: Loads) -> Amounts:
    """Tokens of the prompt that each worker need not compute.

    The store's word is final: what it does not hold is not promised, for a worker's memory is known by guess.
    """
    if work.stored_tokens is None:
        return loads.resident_tokens.astype(np.float64)
    return np.full(len(loads), float(work.stored_tokens))


def saved_by_replay(prefix_tokens: npt.ArrayLike, replay_tokens: int) -> Amounts:
    """Tokens of prefill that blocks in memory save where window state has to be rebuilt from them.

    Each layer replays some tokens less than the one below, and the top one none: of a replay of R tokens half is work,
    and of a shorter prefix of P, whose replay starts at its beginning, P - P^2 / 2R.
    """
    prefix = np.asarray(prefix_tokens, np.float64)
    if not replay_tokens:
        return prefix
    return np.where(prefix < replay_tokens, prefix * prefix / (2 * replay_tokens), prefix - replay_tokens / 2)


def own_work(work: Work, loads: Loads) -> tuple[Amounts, Amounts]:
    """Tokens of work that the request itself is on each worker: computing the rest, and loading what is elsewhere."""
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
        # It comes after the other one there, and finds those blocks in memory.
        computing[loads.leading], loading[loads.leading] = work.num_tokens - soon, 0.0
    return computing, loading
