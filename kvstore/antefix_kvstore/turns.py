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

Streams also have slots: only some of them send at a time, and the others wait in a queue. If all send, the messages on
their way to many clients do not fit the processor's cache together. A stream that does not keep up, because its client,
the network or the disk is slow, loses its slot and needs none any more, so that it keeps nobody waiting.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Final

from antefix.host_limits import usable_cores

# How long the streams give way after a lookup began. With 5 ms, lookups on a busy machine did not finish in time.
GIVE_WAY_S: Final = 0.02
# During that time, the pause between two messages.
PAUSE_S: Final = 0.001


# How many streams have a slot: a restore keeps one core busy here, and one at its client.
NUM_SLOTS: Final = max(1, usable_cores() // 2)
# How many messages of 1 MiB a stream may send before it queues again, if others wait. With 4, 8 and 16, eight restores
# took 0.98, 0.82 and 0.73 of the processor time per byte that they take without slots (load 25).
SLOT_MESSAGES: Final = 16
# A stream that does not ask for its next turn within this time does not keep up.
PATIENCE_S: Final = 0.02


class Turns:
    """The turns of one event loop. The order is fair: streams get their slot, and their turn, in the order in which
    they ask.
    """

    def __init__(self) -> None:
        self._is_taken = False
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._given_way_until = 0.0
        # The streams that have a slot, with the number of messages that each may still send, and those that need none.
        self._left: dict[object, int] = {}
        self._slow: set[object] = set()
        self._queue: deque[tuple[object, asyncio.Future[None]]] = deque()
        self._patience: dict[object, asyncio.TimerHandle] = {}

    def give_way(self) -> None:
        """This method is called when a call begins that should not wait for payload streams."""
        self._given_way_until = asyncio.get_running_loop().time() + GIVE_WAY_S

    async def take(self, stream: object) -> None:
        """Wait for the turn of `stream` to send one message. The stream must call `leave` when it ends."""
        if stream not in self._slow:
            await self._take_slot(stream)
        await self._take_turn()
        if stream in self._left:
            loop = asyncio.get_running_loop()
            self._patience[stream] = loop.call_later(PATIENCE_S, self._lose_slot, stream)

    def leave(self, stream: object) -> None:
        """The stream has ended, and gives its slot to the stream that has waited longest."""
        self._slow.discard(stream)
        if timer := self._patience.pop(stream, None):
            timer.cancel()
        self._left.pop(stream, None)
        self._pass_slots_on()

    async def _take_slot(self, stream: object) -> None:
        if timer := self._patience.pop(stream, None):
            timer.cancel()
        if self._left.get(stream) == 0:
            del self._left[stream]
            self._pass_slots_on()
        if stream not in self._left:
            place = asyncio.get_running_loop().create_future()
            self._queue.append((stream, place))
            self._pass_slots_on()
            await place
        self._left[stream] -= 1

    def _pass_slots_on(self) -> None:
        while self._queue and len(self._left) < NUM_SLOTS:
            stream, place = self._queue.popleft()
            # A stream that was cancelled gets no slot.
            if not place.done():
                self._left[stream] = SLOT_MESSAGES
                place.set_result(None)

    def _lose_slot(self, stream: object) -> None:
        del self._patience[stream]
        self._slow.add(stream)
        del self._left[stream]
        self._pass_slots_on()

    async def _take_turn(self) -> None:
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
