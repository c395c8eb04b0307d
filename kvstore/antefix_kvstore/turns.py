"""Shares the event loop among payload streams: one payload message per pass of the loop, whatever the number of
streams.

Reading a message from the page cache and handing it to gRPC takes a few hundred microseconds, during which the loop
does nothing else. If every stream did this in each pass, a lookup, which takes about six passes, would wait for all
streams six times. So streams queue up, and between two messages the loop does everything else that is ready. While a
lookup is under way, the streams skip most passes.

Measured: a lookup next to four restores, on two cores that other jobs kept busy as well, takes 26 ms if all streams
send in each pass, 12 to 16 ms with one stream per pass, 5 ms with seven of eight passes skipped (6 ms with five of
six). The skipping costs a tenth of the restores' throughput while lookups come in; skipping passes all the time costs a
quarter.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Final

# How long the streams skip passes after a lookup began. With 5 ms, lookups on a busy machine did not finish in time.
GIVE_WAY_S: Final = 0.02
# During that time, a message is sent in one of so many passes.
PASSES_MEANWHILE: Final = 8


class Turns:
    """The turns of one event loop. Fair: streams get their turn in the order in which they ask."""

    def __init__(self) -> None:
        self._is_taken = False
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._given_way_until = 0.0

    def give_way(self) -> None:
        """Called when a call begins that should not wait for payload streams."""
        self._given_way_until = asyncio.get_running_loop().time() + GIVE_WAY_S

    async def take(self) -> None:
        """Wait for the caller's turn to send one message."""
        if not self._is_taken:
            self._begin()
            return
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        await turn

    def _begin(self) -> None:
        self._is_taken = True
        asyncio.get_running_loop().call_soon(self._pass_on, 1)

    def _pass_on(self, num_passes: int) -> None:
        """Give the turn to the stream that waits longest, in the next pass or some passes later."""
        loop = asyncio.get_running_loop()
        if num_passes < PASSES_MEANWHILE and loop.time() < self._given_way_until:
            loop.call_soon(self._pass_on, num_passes + 1)
            return
        while self._waiting:
            turn = self._waiting.popleft()
            # A stream that was cancelled gets no turn.
            if not turn.done():
                turn.set_result(None)
                self._begin()
                return
        self._is_taken = False
