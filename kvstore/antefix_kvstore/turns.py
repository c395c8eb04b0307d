"""Shares the event loop among payload streams: one payload message per pass of the loop, whatever the number of
streams.

Reading a message from the page cache and handing it to gRPC takes a few hundred microseconds, during which the loop
does nothing else. If every stream did this in each pass, a lookup, which takes about six passes, would wait for all
streams six times. So streams queue up, and between two messages the loop does everything else that is ready. While a
lookup is under way, the loop sleeps between two messages.

Measured: a lookup next to four restores, on two cores that other jobs kept busy as well, takes 26 ms if all streams
send in each pass, 12 to 16 ms with one stream per pass, 4.4 ms if seven of eight passes are skipped, and 2.8 ms if the
loop sleeps for a millisecond between two messages. A loop that skips passes is busy all the time: it takes a core from
the caller and the interpreter's lock from the thread that looks up. While lookups come in, the sleep costs the restores
a fifth of their throughput (two milliseconds: two fifths); while none comes in, nothing.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Final

# How long the streams give way after a lookup began. With 5 ms, lookups on a busy machine did not finish in time.
GIVE_WAY_S: Final = 0.02
# During that time, the pause between two messages.
PAUSE_S: Final = 0.001


class Turns:
    """The turns of one event loop. The order is fair: streams get their turn in the order in which they ask."""

    def __init__(self) -> None:
        self._is_taken = False
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._given_way_until = 0.0

    def give_way(self) -> None:
        """This method is called when a call begins that should not wait for payload streams."""
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
        asyncio.get_running_loop().call_soon(self._end_pass)

    def _end_pass(self) -> None:
        loop = asyncio.get_running_loop()
        if loop.time() < self._given_way_until:
            loop.call_later(PAUSE_S, self._pass_on)
        else:
            self._pass_on()

    def _pass_on(self) -> None:
        """Give the turn to the stream that has waited longest."""
        while self._waiting:
            turn = self._waiting.popleft()
            # A stream that was cancelled gets no turn.
            if not turn.done():
                turn.set_result(None)
                self._begin()
                return
        self._is_taken = False
