"""Chooses the next token from logits. The choice has no other inputs: equal logits, settings, output so far and
position give the same token on any worker.

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
    """A format that the output must follow. is_over: the output is complete, and no token may follow."""

    is_over: bool

    def mask(self, logits: Logits) -> Logits:
        """A copy of the logits with minus infinity for every token that may not come next."""

    def allowed(self) -> npt.NDArray[np.int32]:
        """The allowed tokens as bits, one per token, lowest first: [V / 32] rounded up."""

    def push(self, token: int) -> None: ...


class Sampler:
    """One request's sampling. The random number for a position depends on seed and position alone (Philox as a
    counter-based generator), so a request that continues on another worker gets the same tokens.
    """

    def __init__(
        self, sampling: Sampling, penalties: Penalties | None = None, constraint: Constraint | None = None
    ) -> None:
        self._sampling = sampling
        self._penalties = penalties or Penalties(sampling)
        self._constraint = constraint
        self._seed = secrets.randbits(64) if sampling.seed is None else sampling.seed

    @property
    def is_over(self) -> bool:
        """Whether the output is complete according to its grammar, so that no token may follow."""
        return self._constraint is not None and self._constraint.is_over

    def choose(self, logits: npt.NDArray[np.float32], position: int) -> int:
        """The next token, which counts as output from now on. logits: [vocab] float32. position: how many tokens come
        before it.

        Of equal logits the lowest id wins. Raises: InvalidRequest: no token can continue the output in its grammar.
        """
        if self._constraint is not None:
            logits = self._constraint.mask(logits)
        token = self._draw(self._penalties.apply(logits), position)
        self.take(token)
        return token

    def wish(self, position: int, num_top: int | None = None) -> Wish:
        """The settings for choosing the next token on the GPU. After the GPU has chosen, the caller must call `take`.

        num_top: for how many tokens log probabilities are wanted. Raises: InvalidRequest: no token can continue the
        output in its grammar.
        """
        return Wish(
            sampling=self._sampling,
            edits=self._penalties.edits(),
            allowed=None if self._constraint is None else self._constraint.allowed(),
            uniform=self._uniform(position) if self._sampling.temperature else 0.0,
            num_top=num_top,
        )

    def take(self, token: int) -> None:
        """This method must be called when `token` was chosen elsewhere; the token counts as output from now on."""
        self._penalties.push(token)
        if self._constraint is not None:
            self._constraint.push(token)

    def _draw(self, logits: npt.NDArray[np.float32], position: int) -> int:
        sampling = self._sampling
        if sampling.temperature == 0.0:
            return int(np.argmax(logits))
        # float64: the rounding error of a float32 cumulative sum over 129,280 ids exceeds a rare token's probability.
        scaled = logits.astype(np.float64) / sampling.temperature
        probabilities = np.exp(scaled - scaled.max())
        if sampling.min_p:
            probabilities[probabilities < sampling.min_p * probabilities.max()] = 0.0
        if 0 < sampling.top_k < len(probabilities):
            # Tokens that are as likely as the k-th are kept too, as in vLLM.
            least = np.partition(probabilities, len(probabilities) - sampling.top_k)[
                len(probabilities) - sampling.top_k
            ]
            probabilities[probabilities < least] = 0.0
        probabilities /= probabilities.sum()
        # If a grammar or a limit leaves few tokens, only those are sorted.
        left = np.flatnonzero(probabilities)
        order = left[np.argsort(-probabilities[left], kind="stable")]
        cumulative = np.cumsum(probabilities[order])
        # top_p: the smallest set of likeliest ids whose sum reaches top_p (Holtzman et al., 2020); at least one id.
        num_kept = int(np.searchsorted(cumulative, sampling.top_p * cumulative[-1])) + 1
        num_kept = min(num_kept, len(order))
        draw = self._uniform(position) * cumulative[num_kept - 1]
        return int(order[min(int(np.searchsorted(cumulative, draw, side="right")), num_kept - 1)])

    def _uniform(self, position: int) -> float:
        return float(np.random.Generator(np.random.Philox(key=self._seed, counter=position)).random())
