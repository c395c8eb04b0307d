"""Log probabilities of an output's tokens. Pure: the same logits give the same numbers, so a hit's are a cold run's.

They are the model's own: of the softmax over the logits as they are, before temperature and nucleus.
"""

from __future__ import annotations

from collections import deque

import numpy as np
import numpy.typing as npt

from antefix.wire import TokenLogprob


def token_logprob(logits: npt.NDArray[np.float32], token: int, num_top: int) -> TokenLogprob:
    """logits: [vocab] float32.  The likeliest come first, ties by lowest id."""
    # float64 inside: a float32 sum over 129,280 ids would decide the last digits of every number.
    wide = logits.astype(np.float64)
    wide -= wide.max()
    wide -= np.log(np.exp(wide).sum())
    logprobs = wide.astype(np.float32)
    return TokenLogprob(
        logprob=float(logprobs[token]),
        top=tuple((int(index), float(logprobs[index])) for index in _likeliest(logits, num_top)),
    )


def _likeliest(logits: npt.NDArray[np.float32], num_top: int) -> npt.NDArray[np.intp]:
    """The `num_top` largest, found without sorting the vocabulary."""
    if not num_top:
        return np.empty(0, np.intp)
    num_top = min(num_top, len(logits))
    least = np.partition(logits, len(logits) - num_top)[len(logits) - num_top]
    candidates = np.flatnonzero(logits >= least)
    return candidates[np.argsort(-logits[candidates], kind="stable")[:num_top]]


class Logprobs:
    """One output's. Those of tokens that may not be shown yet wait; without being asked for, there are none."""

    def __init__(self, num_top: int | None = None) -> None:
        self._num_top = num_top
        self._waiting: deque[TokenLogprob] = deque()

    def push(self, logits: npt.NDArray[np.float32], token: int) -> None:
        """`token` was chosen from `logits`."""
        if self._num_top is not None:
            self._waiting.append(token_logprob(logits, token, self._num_top))

    @property
    def num_top(self) -> int | None:
        return self._num_top

    def add(self, logprob: TokenLogprob) -> None:
        """Of the next token, computed elsewhere."""
        self._waiting.append(logprob)

    def take(self, num_tokens: int) -> tuple[TokenLogprob, ...]:
        """Those of the next tokens that are shown."""
        return tuple(self._waiting.popleft() for _ in range(num_tokens)) if self._num_top is not None else ()
