"""A linear law of seconds, fitted while it is used: so many per unit of each feature. Knows no strategies, no stores.

Old observations fade by `memory`, so a machine that gets slower is believed within some dozens of observations.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from antefix.errors import InternalError

# An observation counts half after ~14 more: quick enough to follow a busy neighbour, slow enough to average noise.
MEMORY = 0.95
# Weight of the prior: as much as one observation, so the first real ones take over at once and no fit is ever singular.
PRIOR_WEIGHT = 1.0
SECONDS_MIN = 1e-9


class Law(Protocol):
    """What is asked of a law by those who do not teach it."""

    def seconds(self, features: Sequence[float]) -> float: ...

    @property
    def coefficients(self) -> tuple[float, ...]: ...


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
        if not np.isfinite(seconds) or seconds < SECONDS_MIN:
            return
        # Weighed to relative error, or a long prefill would drown a short one. The weight is half by the prediction:
        # by the outcome alone a sudden slowness would count little, by a wild prior alone the first outcomes too much.
        x = np.asarray(features, dtype=np.float64) / self._scales
        weight = 1 / (seconds * max(float(self._coefficients @ x), SECONDS_MIN))
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
        # It is scaled to the prior's own prediction at a typical feature, so it has no dimension, like the data rows.
        typical = max(float(self._prior.sum()), SECONDS_MIN)
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
