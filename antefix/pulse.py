"""Detects a peer that hangs. If a process is stopped, swapped out or behind a cut link, its connections stay open, so
gRPC reports no error. A pulse asks its peer twice per second, and notices within two seconds that the peer is silent.

    answering --no answer within limit_s--> silent --an answer--> answering

Code that waits for the peer runs inside `guard`, which ends the wait when the peer falls silent.
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
from antefix.keep_running import keep_running
from antefix.rpc import rpc_errors

log = logging.getLogger("antefix.pulse")

EVERY_S: Final = 0.5
# SILENT_S and EVERY_S together keep the longest unnoticed hang under 2 s.
SILENT_S: Final = 1.2
# On a busy machine answers are slow although no process hangs, so a peer gets this many times its usual answer time.
_RTT_FACTOR: Final = 8.0
LIMIT_S_MAX: Final = 10.0
# The fading factor of the usual answer time: about 20 further answers outweigh a slow one.
_FADE: Final = 0.9
# If this process's event loop was delayed by more than this, an answer may have arrived that it has not read yet.
_OWN_DELAY_S: Final = 0.3
# How long to wait for an unreachable peer if there is no other peer.
LAST_PATIENCE_S: Final = 10.0


class Pulse:
    """The pulse of one peer. `start` must be called once, on the event loop that waits for the peer, and `close` at the
    end. The question can also be asked elsewhere; `heard` then reports its result.

    every_s: how often the peer is asked.  rtt_s: the peer's usual answer time; 0 if it was not measured.
    num_silences: how often the peer fell silent.  num_returns: how often it began to answer, for the first time or
    again.  returned_s: when it last began to answer, by `clock`.
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
        """name: the peer's name in messages.  ask: asks the peer, and returns when it has answered. An AntefixError
        from `ask` means that the peer cannot be reached. Such an error is not silence, because gRPC reports it to all
        callers.
        """
        self.name = name
        self.rtt_s = 0.0
        self.num_silences = 0
        self.num_returns = 0
        self._ask = ask
        self.every_s = every_s
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
        """Whether the last question was answered; None: no question has been answered or timed out yet."""
        return False if self.is_silent else self._reachable

    @property
    def limit_s(self) -> float:
        """How long to wait for an answer, in seconds."""
        return min(LIMIT_S_MAX, max(self._silent_s, _RTT_FACTOR * self.rtt_s))

    def start(self) -> None:
        if self._task is None:
            # An empty context: the task serves all waiting calls, so it must not carry one call's request id.
            self._task = keep_running(self._run, "the watch", of=self.name, context=Context())

    async def close(self) -> None:
        task, self._task = self._task, None
        if task is not None:
            await end_tasks([task])
        if self.is_silent:
            # No later answer or silence would wake the tasks that wait.
            self._wake(float("inf"))

    @contextlib.contextmanager
    def guard(self, patience_s: float = 0.0) -> Iterator[None]:
        """A context in which to wait for the peer.

        patience_s: how long a silence the wait survives. If the patience is not 0, a peer that is silent already still
        gets a moment to answer, since it may just have come back.

        Raises:  Unavailable: the peer is silent, or falls silent during the wait.
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
            # As asyncio.timeout does: undo the cancellation that `_wake` requested; any other cancellation continues.
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
                self.heard(reachable=False)
            else:
                took_s = self._clock() - begun
                self.rtt_s = _FADE * self.rtt_s + (1 - _FADE) * took_s if self.rtt_s else took_s
                self.heard(reachable=True)
            await asyncio.sleep(max(0.0, self.every_s - (self._clock() - begun)))

    def heard(self, *, reachable: bool) -> None:
        """Record that the peer answered a question, or that it cannot be reached."""
        if reachable and not self.answers:
            self.num_returns += 1
            self.returned_s = self._clock()
        if self.is_silent:
            log.warning("the service %s answers again after %.1f s of silence", self.name, self._silence_s())
        self._silent_since, self._reachable = None, reachable

    def _fall_silent(self, since: float) -> None:
        if not self.is_silent:
            self._silent_since = since
            self.num_silences += 1
            log.warning("the service %s does not answer; calls for it go to other services, or fail", self.name)
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
    """The question of a pulse to an Antefix service: a health check. Any status counts as an answer, because a draining
    service is alive too.
    """
    stub = health_pb2_grpc.HealthStub(channel)

    async def ask() -> None:
        with rpc_errors():
            await stub.Check(health_pb2.HealthCheckRequest(service=""), timeout=LIMIT_S_MAX)

    return ask
