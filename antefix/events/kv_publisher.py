"""Publishes what a worker's memory holds as vLLM's KV events (`kv_events`), for any router that reads them.

Apart from this module, nothing sends token ids of prompts out of the process. The worker never waits: the changes of
one turn of the event loop become one message. A subscriber that reads too slowly loses messages, which it notices by
their numbers. The last messages are kept for replay: a request of an empty frame and a number of 8 bytes returns all
messages from that number on, each as an empty frame, topic, number and payload, and then an end marker.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import zmq
import zmq.asyncio

from antefix.block import TokenArray
from antefix.end_tasks import end_tasks
from antefix.errors import ConfigError
from antefix.events.kv_events import GPU, REPLAY_END, KvEvent, KvRemoved, KvStored, encode_batch
from antefix.events.kv_sockets import CurveDoor, CurveKey, check_endpoint, check_public_key
from antefix.keep_running import keep_running

log = logging.getLogger("antefix.events")

LOCAL: Final = "LOCAL"
# How many messages a subscriber may lag before it loses some; vLLM's value.
_BEHIND_MAX: Final = 100_000
# How many messages are kept for replay (vLLM's value), and how many bytes of them.
KEPT_BATCHES_MAX: Final = 10_000
KEPT_BYTES_MAX: Final = 64 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class KvPublisherConfig:
    """endpoint, replay: addresses to listen on.  key, clients: CURVE keys in Z85; without them, only loopback addresses
    are allowed.
    """

    endpoint: str
    replay: str = ""
    topic: str = ""
    block_size: int = 1
    key_file: str = ""
    clients: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Raises:  ConfigError: outsiders could read the messages."""
        for name, endpoint in (("kv_events", self.endpoint), ("kv_events_replay", self.replay)):
            if endpoint:
                check_endpoint(name, endpoint, is_encrypted=bool(self.key_file))
        if self.key_file and not self.clients:
            raise ConfigError(
                "the setting kv_events_key_file needs kv_events_clients, the public keys of the clients that "
                "may read the events"
            )
        for client in self.clients:
            check_public_key(client)


@dataclass(slots=True)
class KvPublisherCounters:
    """Counters since the worker started."""

    num_batches: int = 0
    num_events: int = 0
    num_replays: int = 0


class KvPublisher:
    """Publishes events. `start`, `stored` and `evicted` must be called in one running event loop."""

    def __init__(self, config: KvPublisherConfig) -> None:
        self._config = config
        self.counters = KvPublisherCounters()
        self._context = zmq.asyncio.Context()
        self._door: CurveDoor | None = None
        self._pub: Any = None
        self._replay: Any = None
        self._open: list[KvEvent] = []
        self._kept: deque[tuple[int, bytes]] = deque()
        self._kept_bytes = 0
        self._number = 0
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def endpoint(self) -> str:
        """The address that the publisher listens on, with the actual port."""
        return str(self._pub.getsockopt_string(zmq.LAST_ENDPOINT))

    @property
    def replay_endpoint(self) -> str:
        return "" if self._replay is None else str(self._replay.getsockopt_string(zmq.LAST_ENDPOINT))

    def start(self) -> None:
        """Start to listen.  Raises:  ConfigError: the address or the key cannot be used."""
        config = self._config
        if config.key_file:
            key = CurveKey.from_file(config.key_file)
            log.info("KV events are encrypted; a reader needs this public key: %s", key.public.decode())
            self._door = CurveDoor(self._context, key, tuple(check_public_key(each) for each in config.clients))
            self._door.start()
        self._pub = self._listen(zmq.PUB, config.endpoint, "kv_events", _BEHIND_MAX)
        if config.replay:
            # An unbounded queue: it never holds more than the messages kept for replay.
            self._replay = self._listen(zmq.ROUTER, config.replay, "kv_events_replay", 0)
            self._tasks.append(keep_running(self._answer, "the replay of KV events"))
        log.info("KV events, which contain token ids, are published on %s", self.endpoint)

    async def close(self) -> None:
        self._send()
        await end_tasks(self._tasks)
        for socket in (self._pub, self._replay):
            if socket is not None:
                socket.close(linger=0)
        if self._door is not None:
            self._door.stop()
        self._context.term()

    def stored(self, name: bytes, *, parent: bytes | None, tokens: TokenArray, salt: str = "") -> None:
        """Publish that a block was stored in memory.  parent: the block before it; None: it is the first.

        salt: names the cache's owner, in vLLM's field `cache_salt`, so that blocks of different tenants are never
        confused.
        """
        self._tell(
            KvStored(
                block_hashes=[name],
                parent_block_hash=parent,
                token_ids=np.asarray(tokens).tolist(),
                block_size=self._config.block_size,
                lora_id=None,
                medium=GPU,
                lora_name=None,
                extra_keys=[[salt]] if salt and parent is None else None,
                locality=LOCAL,
                cache_salt=salt or None,
            )
        )

    def evicted(self, name: bytes) -> None:
        self._tell(KvRemoved(block_hashes=[name], medium=GPU, locality=LOCAL))

    def _listen(self, kind: int, endpoint: str, setting: str, behind_max: int) -> Any:
        socket = self._context.socket(kind) if kind == zmq.ROUTER else zmq.Socket(zmq.Context(self._context), kind)
        socket.set_hwm(behind_max)
        if self._door is not None:
            self._door.guard(socket)
        try:
            socket.bind(endpoint)
        except zmq.ZMQError as err:
            raise ConfigError(f"{setting} {endpoint}: {err}") from err
        return socket

    def _tell(self, event: KvEvent) -> None:
        if not self._open:
            asyncio.get_running_loop().call_soon(self._send)
        self._open.append(event)

    def _send(self) -> None:
        events, self._open = _merged(self._open), []
        if not events or self._pub.closed:
            return
        payload = encode_batch(events, ts=time.time())
        self._pub.send_multipart([self._config.topic.encode(), self._number.to_bytes(8, "big"), payload])
        self._keep(payload)
        self.counters.num_batches += 1
        self.counters.num_events += len(events)

    def _keep(self, payload: bytes) -> None:
        self._kept.append((self._number, payload))
        self._kept_bytes += len(payload)
        self._number += 1
        while len(self._kept) > KEPT_BATCHES_MAX or self._kept_bytes > KEPT_BYTES_MAX:
            self._kept_bytes -= len(self._kept.popleft()[1])

    async def _answer(self) -> None:
        """Answer replay requests."""
        topic = self._config.topic.encode()
        while True:
            frames = await self._replay.recv_multipart()
            if len(frames) != 3 or len(frames[2]) != 8:
                continue
            client, first = frames[0], int.from_bytes(frames[2], "big")
            self.counters.num_replays += 1
            for number, payload in list(self._kept):
                if number >= first:
                    await self._replay.send_multipart([client, b"", topic, number.to_bytes(8, "big"), payload])
            await self._replay.send_multipart([client, b"", b"", REPLAY_END, b""])


def _merged(events: Sequence[KvEvent]) -> list[KvEvent]:
    """The events with consecutive blocks merged, as engines send them: the same meaning in a tenth of the bytes."""
    merged: list[KvEvent] = []
    for event in events:
        last = merged[-1] if merged else None
        if isinstance(event, KvStored) and isinstance(last, KvStored) and event.parent_block_hash is not None:
            if event.parent_block_hash == last.block_hashes[-1] and event.cache_salt == last.cache_salt:
                last.block_hashes += event.block_hashes
                last.token_ids += event.token_ids
                if last.extra_keys is not None:
                    last.extra_keys.append(None)
                continue
        elif isinstance(event, KvRemoved) and isinstance(last, KvRemoved):
            last.block_hashes += event.block_hashes
            continue
        merged.append(event)
    return merged
