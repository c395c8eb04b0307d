"""How long the parts of a chunk take, between which small jobs may run, and how many tokens chunks may therefore have.

A part is a layer, or a whole chunk where layers have no pauses. The longest part of the latest chunks says how many
tokens a chunk may have if no part is to take longer than a limit. A layer takes longer the more tokens lie before the
chunk, but from one chunk to the next this changes little.
"""

from __future__ import annotations

import time
from typing import Final

# Chunks never get shorter than this. Shorter ones would compute few more tokens per second than decode steps do, and up
# to 512 tokens run as one recorded call.
TOKENS_MIN: Final = 1024
# Chunks aim at this share of the limit, because a part's time varies.
_SHARE: Final = 0.8


class ChunkParts:
    """The parts of the chunks that one thread runs. limit_s: for how long a part should take at most.

    paused_s, repaid_s: of the present chunk, the time that small jobs took in its pauses, and how much of it counts as
    given back to steps.
    """

    def __init__(self, limit_s: float) -> None:
        self.paused_s = self.repaid_s = 0.0
        self._limit_s = limit_s
        self._part_begun = self._longest_s = 0.0
        self._longest_per_token_s = 0.0

    def begin(self) -> None:
        """A chunk begins."""
        self.paused_s = self.repaid_s = self._longest_s = 0.0
        self._part_begun = time.perf_counter()

    def paused(self, begun: float, ended: float, repaid_s: float) -> None:
        """A part of the chunk ended at `begun`, and small jobs ran until `ended`."""
        self._longest_s = max(self._longest_s, begun - self._part_begun)
        self._part_begun = ended
        self.paused_s += ended - begun
        self.repaid_s += repaid_s

    def end(self, num_tokens: int) -> None:
        """The chunk, of `num_tokens` tokens, has ended.  0: the number is not known."""
        now = time.perf_counter()
        self.paused(now, now, 0.0)
        if num_tokens >= TOKENS_MIN:
            self._longest_per_token_s = self._longest_s / num_tokens

    def tokens_max(self, num_tokens: int) -> int:
        """How many of `num_tokens` tokens a chunk may have."""
        if self._longest_per_token_s * num_tokens <= self._limit_s:
            return num_tokens
        fit = int(_SHARE * self._limit_s / self._longest_per_token_s)
        return min(num_tokens, max(TOKENS_MIN, fit // TOKENS_MIN * TOKENS_MIN))
