"""Runs one HTTP call from first byte to last: limits, the body, the answer (complete or as events), clients that leave.

A stream's head goes out with its first event, or HEAD_AFTER_S after admission. An error before the head gets an HTTP
status of its own; a later error becomes an error event. After the head, keep-alives tell the client regularly that the
server is still working.

For a complete answer, this module watches the connection itself, because the work must stop when the client leaves,
even while nothing is sent.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from typing import Any, Final, Protocol

from sse_starlette import EventSourceResponse, ServerSentEvent
from sse_starlette.sse import AppStatus
from starlette.datastructures import MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.types import Message, Receive, Scope, Send

from antefix.errors import Overloaded
from antefix_router.gateway.http_errors import Provider, error_body, error_response

log = logging.getLogger("antefix.gateway")


class Call(Protocol):
    """One checked and admitted request."""

    stream: bool
    headers: dict[str, str]

    async def whole(self) -> dict[str, Any]:
        """The answer as one JSON object. After the call, `headers` also says what the cache did."""

    def events(self) -> AsyncGenerator[bytes, None]:
        """The answer as server-sent events."""

    def failed(self, err: Exception) -> bytes:
        """The last event of a stream if `events` raised an error after the head was sent."""


# Most refusals happen before this time and so get their own status. Clients wait at most a second for a head.
HEAD_AFTER_S: Final = 0.5
# Streams end by themselves or with our own error event (`antefix_router.ending`), never because sse-starlette saw a
# signal.
AppStatus.disable_automatic_graceful_drain()  # type: ignore[no-untyped-call]

Prepare = Callable[[Request], Awaitable[Call]]
Enter = Callable[[Request], contextlib.AbstractContextManager[None]]
Limits = Callable[[Request, Provider], dict[str, str]]


class Endpoint:
    """An ASGI application for one address. enter: wraps a call from its head on; raises if there is no room for the
    call. keep_alive_s: the interval between a stream's keep-alives.
    """

    def __init__(
        self,
        prepare: Prepare,
        provider: Provider,
        enter: Enter,
        *,
        keep_alive_s: float,
        limits: Limits = lambda request, provider: {},
    ) -> None:
        """limits: makes headers that show the remaining limits of the caller."""
        self._limits = limits
        self._prepare = prepare
        self._provider = provider
        self._enter = enter
        self._keep_alive_s = keep_alive_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)

        async def send_with_limits(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in self._limits(request, self._provider).items():
                    headers[name] = value
            await send(message)

        answering = asyncio.create_task(self._answer(request, scope, receive, send_with_limits))
        try:
            await asyncio.shield(answering)
        except asyncio.CancelledError:
            answering.cancel()
            await asyncio.gather(answering, return_exceptions=True)
            raise

    async def _answer(self, request: Request, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with self._enter(request):
                call = await self._prepare(request)
                if call.stream:
                    await self._send_events(call, scope, receive, send)
                else:
                    await _unless_gone(self._send_whole(call, scope, receive, send), receive)
        except ClientDisconnect:
            log.info("a client left before its whole request had arrived")
        except Exception as err:  # noqa: BLE001 - the one place where HTTP turns exceptions into answers
            if isinstance(err, Overloaded) and err.hold_s:
                await asyncio.sleep(err.hold_s)
            await error_response(err, self._provider)(scope, receive, send)

    async def _send_whole(self, call: Call, scope: Scope, receive: Receive, send: Send) -> None:
        answer = await call.whole()
        await JSONResponse(answer, headers=call.headers)(scope, receive, send)

    async def _send_events(self, call: Call, scope: Scope, receive: Receive, send: Send) -> None:
        async with contextlib.aclosing(call.events()) as events:
            first = asyncio.create_task(_first(events))
            try:
                await asyncio.wait({first}, timeout=HEAD_AFTER_S)
                if first.done():
                    first.result()
                response = EventSourceResponse(
                    _body(call, first, events),
                    headers=call.headers,
                    ping=self._keep_alive_s,
                    ping_message_factory=_PINGS[self._provider],
                    sep="\n",
                )
                await response(scope, receive, send)
            finally:
                first.cancel()
                await asyncio.gather(first, return_exceptions=True)


async def _first(events: AsyncGenerator[bytes, None]) -> bytes:
    return await anext(events)


async def _body(call: Call, first: asyncio.Task[bytes], events: AsyncGenerator[bytes, None]) -> AsyncIterator[bytes]:
    try:
        yield await first
        async for event in events:
            yield event
    except Exception as err:  # noqa: BLE001 - the status is sent already, so the error goes as an event
        yield call.failed(err)


# This may come before Anthropic's `message_start`: Anthropic's clients skip pings at any place.
_PINGS: Final = {
    Provider.OPENAI: lambda: ServerSentEvent(comment="keep-alive", sep="\n"),
    Provider.ANTHROPIC: lambda: ServerSentEvent(event="ping", data='{"type":"ping"}', sep="\n"),
}


async def _unless_gone(work: Any, receive: Receive) -> None:
    """Run `work`; cancel it when the client disconnects."""
    working = asyncio.create_task(work)
    watching = asyncio.create_task(_disconnected(receive))
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            log.info("a client left (closed its connection); its request is cancelled")
    finally:
        watching.cancel()
        if not working.done():
            working.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)
    if not working.cancelled():
        working.result()


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        continue


def event_bytes(data: Any, *, name: str = "") -> bytes:
    """One server-sent event."""
    text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return ServerSentEvent(text, event=name or None, sep="\n").encode()


def error_event(err: Exception, provider: Provider) -> bytes:
    """The error, in the form in which the provider's own streams end after a failure."""
    _, body = error_body(err, provider)
    return event_bytes(body, name="error" if provider is Provider.ANTHROPIC else "")
