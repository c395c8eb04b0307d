"""The simulated network between router, workers and store: calls are delayed, dropped, reordered, hung and cut off."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable
from typing import TypeVar

from antefix.errors import DeadlineExceeded, Unavailable

T = TypeVar("T")
HANG_S = 12.0


class Network:
    """Draws at random what happens to each call.  cut: peers that cannot be reached.  hanging: peers without answers.

    loss: the share of messages that are lost. Half of these are answers, so the call was carried out.
    """

    def __init__(self, rng: random.Random, counts: Counter[str]) -> None:
        self._rng = rng
        self.counts = counts
        self.cut: set[str] = set()
        self.hanging: set[str] = set()
        self.loss = 0.0
        self.delay_s = 0.002

    async def way(self, peer: str, after_s: float = 0.0) -> None:
        """Send one message to a peer or back, after this time.

        Raises:  Unavailable, DeadlineExceeded: it did not arrive.
        """
        self.counts["messages"] += 1
        await asyncio.sleep(after_s + self._rng.expovariate(1 / self.delay_s))
        if peer in self.hanging:
            await asyncio.sleep(HANG_S)
            raise DeadlineExceeded(f"{peer} did not answer in time")
        if peer in self.cut:
            raise Unavailable(f"{peer} cannot be reached")
        if self._rng.random() < self.loss:
            self.counts["lost messages"] += 1
            raise Unavailable(f"the connection to {peer} broke")

    async def call(self, peer: str, do: Callable[[], T]) -> T:
        """Call a peer.

        Raises:  the errors of `way`, perhaps after the call was carried out; and the errors of `do`.
        """
        self.counts["calls"] += 1
        await self.way(peer)
        answer = do()
        await self.way(peer)
        return answer
