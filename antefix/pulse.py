"""Whether a peer gives signs of life. A process that hangs (stopped, swapped out, behind a cut link) closes no
connection, so gRPC reports nothing; a peer that is asked twice a second and stays silent is found out within two.

    answers --limit_s without one--> silent --an answer--> answers

Waiting for such a peer happens inside `guard`, which ends the wait when the peer falls silent.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Awaitable, Callable, Iterator
from contextvars import Context
from typing import Final

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from antefix.end_tasks import end_tasks
from antefix.errors import AntefixError, DeadlineExceeded, Unavailable
from antefix.rpc import rpc_errors

log = logging.getLogger("antefix.pulse")

EVERY_S: Final = 0.5
# With EVERY_S the longest that a hang goes unnoticed stays under 2 s.
SILENT_S: Final = 1.2
# On a busy machine answers are slow and nobody hangs: so many times the usual time to answer is waited for.
_RTT_FACTOR: Final = 8.0
LIMIT_S_MAX: Final = 10.0
# The usual time to answer: a slow answer is forgotten within some 20 others.
_FADE: Final = 0.9
# Our own loop was held up by this much: what it took for silence may be an answer that it has not read yet.
_OWN_DELAY_S: Final = 0.3
# How long an unreachable peer is waited for where there is no other one.
LAST_PATIENCE_S: Final = 10.0


class Pulse:
    """One peer's. `start` once, on the event loop that waits for the peer; `close` at the end.

    rtt_s: the usual time to answer.  num_silences: times that it fell silent.  num_returns: times that it began to
    answer, for the first time or again.  returned_s: when it last did, by `clock`.
    """

    def __init__(
        self,
        name: str,
        ask: Callable[[], Awaitable[None]],
        *,
        every_s: float = EVERY_S,
        silent_s: float = SILENT_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """name: of the peer, for messages.  ask: returns when it answered.  Raises of `ask`:  AntefixError: it cannot
        be reached, which its callers are told by gRPC; that is no silence."""
        self.name = name
        self.rtt_s = 0.0
        self.num_silences = 0
        self.num_returns = 0
        self._ask = ask
        self._every_s = every_s
        self._silent_s = silent_s
        self._clock = clock
        self.returned_s = -math.inf
        self._silent_since: float | None = None
        self._reachable: bool | None = None
        self._waiting: dict[asyncio.Task[object], float] = {}
        self._woken: set[asyncio.Task[object]] = set()
        self._task: asyncio.Task[None] | None = None

    @property
    def is_silent(self) -> bool:
        return self._silent_since is not None

    @property
    def answers(self) -> bool | None:
        """Whether the last question was answered; None before the first one was decided."""
        return False if self.is_silent else self._reachable

    @property
    def limit_s(self) -> float:
        """An answer that takes longer is none."""
        return min(LIMIT_S_MAX, max(self._silent_s, _RTT_FACTOR * self.rtt_s))

    def start(self) -> None:
        if self._task is None:
            # For all who wait, so under none of their ids.
            self._task = asyncio.create_task(self._run(), context=Context())

    async def close(self) -> None:
        task, self._task = self._task, None
        if task is not None:
            await end_tasks([task])
        if self.is_silent:
            # Nobody would tell them any more.
            self._wake(float("inf"))

    @contextlib.contextmanager
    def guard(self, patience_s: float = 0.0) -> Iterator[None]:
        """Wait for the peer in here.  patience_s: a silence as long as this is borne, and some of it in any case: it
        may have come back this moment.

        Raises:  Unavailable: it is silent, or falls silent meanwhile.
        """
        if patience_s:
            patience_s = max(patience_s, self._silence_s() + self._silent_s)
        elif self.is_silent:
            raise self._error()
        task = asyncio.current_task()
        assert task is not None
        self._waiting[task] = patience_s
        try:
            yield
        except asyncio.CancelledError:
            # As asyncio.timeout does: our own cancellation is taken back; another one continues.
            if task in self._woken and task.uncancel() == 0:
                raise self._error() from None
            raise
        finally:
            self._waiting.pop(task, None)
            self._woken.discard(task)

    async def _run(self) -> None:
        while True:
            begun = self._clock()
            limit_s = self.limit_s
            try:
                async with asyncio.timeout(limit_s):
                    await self._ask()
            except (TimeoutError, DeadlineExceeded):
                if self._clock() - begun <= limit_s + _OWN_DELAY_S:
                    self._fall_silent(begun)
            except AntefixError:
                self._heard(reachable=False)
            else:
                took_s = self._clock() - begun
                self.rtt_s = _FADE * self.rtt_s + (1 - _FADE) * took_s if self.rtt_s else took_s
                self._heard(reachable=True)
            await asyncio.sleep(max(0.0, self._every_s - (self._clock() - begun)))

    def _heard(self, *, reachable: bool) -> None:
        if reachable and not self.answers:
            self.num_returns += 1
            self.returned_s = self._clock()
        if self.is_silent:
            log.warning("%s answers again after %.1f s", self.name, self._silence_s())
        self._silent_since, self._reachable = None, reachable

    def _fall_silent(self, since: float) -> None:
        if not self.is_silent:
            self._silent_since = since
            self.num_silences += 1
            log.warning("%s does not answer; calls go elsewhere, or end", self.name)
        self._wake(self._silence_s())

    def _wake(self, silence_s: float) -> None:
        for task, patience_s in list(self._waiting.items()):
            if silence_s > patience_s and task not in self._woken:
                self._woken.add(task)
                task.cancel()

    def _silence_s(self) -> float:
        return 0.0 if self._silent_since is None else max(0.0, self._clock() - self._silent_since)

    def _error(self) -> Unavailable:
        return Unavailable(f"{self.name} does not answer")


def health_question(channel: grpc.aio.Channel) -> Callable[[], Awaitable[None]]:
    """What a pulse asks of a service of ours. Whether it says that it serves is not looked at: a draining one lives."""
    stub = health_pb2_grpc.HealthStub(channel)

    async def ask() -> None:
        with rpc_errors():
            await stub.Check(health_pb2.HealthCheckRequest(service=""), timeout=LIMIT_S_MAX)

    return ask
