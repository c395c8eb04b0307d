"""Changes logits before a token is chosen from them, in vLLM's order and arithmetic. Pure numpy.

    forbidden until min_tokens -> logit bias -> repetition, frequency, presence penalty -> ... the token is chosen

Prompt and output are counted separately: presence and frequency penalties count the output alone, repetition both. A
request that continues on another worker passes what it has already sent as output, so its penalties do not change.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from antefix.sampling import Sampling
from antefix_decode.card_choice import Edits

Logits = npt.NDArray[np.float32]


class Penalties:
    """The penalties of one output. If no setting asks for penalties, they cost nothing."""

    def __init__(
        self,
        sampling: Sampling,
        *,
        stop_ids: Iterable[int] = (),
        prompt: npt.ArrayLike = (),
        emitted: Iterable[int] = (),
    ) -> None:
        """stop_ids: all tokens that may end the output; also the model's end tokens if they are ignored."""
        self._sampling = sampling
        self._output = _Counts()
        self._repeated = _Counts() if sampling.repetition_penalty != 1.0 else None
        if self._repeated is not None:
            # Not np.unique, which loads numpy.ma at its first call, in the middle of a request.
            for token in sorted(set(np.asarray(prompt, np.int64).tolist())):
                self._repeated.add(token)
        self._num_output = 0
        self._stop_ids = np.array(sorted({*stop_ids, *sampling.stop_token_ids}), np.int64)
        self._biased = np.array([token for token, _ in sampling.logit_bias], np.int64)
        self._bias = np.array([bias for _, bias in sampling.logit_bias], np.float32)
        self._counts = bool(sampling.frequency_penalty or sampling.presence_penalty or self._repeated is not None)
        for token in emitted:
            self.push(token)

    def push(self, token: int) -> None:
        """Count a new token of the output."""
        self._num_output += 1
        if self._counts:
            self._output.add(token)
        if self._repeated is not None:
            self._repeated.add(token)

    def apply(self, logits: Logits) -> Logits:
        """logits: [vocab] float32, not changed.  If there is nothing to change, the same array is returned."""
        if self._must_go_on or len(self._biased) or self._counts:
            logits = logits.copy()
        if self._must_go_on:
            _forbid(logits, self._stop_ids)
        if len(self._biased):
            logits[self._biased] += self._bias
        if self._counts:
            self._penalize(logits)
        return logits

    def edits(self) -> Edits | None:
        """The changes that `apply` makes, for logits on a GPU; None if there are none."""
        if not (self._must_go_on or len(self._biased) or self._counts):
            return None
        none, sampling = np.zeros(0, np.int64), self._sampling
        return Edits(
            forbidden=self._stop_ids if self._must_go_on else none,
            biased=self._biased,
            bias=self._bias,
            # Copies, because these arrays change with later tokens.
            repeated=none if self._repeated is None else self._repeated.tokens.copy(),
            repetition=sampling.repetition_penalty,
            counted=self._output.tokens.copy(),
            counts=self._output.counts.copy(),
            frequency=sampling.frequency_penalty,
            presence=sampling.presence_penalty,
        )

    @property
    def _must_go_on(self) -> bool:
        return self._num_output < self._sampling.min_tokens

    def _penalize(self, logits: Logits) -> None:
        if self._repeated is not None:
            # The penalty of Keskar et al., 2019: makes a token less likely, whether its logit is positive or negative.
            tokens = self._repeated.tokens
            values, penalty = logits[tokens], np.float32(self._sampling.repetition_penalty)
            logits[tokens] = np.where(values > 0, values * (np.float32(1.0) / penalty), values * penalty)
        tokens = self._output.tokens
        logits[tokens] -= np.float32(self._sampling.frequency_penalty) * self._output.counts
        logits[tokens] -= np.float32(self._sampling.presence_penalty)


class _Counts:
    """How often each token appeared, as two growing arrays: adding a token must not take time in proportion to them."""

    def __init__(self) -> None:
        self._index: dict[int, int] = {}
        self._tokens = np.zeros(64, np.int64)
        self._counts = np.zeros(64, np.float32)

    @property
    def tokens(self) -> npt.NDArray[np.int64]:
        """[N] tokens, each once, in the order of their first appearance."""
        return self._tokens[: len(self._index)]

    @property
    def counts(self) -> npt.NDArray[np.float32]:
        return self._counts[: len(self._index)]

    def add(self, token: int) -> None:
        place = self._index.setdefault(token, len(self._index))
        if place == len(self._tokens):
            self._tokens = np.concatenate((self._tokens, np.zeros_like(self._tokens)))
            self._counts = np.concatenate((self._counts, np.zeros_like(self._counts)))
        self._tokens[place] = token
        self._counts[place] += 1


def _forbid(logits: Logits, tokens: npt.NDArray[np.int64]) -> None:
    """Forbid tokens, unless no other token is left: a grammar may allow nothing but the end of the output."""
    before = logits[tokens[tokens < len(logits)]]
    logits[tokens[tokens < len(logits)]] = -np.inf
    if not np.isfinite(logits.max()):
        logits[tokens[tokens < len(logits)]] = before
