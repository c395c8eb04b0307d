"""Predicts seconds as a linear function of a few features, and keeps fitting itself to observations.

This module knows nothing of strategies or stores. Old observations fade by `memory`, so the prediction follows a
machine that gets slower within some dozens of observations.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from antefix.errors import InternalError

# After about 14 more observations, an observation counts half. This is fast enough to follow another process that loads
# the machine, and slow enough to average noise.
MEMORY = 0.95
# The prior weighs as much as one observation: the first observations outweigh it at once, and no fit is singular.
PRIOR_WEIGHT = 1.0
SECONDS_MIN = 1e-9


class Law(Protocol):
    """A linear law as its readers see it: they ask for predictions, but add no observations."""

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
                "a linear law needs one positive scale per coefficient, no negative coefficient, and memory in (0, 1]"
            )
        self.num_observations = 0
        self._memory = memory
        self._scales = np.asarray(scales, dtype=np.float64)
        self._prior = np.asarray(prior, dtype=np.float64) * self._scales
        self._xx = np.zeros((len(prior), len(prior)))
        self._xy = np.zeros(len(prior))
        self._coefficients = self._prior

    def observe(self, features: Sequence[float], seconds: float) -> None:
        """Learn that these features took `seconds`. Values that no clock can give (zero, negative, not finite) are
        ignored.
        """
        if not np.isfinite(seconds) or seconds < SECONDS_MIN:
            return
        # Weighted to relative error, because long prefills would otherwise outweigh short ones. Half of the weight
        # follows the prediction, half the outcome. By the outcome alone, a sudden slowdown would count little; by the
        # prediction alone, a wrong prior would give the first outcomes too much weight.
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
        """The predicted seconds per unit of each feature."""
        return tuple(float(c) for c in self._coefficients / self._scales)

    def _fit(self) -> npt.NDArray[np.float64]:
        # The ridge term pulls towards the prior where the data do not decide: with observations of one size only, rate
        # and fixed cost cannot be told apart. It is scaled by the prior's prediction for a typical feature, so it has
        # no dimension, like the data rows.
        typical = max(float(self._prior.sum()), SECONDS_MIN)
        ridge = PRIOR_WEIGHT * self._memory**self.num_observations + 1e-6
        xx = self._xx + ridge * np.eye(len(self._prior)) / typical**2
        xy = self._xy + ridge * self._prior / typical**2
        best, best_loss = self._prior, np.inf
        # Coefficients must not be negative. With three features, trying every subset of active ones is exact and cheap.
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
