"""Measured speeds: what prefill, replay and loading cost here, learnt from what they took.

Each speed is a linear law fitted online, so that a fixed cost (a call, a seek, a kernel launch) is not mistaken
for a slow rate, and prefill's growth with its context is not mistaken for noise:
    prefill_s(n, context) = fixed + n / rate + n * (context + n / 2) * slope        load_s(bytes) = fixed + bytes / rate
Old observations fade by `memory`, so a machine that gets slower is believed within some dozens of requests.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from antefix.errors import InternalError

# An observation counts half after ~14 more: quick enough to follow a busy neighbour, slow enough to average noise.
MEMORY = 0.95
# Weight of the prior: as much as one observation, so the first real ones take over at once and no fit is ever singular.
PRIOR_WEIGHT = 1.0
_SECONDS_MIN = 1e-9


class LinearLaw:
    """Non-negative least squares of seconds on a few features, weighted to relative error, with fading memory.

    prior: coefficients believed until something is observed.  scales: a typical magnitude of each feature, which
    makes the prior's weight mean the same for tokens and for bytes.
    """

    def __init__(self, prior: Sequence[float], scales: Sequence[float], memory: float = MEMORY) -> None:
        if len(prior) != len(scales) or min(scales) <= 0 or min(prior) < 0 or not 0 < memory <= 1:
            raise InternalError(
                "a law needs as many positive scales as non-negative coefficients, and memory in (0, 1]"
            )
        self.num_observations = 0
        self._memory = memory
        self._scales = np.asarray(scales, dtype=np.float64)
        self._prior = np.asarray(prior, dtype=np.float64) * self._scales
        self._xx = np.zeros((len(prior), len(prior)))
        self._xy = np.zeros(len(prior))
        self._coefficients = self._prior

    def observe(self, features: Sequence[float], seconds: float) -> None:
        """Learn that these features took `seconds`; what no clock gives (zero, negative, not finite) is ignored."""
        if not np.isfinite(seconds) or seconds < _SECONDS_MIN:
            return
        # Weighed to relative error, or a long prefill would drown a short one. The weight is half by the prediction:
        # by the outcome alone a sudden slowness would count little, by a wild prior alone the first outcomes too much.
        x = np.asarray(features, dtype=np.float64) / self._scales
        weight = 1 / (seconds * max(float(self._coefficients @ x), _SECONDS_MIN))
        self._xx = self._memory * self._xx + weight * np.outer(x, x)
        self._xy = self._memory * self._xy + weight * seconds * x
        self.num_observations += 1
        self._coefficients = self._fit()

    def seconds(self, features: Sequence[float]) -> float:
        return float(self._coefficients @ (np.asarray(features, dtype=np.float64) / self._scales))

    @property
    def coefficients(self) -> tuple[float, ...]:
        """Seconds per unit of each feature."""
        return tuple(float(c) for c in self._coefficients / self._scales)

    def _fit(self) -> npt.NDArray[np.float64]:
        # The ridge pulls towards the prior where the data say nothing (one size seen only: rate and fixed cost mix).
        # It is scaled to the prior's own prediction at a typical feature, hence dimensionless like the data rows.
        typical = max(float(self._prior.sum()), _SECONDS_MIN)
        ridge = PRIOR_WEIGHT * self._memory**self.num_observations + 1e-6
        xx = self._xx + ridge * np.eye(len(self._prior)) / typical**2
        xy = self._xy + ridge * self._prior / typical**2
        best, best_loss = self._prior, np.inf
        # Negative speeds make no sense: at three features, trying every subset of the active ones is exact and cheap.
        for size in range(len(xy), 0, -1):
            for active in itertools.combinations(range(len(xy)), size):
                index = np.array(active)
                part = np.linalg.solve(xx[np.ix_(index, index)], xy[index])
                if (part < 0).any():
                    continue
                full = np.zeros(len(xy))
                full[index] = part
                loss = float(full @ xx @ full - 2 * full @ xy)
                if loss < best_loss:
                    best, best_loss = full, loss
            if size == len(xy) and best_loss < np.inf:
                break
        return best


@dataclass(frozen=True, slots=True, kw_only=True)
class RatePriors:
    """What to believe before anything was measured; pessimistic for loads: a first hit is not taken on hope."""

    prefill_tokens_per_s: float = 2_000.0
    prefill_fixed_s: float = 0.01
    load_bytes_per_s: float = 500e6
    load_fixed_s: float = 0.002

    def __post_init__(self) -> None:
        if self.prefill_tokens_per_s <= 0 or self.load_bytes_per_s <= 0:
            raise InternalError("prior rates must be positive")


class Rates:
    """Speeds of one worker. Loads are kept apart by tier name ("pool", "disk", "remote", ...): each is its own law."""

    def __init__(self, priors: RatePriors | None = None, memory: float = MEMORY) -> None:
        self._priors = priors or RatePriors()
        self._memory = memory
        self._prefill = self._compute_law()
        self._replay = self._compute_law()
        self._load: dict[str, LinearLaw] = {}

    def observe_prefill(self, tokens: int, *, context: int, seconds: float) -> None:
        """`tokens` were prefilled after `context` tokens that were there."""
        self._prefill.observe(_compute_features(tokens, context), seconds)

    def observe_replay(self, tokens: int, *, context: int, seconds: float) -> None:
        """tokens: of work (`Plan.replay_work_tokens`), here and in `replay_s`."""
        self._replay.observe(_compute_features(tokens, context), seconds)

    def observe_load(self, tier: str, nbytes: int, seconds: float) -> None:
        self._load_law(tier).observe((1.0, float(nbytes)), seconds)

    def prefill_s(self, tokens: int, *, context: int) -> float:
        return self._prefill.seconds(_compute_features(tokens, context)) if tokens else 0.0

    def replay_s(self, tokens: int, *, context: int) -> float:
        """Until a replay was seen, prefill's law: a replay of so much work does a part of prefill's and never more."""
        law = self._replay if self._replay.num_observations else self._prefill
        return law.seconds(_compute_features(tokens, context)) if tokens else 0.0

    def load_s(self, tier: str, nbytes: int) -> float:
        return self._load_law(tier).seconds((1.0, float(nbytes))) if nbytes else 0.0

    @property
    def prefill_tokens_per_s(self) -> float:
        """Without fixed cost and without context: the number to print."""
        return 1 / max(self._prefill.coefficients[1], _SECONDS_MIN)

    def load_bytes_per_s(self, tier: str) -> float:
        return 1 / max(self._load_law(tier).coefficients[1], 1e-15)

    def _compute_law(self) -> LinearLaw:
        p = self._priors
        return LinearLaw(
            (p.prefill_fixed_s, 1 / p.prefill_tokens_per_s, 0.0), (1.0, 2048.0, 2048.0 * 16384.0), self._memory
        )

    def _load_law(self, tier: str) -> LinearLaw:
        if tier not in self._load:
            p = self._priors
            self._load[tier] = LinearLaw((p.load_fixed_s, 1 / p.load_bytes_per_s), (1.0, 32e6), self._memory)
        return self._load[tier]


def _compute_features(tokens: int, context: int) -> tuple[float, float, float]:
    return 1.0, float(tokens), float(tokens) * (context + tokens / 2)
