"""Choosing the next token from logits. Pure: the same logits, settings, output so far and position give the same token
anywhere.

    grammar -> penalties (vLLM's order) -> greedy, or temperature -> min_p -> top_k -> top_p -> draw
"""

from __future__ import annotations

import secrets
from typing import Protocol

import numpy as np
import numpy.typing as npt

from antefix.sampling import Sampling
from antefix_decode.card_choice import Wish
from antefix_decode.penalties import Logits, Penalties


class Constraint(Protocol):
    """What the output has to be. is_over: it is, and nothing may follow."""

    is_over: bool

    def mask(self, logits: Logits) -> Logits:
        """A copy of the logits in which what may not come next is minus infinity."""

    def allowed(self) -> npt.NDArray[np.int32]:
        """The same as bits, one per token, lowest first: [V / 32], rounded up."""

    def push(self, token: int) -> None: ...


class Sampler:
    """One request's sampling. The random number for a position comes from seed and position alone (Philox as a
    counter-based generator), so a request that is continued on another worker continues with the same tokens."""

    def __init__(
        self, sampling: Sampling, penalties: Penalties | None = None, constraint: Constraint | None = None
    ) -> None:
        self._sampling = sampling
        self._penalties = penalties or Penalties(sampling)
        self._constraint = constraint
        self._seed = secrets.randbits(64) if sampling.seed is None else sampling.seed

    @property
    def is_over(self) -> bool:
        """Whether the output is what it has to be, and nothing may follow."""
        return self._constraint is not None and self._constraint.is_over

    def choose(self, logits: npt.NDArray[np.float32], position: int) -> int:
        """The next token, which counts as output from here on. logits: [vocab] float32.  position: tokens before it.

        Ties go to the lowest id.  Raises:  InvalidRequest: the grammar cannot be followed any further.
        """
        if self._constraint is not None:
            logits = self._constraint.mask(logits)
        token = self._draw(self._penalties.apply(logits), position)
        self.take(token)
        return token

    def wish(self, position: int, num_top: int | None = None) -> Wish:
        """The same as something to be asked for where the logits are; the one that chooses then says so by `take`.

        num_top: of log probabilities.  Raises:  InvalidRequest: the grammar cannot be followed any further.
        """
        return Wish(
            sampling=self._sampling,
            edits=self._penalties.edits(),
            allowed=None if self._constraint is None else self._constraint.allowed(),
            uniform=self._uniform(position) if self._sampling.temperature else 0.0,
            num_top=num_top,
        )

    def take(self, token: int) -> None:
        """The token was chosen; it counts as output from here on."""
        self._penalties.push(token)
        if self._constraint is not None:
            self._constraint.push(token)

    def _draw(self, logits: npt.NDArray[np.float32], position: int) -> int:
        sampling = self._sampling
        if sampling.temperature == 0.0:
            return int(np.argmax(logits))
        # float64: a float32 cumulative sum over 129,280 ids is off by more than a rare token's probability.
        scaled = logits.astype(np.float64) / sampling.temperature
        probabilities = np.exp(scaled - scaled.max())
        if sampling.min_p:
            probabilities[probabilities < sampling.min_p * probabilities.max()] = 0.0
        if 0 < sampling.top_k < len(probabilities):
            # As many as equal the k-th stay with it, as in vLLM.
            least = np.partition(probabilities, len(probabilities) - sampling.top_k)[
                len(probabilities) - sampling.top_k
            ]
            probabilities[probabilities < least] = 0.0
        probabilities /= probabilities.sum()
        # Where a grammar or a limit leaves few tokens, only those are sorted.
        left = np.flatnonzero(probabilities)
        order = left[np.argsort(-probabilities[left], kind="stable")]
        cumulative = np.cumsum(probabilities[order])
        # The nucleus: the fewest likeliest ids that reach top_p (Holtzman et al., 2020); always at least one.
        num_kept = int(np.searchsorted(cumulative, sampling.top_p * cumulative[-1])) + 1
        num_kept = min(num_kept, len(order))
        draw = self._uniform(position) * cumulative[num_kept - 1]
        return int(order[min(int(np.searchsorted(cumulative, draw, side="right")), num_kept - 1)])

    def _uniform(self, position: int) -> float:
        return float(np.random.Generator(np.random.Philox(key=self._seed, counter=position)).random())
