"""Choosing the next token from logits. Pure: the same logits, settings and position give the same token anywhere."""

from __future__ import annotations

import secrets

import numpy as np
import numpy.typing as npt

from antefix.wire import Sampling


class Sampler:
    """One request's sampling. The random number for a position comes from seed and position alone (Philox as a
    counter-based generator), so a request that is continued on another worker goes on with the same tokens."""

    def __init__(self, sampling: Sampling) -> None:
        self._sampling = sampling
        self._seed = secrets.randbits(64) if sampling.seed is None else sampling.seed

    def choose(self, logits: npt.NDArray[np.float32], position: int) -> int:
        """logits: [vocab] float32.  position: tokens before the one to choose. Ties go to the lowest id."""
        if self._sampling.temperature == 0.0:
            return int(np.argmax(logits))
        # float64: a float32 cumulative sum over 129,280 ids is off by more than a rare token's probability.
        scaled = logits.astype(np.float64) / self._sampling.temperature
        probabilities = np.exp(scaled - scaled.max())
        probabilities /= probabilities.sum()
        order = np.argsort(-probabilities, kind="stable")
        cumulative = np.cumsum(probabilities[order])
        # The nucleus: the fewest likeliest ids that reach top_p (Holtzman et al., 2020); always at least one.
        num_kept = int(np.searchsorted(cumulative, self._sampling.top_p * cumulative[-1])) + 1
        draw = self._uniform(position) * cumulative[min(num_kept, len(order)) - 1]
        return int(order[min(int(np.searchsorted(cumulative, draw, side="right")), len(order) - 1)])

    def _uniform(self, position: int) -> float:
        return float(np.random.Generator(np.random.Philox(key=self._seed, counter=position)).random())
