"""Sends a trace's requests at their times without waiting for earlier answers, as independent clients do."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from antefix_console.endpoint.reply import Question, Reply

Ask = Callable[[Question], Awaitable[Reply]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """at_s: when to send, from the start.  question: makes the request when it is due; all texts might not fit memory.

    ideal_tokens: prompt tokens that an unlimited cache would have by then, in the trace's tokens.
    trace_tokens: prompt tokens, in the trace's tokens.
    """

    at_s: float
    question: Callable[[], Question]
    ideal_tokens: int
    trace_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Sent:
    """at_s: when it was sent, from the start. late_s: delay after its planned time. If the delay is more than some
    milliseconds, the sender was too slow.
    """

    planned: Planned
    at_s: float
    late_s: float
    reply: Reply


async def replay(
    planned: list[Planned], ask: Ask, *, concurrency_max: int, on_sent: Callable[[Sent], None] = lambda sent: None
) -> list[Sent]:
    """Send all requests, in order. A request that is due while `concurrency_max` requests run waits, and is sent
    late.
    """
    started = time.perf_counter()
    free = asyncio.Semaphore(concurrency_max)
    results: list[Sent] = []

    async def send(each: Planned) -> None:
        try:
            at_s = time.perf_counter() - started
            reply = await ask(each.question())
            results.append(Sent(planned=each, at_s=at_s, late_s=max(0.0, at_s - each.at_s), reply=reply))
            on_sent(results[-1])
        finally:
            free.release()

    async with asyncio.TaskGroup() as sending:
        for each in planned:
            await asyncio.sleep(max(0.0, each.at_s - (time.perf_counter() - started)))
            await free.acquire()
            sending.create_task(send(each))
    return sorted(results, key=lambda sent: sent.at_s)
