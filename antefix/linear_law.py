"""Predicts seconds as a linear function of a few features, and keeps fitting itself to observations.

This module knows nothing of strategies or stores. A law has two parts:

    seconds(features) = level * sum(shape[i] * features[i])

The *level* is how fast the machine is now. Each observation corrects it, whatever its size, so a machine that gets
slower is followed within a few observations. The *shape* is how seconds grow with each feature, such as a fixed cost
and a rate. An observation makes older ones of about its own size fade, and no others. So a worker that sees one size
only keeps the shape that other sizes gave it before; with one size, fixed cost and rate cannot be told apart.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from antefix.errors import InternalError

# After about 14 more observations of its size, an observation counts half in the shape. This is fast enough to follow
# another process that loads the machine, and slow enough to average noise.
MEMORY = 0.95
# The share of an observation's log error that the level takes over: of a factor of 3, 1.3 is left after 5 observations.
FOLLOW = 0.25
# The same for laws of loads. It is small: what the level takes over does not decay, and a tier that looks slow is not
# read, so its law would not be corrected.
LOAD_FOLLOW = 0.05
# The most that one observation counts as an error, so that a single hiccup moves level and shape little.
_ERROR_MAX = 1.5
# Errors above this count less in the shape.
_SURPRISE = 0.3
# The most that a size may differ from the shape without moving the level.
_MISFIT_MAX = 1.15
# The prior counts as this many observations of a small and of a typical size; each real one of such a size halves it.
PRIOR_WEIGHT = 16.0
_PRIOR_FADES = 0.5
# The prior's small size, as a share of the typical one, and up to which share observations count as small or, in the
# other direction, as typical.
_SMALL, _SMALL_MAX, _TYPICAL_MIN = 1 / 64, 1 / 8, 1 / 2
# What is left of the prior's weight in every direction, so that no fit is singular.
_PRIOR_LEFT = 1e-3
SECONDS_MIN = 1e-9


class Law(Protocol):
    """A linear law as its readers see it: they ask for predictions, but add no observations."""

    def seconds(self, features: Sequence[float]) -> float: ...

    @property
    def coefficients(self) -> tuple[float, ...]: ...


class LinearLaw:
    """Non-negative least squares of seconds on a few features, weighted to relative error, with fading memory.

    prior: coefficients believed until something is observed.  scales: a typical magnitude of each feature, which
    makes the prior's weight mean the same for tokens and for bytes; the first feature is the constant one.  memory:
    what is left of an observation's weight in the shape after one more of its size.  follow: the share of an
    observation's error that the level takes over.
    """

    def __init__(
        self, prior: Sequence[float], scales: Sequence[float], memory: float = MEMORY, follow: float = FOLLOW
    ) -> None:
        if len(prior) != len(scales) or min(scales) <= 0 or min(prior) < 0 or not 0 < memory <= 1:
            raise InternalError(
                "a linear law needs one positive scale per coefficient, no negative coefficient, and memory in (0, 1]"
            )
        self.num_observations = 0
        self._memory, self._follow = memory, follow
        self._scales = np.asarray(scales, dtype=np.float64)
        self._prior = np.asarray(prior, dtype=np.float64) * self._scales
        self._level, self._shape = 1.0, self._prior
        # One row per size: the sums of weight * x * x and weight * seconds * x, in seconds at level 1. The first rows
        # are the prior's: for a small size, and for a typical value of each feature after the constant one.
        count = len(prior)
        self._rows: dict[tuple[int, ...], int] = {}
        self._xx, self._xy = np.zeros((count, count, count)), np.zeros((count, count))
        for row in range(count):
            x = np.full(count, _SMALL)
            x[[0, row]] = 1.0
            self._add(row, x, max(float(self._prior @ x), SECONDS_MIN), PRIOR_WEIGHT)

    def observe(self, features: Sequence[float], seconds: float) -> None:
        """Learn that these features took `seconds`. Values that no clock can give (zero, negative, not finite) are
        ignored.
        """
        if not np.isfinite(seconds) or seconds < SECONDS_MIN:
            return
        x = np.asarray(features, dtype=np.float64) / self._scales
        row, level = self._row_of(x), self._level
        error = self._follow_level(row, x, seconds)
        # The first observation says nothing about the shape's level. Later ones are taken at the level before, so that
        # shape and level see the same error.
        level = level if self.num_observations else self._level
        # The prior fades where real observations are about as far out as it is.
        for place in range(len(x)):
            if (x[1:] <= _SMALL_MAX).all() if place == 0 else x[place] >= _TYPICAL_MIN:
                self._fade(place, _PRIOR_FADES)
        self._fade(row, self._memory)
        # A large error is rather the level's: it counts less in the shape.
        self._add(row, x, seconds / level, min(1.0, _SURPRISE / max(abs(error), _SURPRISE)))
        self.num_observations += 1
        self._shape = self._fit()

    @property
    def level(self) -> float:
        """How slow the machine is now, in units of what the shape says."""
        return self._level

    def seconds(self, features: Sequence[float]) -> float:
        return self._level * float(self._shape @ (np.asarray(features, dtype=np.float64) / self._scales))

    @property
    def coefficients(self) -> tuple[float, ...]:
        """The predicted seconds per unit of each feature."""
        return tuple(self._level * float(c) for c in self._shape / self._scales)

    def _follow_level(self, row: int, x: npt.NDArray[np.float64], seconds: float) -> float:
        predicted = max(self._level * float(self._shape @ x), SECONDS_MIN)
        if self.num_observations:
            # The error is taken against what this size took lately. If it were taken against the prediction, a shape
            # that does not fit this size would move the level for ever.
            usual = float(self._shape @ self._xy[row] + 1) / float(self._shape @ self._xx[row] @ self._shape + 1)
            predicted *= max(1 / _MISFIT_MAX, min(_MISFIT_MAX, usual))
            # The first observations count equally: a prior says little about the level.
            share = max(self._follow, 1 / (self.num_observations + 1))
            error = _error(seconds, predicted)
            self._level *= math.exp(share * error)
            return error
        self._level *= seconds / predicted
        return 0.0

    def _row_of(self, x: npt.NDArray[np.float64]) -> int:
        """The row for features of this size; sizes of one row differ by at most a factor of 4."""
        name = tuple(math.floor(math.log2(each) / 2) if each > 0 else -1024 for each in x.tolist()[1:])
        row = self._rows.setdefault(name, len(self._xx))
        if row == len(self._xx):
            size = len(x)
            self._xx = np.concatenate((self._xx, np.zeros((1, size, size))))
            self._xy = np.concatenate((self._xy, np.zeros((1, size))))
        return row

    def _fade(self, row: int, left: float) -> None:
        self._xx[row] *= left
        self._xy[row] *= left

    def _add(self, row: int, x: npt.NDArray[np.float64], seconds: float, count: float) -> None:
        # Weighted to relative error, because long prefills would otherwise outweigh short ones. The weight makes the
        # shape's error the level's. If the two took different means of noise, they would drift apart for ever.
        predicted = max(float(self._shape @ x), SECONDS_MIN)
        off = seconds / predicted - 1
        weight = count * (_error(seconds, predicted) / off if abs(off) > 1e-6 else 1.0) / predicted**2
        self._xx[row] += weight * np.outer(x, x)
        self._xy[row] += weight * seconds * x

    def _fit(self) -> npt.NDArray[np.float64]:
        # A weak pull towards the prior where nothing decides. It is scaled by the prior's prediction for a typical
        # feature, so it has no dimension, like the rows.
        typical = max(float(self._prior.sum()), SECONDS_MIN)
        xx = self._xx.sum(axis=0) + _PRIOR_LEFT * np.eye(len(self._prior)) / typical**2
        xy = self._xy.sum(axis=0) + _PRIOR_LEFT * self._prior / typical**2
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


def _error(seconds: float, predicted: float) -> float:
    """How far a prediction was off: nearly the logarithm of the ratio, and at most `_ERROR_MAX`."""
    error = (seconds - predicted) / math.sqrt(seconds * predicted)
    return max(-_ERROR_MAX, min(_ERROR_MAX, error))
