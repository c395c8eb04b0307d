"""Follows one engine's KV events (`kv_events`) in order. The subscriber requests a replay of missed messages, and
clears its index if that fails.

Failures, and how they are handled:
    a gap in the numbers        the missing messages are requested from the replay address; without one, or if the
                                engine no longer has them, the index is cleared and restarts with the replayed messages
    the engine restarts         its numbers begin again with other content: the index is cleared
    the last messages are lost  no gap shows it, so a quiet engine is asked now and then whether it has sent more
    the connection breaks       the index counts as uncertain until the engine confirms the last known message
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from typing import Any, Final, Protocol

import zmq
import zmq.asyncio
from zmq.utils.monitor import recv_monitor_message

from antefix.errors import InvalidRequest
from antefix.events.kv_events import REPLAY_END, KvBatch, decode_batch

log = logging.getLogger("antefix.events")

_RETRY_S: Final = 1.0
# vLLM's publisher checks for replay requests every tenth of a second, between two messages.
_REPLY_TIMEOUT_S: Final = 5.0
# How often a quiet engine is asked whether its last message is the last known one.
_QUIET_S: Final = 5.0
_KNOWN_DIGESTS: Final = 1_024
# The payload of an engine's step has some 100 KB, so a payload above this limit is not a batch of events.
_MESSAGE_BYTES_MAX: Final = 64 << 20


class KvIndex(Protocol):
    """The interface of an index of the engine's cache."""

    def apply(self, batch: KvBatch) -> None: ...

    def forget(self) -> None:
        """Clear the index of the engine's cache, because its contents may be wrong."""

    def confirm(self) -> None:
        """Record that the index has all events that the engine has sent."""

    def doubt(self) -> None:
        """Record that changes of the engine's cache may have been missed."""


@dataclass(slots=True)
class KvFollowCounters:
    """Counters of one engine. num_lives: how many starts of the engine were noticed. num_forgotten: how often the index
    was cleared.
    """

    num_batches: int = 0
    num_events: int = 0
    num_unread: int = 0
    num_gaps: int = 0
    num_replays: int = 0
    num_lives: int = 0
    num_forgotten: int = 0


class _Broken(Exception):
    """The replay of missed messages stopped before its end."""


class KvSubscriber:
    """Follows the KV events of one engine. endpoint: the address where the engine publishes. replay: the address for
    missed messages; empty if there is none.

    guard: sets up encryption on a socket before it connects.
    """

    def __init__(
        self,
        endpoint: str,
        index: KvIndex,
        context: zmq.asyncio.Context,
        *,
        replay: str = "",
        topic: str = "",
        guard: Callable[[Any], None] = lambda socket: None,
        quiet_s: float = _QUIET_S,
    ) -> None:
        self.endpoint = endpoint
        self.counters = KvFollowCounters()
        self.in_step = False
        self._index = index
        self._context = context
        self._replay = replay
        self._topic = topic.encode()
        self._guard = guard
        self._quiet_s = quiet_s
        # The number of the next expected message; None: no message has been received yet.
        self._next: int | None = None
        # Digests of the last messages, by number. They show whether the engine has restarted.
        self._digests: dict[int, bytes] = {}

    async def run(self) -> None:
        """Follow until cancelled."""
        while True:
            try:
                await self._follow()
            except (zmq.ZMQError, OSError) as err:
                log.warning("KV events of %s: %s", self.endpoint, err)
            except Exception:
                # A bug here must not silently stop following this engine, so it is logged and the index restarts empty.
                log.exception("KV events of %s could not be processed", self.endpoint)
                self._forget()
            self._lose()
            await asyncio.sleep(_RETRY_S)

    def forget(self) -> None:
        """Clear the index of the engine's cache, because the engine is gone. The engine's next message starts a new
        index.
        """
        self._forget()
        self._lose()

    async def _follow(self) -> None:
        socket = self._socket(zmq.SUB)
        monitor = socket.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED)
        poller = zmq.asyncio.Poller()
        for each in (socket, monitor):
            poller.register(each, zmq.POLLIN)
        try:
            socket.subscribe(self._topic)
            socket.connect(self.endpoint)
            while True:
                ready = dict(await poller.poll(round(1000 * self._quiet_s)))
                if monitor in ready:
                    await self._noticed(await recv_monitor_message(monitor))
                if socket in ready:
                    await self._message(await socket.recv_multipart())
                elif not ready and self.in_step and self._replay:
                    await self._catch_up()
        finally:
            socket.disable_monitor()
            for each in (monitor, socket):
                each.close(linger=0)

    def _socket(self, kind: int) -> Any:
        socket = self._context.socket(kind)
        socket.set_hwm(0)
        socket.setsockopt(zmq.MAXMSGSIZE, _MESSAGE_BYTES_MAX)
        self._guard(socket)
        return socket

    async def _noticed(self, event: dict[str, Any]) -> None:
        if event["event"] == zmq.EVENT_DISCONNECTED:
            self._lose()
        else:
            await self._catch_up()

    async def _message(self, frames: list[bytes]) -> None:
        if len(frames) != 3 or len(frames[1]) != 8:
            self.counters.num_unread += 1
            return
        number, payload = int.from_bytes(frames[1], "big"), frames[2]
        if not self.in_step or (self._next is None and number):
            await self._catch_up()
            if not self.in_step:
                self._forget()
        if self._next is not None and number < self._next:
            if self._digests.get(number) == _digest(payload):
                return  # the replay delivered this message already
            self._begin_life()
            await self._catch_up()
        elif self._next is not None and number > self._next:
            self.counters.num_gaps += 1
            await self._catch_up()
        await self._take_in_turn(number, payload)
        self._stand()

    async def _catch_up(self) -> None:
        """Request the engine's messages after the last known message again. Clear the index if the engine no longer has
        the last known message.
        """
        try:
            if not self._replay:
                if self._next is not None:
                    self._forget()
            elif not self._next:
                await self._take_all()
            elif not await self._continue(self._next - 1):
                self._begin_life()
                await self._take_all()
        except _Broken:
            log.warning("the engine at %s did not send its earlier KV events again", self.endpoint)
            self._lose()
        else:
            self._stand()

    async def _continue(self, last: int) -> bool:
        """Continue after message `last`. Returns False if the engine has another message of that number, or no longer
        has one.
        """
        is_known = False
        async with contextlib.aclosing(self._replayed(last)) as messages:
            async for number, payload in messages:
                if not is_known and (number, _digest(payload)) != (last, self._digests.get(last)):
                    return False
                is_known = True
                await self._take_in_turn(number, payload)
        return is_known

    async def _take_all(self) -> None:
        async with contextlib.aclosing(self._replayed(0)) as messages:
            async for number, payload in messages:
                await self._take_in_turn(number, payload)

    async def _take_in_turn(self, number: int, payload: bytes) -> None:
        if self._next is not None and number < self._next:
            return
        if self._next is not None and number > self._next:
            # A publisher drops messages when its queue is full, in replays too.
            self.counters.num_gaps += 1
            self._forget()
        self._take(number, payload)
        await asyncio.sleep(0)

    async def _replayed(self, first: int) -> AsyncGenerator[tuple[int, bytes], None]:
        """Messages from number `first` on, as far as the engine has them.

        Raises:  _Broken: the engine stopped answering, or closed the connection.
        """
        self.counters.num_replays += 1
        socket = self._socket(zmq.DEALER)
        monitor = socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        poller = zmq.asyncio.Poller()
        for each in (socket, monitor):
            poller.register(each, zmq.POLLIN)
        try:
            socket.connect(self._replay)
            await socket.send_multipart([b"", first.to_bytes(8, "big")])
            while True:
                if socket not in dict(await poller.poll(round(1000 * _REPLY_TIMEOUT_S))):
                    raise _Broken
                frames = await socket.recv_multipart()
                if len(frames) < 3 or frames[-2] == REPLAY_END:
                    return
                yield int.from_bytes(frames[-2], "big"), frames[-1]
        finally:
            socket.disable_monitor()
            for each in (monitor, socket):
                each.close(linger=0)

    def _take(self, number: int, payload: bytes) -> None:
        self._next = number + 1
        self._digests[number] = _digest(payload)
        while len(self._digests) > _KNOWN_DIGESTS:
            del self._digests[next(iter(self._digests))]
        try:
            batch = decode_batch(payload)
        except InvalidRequest as err:
            log.warning(
                "KV events of the engine at %s, message number %d, were not used: %s", self.endpoint, number, err
            )
            self.counters.num_unread += 1
            # The lost message may have reported removed blocks.
            self._index.forget()
            self.counters.num_forgotten += 1
            return
        self.counters.num_batches += 1
        self.counters.num_events += len(batch.events)
        self.counters.num_unread += batch.num_unread
        self._index.apply(batch)

    def _stand(self) -> None:
        self.in_step = True
        self._index.confirm()

    def _lose(self) -> None:
        self.in_step = False
        self._index.doubt()

    def _begin_life(self) -> None:
        self.counters.num_lives += 1
        log.info("the engine at %s restarted, or some of its events were lost", self.endpoint)
        self._forget()

    def _forget(self) -> None:
        self.counters.num_forgotten += 1
        self._next = None
        self._digests.clear()
        self._index.forget()


def _digest(payload: bytes) -> bytes:
    return hashlib.blake2b(payload, digest_size=16).digest()
