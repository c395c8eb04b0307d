"""Measured speeds of prefill, replay and loading on this worker, learnt from past durations.

Each speed is a linear law fitted online, so that a fixed cost (a call, a seek, a kernel launch) is not mistaken
for a slow rate, and prefill's growth with its context is not mistaken for noise:
    prefill_s(n, context) = fixed + n / rate + n * (context + n / 2) * slope        load_s(bytes) = fixed + bytes / rate
`antefix.linear_law` is the law.

Prefills and replays run on one thread, so both have the level of prefill's law. A worker that gets busier, and has run
no replay since, would otherwise take replays for as fast as they were before.

A law that has lately seen only short prefills keeps the ratio of long to short ones that it learnt before, or the
prior's, and scales it to how fast short ones are now. Laws of loads follow slower: a tier that looks slow is not read,
and what is not read is not measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from antefix.errors import InternalError
from antefix.linear_law import LOAD_FOLLOW, MEMORY, SECONDS_MIN, Law, LinearLaw


@dataclass(frozen=True, slots=True, kw_only=True)
class RatePriors:
    """The speeds assumed before anything was measured. The assumed speeds are pessimistic for loads, so that the first
    hits are only taken where they are clearly faster than computing.
    """

    prefill_tokens_per_s: float = 2_000.0
    prefill_fixed_s: float = 0.01
    load_bytes_per_s: float = 500e6
    load_fixed_s: float = 0.002

    def __post_init__(self) -> None:
        if self.prefill_tokens_per_s <= 0 or self.load_bytes_per_s <= 0:
            raise InternalError("prior rates must be positive")


class Rates:
    """Speeds of one worker. Loads are learnt separately for each tier name ("pool", "disk", a store's, ...), each with
    a law of its own.
    """

    def __init__(
        self,
        priors: RatePriors | None = None,
        memory: float = MEMORY,
        *,
        tiers: Mapping[str, Law] | None = None,
    ) -> None:
        """tiers: laws of tiers that other code updates; `observe_load` does not change them."""
        self._tiers = {} if tiers is None else tiers
        self._priors = priors or RatePriors()
        self._memory = memory
        self._prefill = self._compute_law()
        self._replay = self._compute_law()
        self._load: dict[str, LinearLaw] = {}

    def observe_prefill(self, tokens: int, *, context: int, seconds: float) -> None:
        """Learn that prefilling `tokens` tokens after `context` tokens took `seconds`."""
        self._prefill.observe(_compute_features(tokens, context), seconds)

    def observe_replay(self, tokens: int, *, context: int, seconds: float) -> None:
        """tokens: the tokens of work of a plan (`Plan.replay_work_tokens`), here and in `replay_s`."""
        # A prefill follows each replay. Until the first one, nothing says how fast this machine is.
        if self._prefill.num_observations:
            self._replay.observe(_compute_features(tokens, context), seconds / self._prefill.level)

    def observe_load(self, tier: str, nbytes: int, seconds: float) -> None:
        """Learn from one load. Observations are ignored for tiers whose law other code updates."""
        if tier not in self._tiers:
            self._own_law(tier).observe((1.0, float(nbytes)), seconds)

    def prefill_s(self, tokens: int, *, context: int) -> float:
        return _predicted_s(self._prefill, tokens, context)

    def replay_s(self, tokens: int, *, context: int) -> float:
        """Until a replay has been observed, prefill's law is used: a replay of so much work does a part of prefill's
        work and never more.
        """
        if self._replay.num_observations:
            return self._prefill.level * _predicted_s(self._replay, tokens, context)
        return self.prefill_s(tokens, context=context)

    def load_s(self, tier: str, nbytes: int) -> float:
        return self._load_law(tier).seconds((1.0, float(nbytes))) if nbytes else 0.0

    @property
    def prefill_tokens_per_s(self) -> float:
        """The prefill rate without fixed cost and without context, for display only."""
        return 1 / max(self._prefill.coefficients[1], SECONDS_MIN)

    def load_bytes_per_s(self, tier: str) -> float:
        return 1 / max(self._load_law(tier).coefficients[1], 1e-15)

    def _compute_law(self) -> LinearLaw:
        p = self._priors
        return LinearLaw(
            (p.prefill_fixed_s, 1 / p.prefill_tokens_per_s, 0.0), (1.0, 2048.0, 2048.0 * 16384.0), self._memory
        )

    def _load_law(self, tier: str) -> Law:
        return self._tiers[tier] if tier in self._tiers else self._own_law(tier)

    def _own_law(self, tier: str) -> LinearLaw:
        if tier not in self._load:
            p = self._priors
            self._load[tier] = LinearLaw(
                (p.load_fixed_s, 1 / p.load_bytes_per_s), (1.0, 32e6), self._memory, LOAD_FOLLOW
            )
        return self._load[tier]


def _predicted_s(law: LinearLaw, tokens: int, context: int) -> float:
    return law.seconds(_compute_features(tokens, context)) if tokens else 0.0


def _compute_features(tokens: int, context: int) -> tuple[float, float, float]:
    return 1.0, float(tokens), float(tokens) * (context + tokens / 2)
