"""Log probabilities of an output's tokens. The module keeps no state: equal logits give equal numbers, so a hit gives a
cold run's numbers.

Log probabilities are the model's own probabilities: the softmax over the unchanged logits, before temperature and
top_p.
"""

from __future__ import annotations

from collections import deque

import numpy as np
import numpy.typing as npt

from antefix.wire import TokenLogprob


def token_logprob(logits: npt.NDArray[np.float32], token: int, num_top: int) -> TokenLogprob:
    """logits: [vocab] float32.  The likeliest tokens come first; of equal ones the lowest id."""
    # In float64: a float32 sum over 129,280 ids is not accurate enough for the last digits.
    wide = logits.astype(np.float64)
    wide -= wide.max()
    wide -= np.log(np.exp(wide).sum())
    logprobs = wide.astype(np.float32)
    return TokenLogprob(
        logprob=float(logprobs[token]),
        top=tuple((int(index), float(logprobs[index])) for index in _likeliest(logits, num_top)),
    )


def _likeliest(logits: npt.NDArray[np.float32], num_top: int) -> npt.NDArray[np.intp]:
    """The ids of the `num_top` largest logits, found without sorting the whole vocabulary."""
    if not num_top:
        return np.empty(0, np.intp)
    num_top = min(num_top, len(logits))
    least = np.partition(logits, len(logits) - num_top)[len(logits) - num_top]
    candidates = np.flatnonzero(logits >= least)
    return candidates[np.argsort(-logits[candidates], kind="stable")[:num_top]]


class Logprobs:
    """Log probabilities of one output. Log probabilities of tokens that may not be shown yet wait in this object. If
    the request asks for no log probabilities, there are none.
    """

    def __init__(self, num_top: int | None = None) -> None:
        self._num_top = num_top
        self._waiting: deque[TokenLogprob] = deque()

    def push(self, logits: npt.NDArray[np.float32], token: int) -> None:
        """Add the log probability of `token`, which was chosen from `logits`."""
        if self._num_top is not None:
            self._waiting.append(token_logprob(logits, token, self._num_top))

    @property
    def num_top(self) -> int | None:
        return self._num_top

    def add(self, logprob: TokenLogprob) -> None:
        """Add the log probability of the next token, which was computed elsewhere."""
        self._waiting.append(logprob)

    def take(self, num_tokens: int) -> tuple[TokenLogprob, ...]:
        """Log probabilities of the next `num_tokens` tokens, which are shown now."""
        return tuple(self._waiting.popleft() for _ in range(num_tokens)) if self._num_top is not None else ()
