"""Takes turns on the event loop: one payload message per pass of it, however many streams there are.

Reading a message from the page cache and handing it to gRPC takes a few hundred microseconds, in which the loop does
nothing else. If every stream that is ready did so in the same pass, a look-up, which takes about six passes, would wait
for all of them each time. So streams queue up, and between two messages everything else that is ready gets its turn.
While a look-up is under way, the streams leave out most passes.

Measured, a look-up next to four restores, two cores that other jobs kept busy as well: 26 ms when all streams went in
each pass, 12 to 16 ms with one stream per pass, 5 ms with seven of eight passes left out (6 ms with five of six). That
takes a tenth of the restores' throughput while look-ups come in; leaving out passes all the time takes a quarter.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Final

# How long the streams stand back after a look-up began. With 5 ms, calls on a busy machine were not done in time.
GIVE_WAY_S: Final = 0.02
# Passes of the loop per message meanwhile.
PASSES_MEANWHILE: Final = 8


class Turns:
    """Of one event loop. Fair: who asks first goes first."""

    def __init__(self) -> None:
        self._is_taken = False
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._given_way_until = 0.0

    def give_way(self) -> None:
        """A call has begun that should not wait for payloads."""
        self._given_way_until = asyncio.get_running_loop().time() + GIVE_WAY_S

    async def take(self) -> None:
        """Returns when the caller may hold up the loop, once."""
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
        """Who waits longest goes in the next pass, or some passes later."""
        loop = asyncio.get_running_loop()
        if num_passes < PASSES_MEANWHILE and loop.time() < self._given_way_until:
            loop.call_soon(self._pass_on, num_passes + 1)
            return
        while self._waiting:
            turn = self._waiting.popleft()
            # One whose stream was cancelled meanwhile takes none.
            if not turn.done():
                turn.set_result(None)
                self._begin()
                return
        self._is_taken = False
