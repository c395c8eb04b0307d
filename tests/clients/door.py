"""The real gateway over a scripted model, with a record of each request and its answer."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

from antefix_billing.ledger_files import read_settled
from antefix_router.gateway import app
from tests.clients.scripted_model import CachingScript, answer
from tests.gateway.scripted import make_front, serving


@dataclass(slots=True)
class Exchange:
    """One request and the head of its answer."""

    method: str
    path: str
    headers: dict[str, str]
    body: Any
    status: int = 0
    answered: dict[str, str] = field(default_factory=dict)
    answer: bytes = b""


@dataclass(slots=True)
class Door:
    """A gateway that is listening.  url: its address.  exchanges: all requests so far, the oldest first."""

    url: str
    script: CachingScript
    ledger: Path
    exchanges: list[Exchange]

    def generation_of(self, exchange: Exchange) -> Any:
        """The generation that the workers ran for this request."""
        named = exchange.answered.get("request-id") or exchange.answered["x-request-id"]
        return next(each for each in self.script.generations if each.request.request_id == named)

    def hit_of(self, exchange: Exchange) -> int:
        return self.generation_of(exchange).restore.hit_tokens

    def turns(self) -> list[Exchange]:
        """The requests with tools. They are the conversation itself, without requests for titles and the like."""
        return [each for each in self.exchanges if isinstance(each.body, dict) and each.body.get("tools")]

    def records(self) -> list[Any]:
        return [item.record for item in read_settled(self.ledger)]


class _Recorder:
    """ASGI middleware around the gateway's application that records requests and answers."""

    def __init__(self, inner: Any, exchanges: list[Exchange]) -> None:
        self._inner, self._exchanges = inner, exchanges

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            await self._inner(scope, receive, send)
            return
        headers = {name.decode(): value.decode() for name, value in scope["headers"]}
        query = scope["query_string"].decode()
        exchange = Exchange(scope["method"], scope["path"] + ("?" + query if query else ""), headers, None)
        self._exchanges.append(exchange)
        raw = bytearray()

        async def receiving():
            message = await receive()
            if message["type"] == "http.request":
                raw.extend(message.get("body", b""))
                if not message.get("more_body"):
                    with contextlib.suppress(ValueError):
                        exchange.body = json.loads(raw)
            return message

        async def sending(message):
            if message["type"] == "http.response.start":
                exchange.status = message["status"]
                exchange.answered = {name.decode(): value.decode() for name, value in message["headers"]}
            else:
                exchange.answer += message.get("body", b"")
            await send(message)

        await self._inner(scope, receiving, sending)


@contextlib.asynccontextmanager
async def open_door(ledger: Path, **settings: Any) -> AsyncIterator[Door]:
    exchanges: list[Exchange] = []
    build = app.build_app
    script = CachingScript(say=answer)
    settings = {"chat_format": "deepseek-v4", "http_max_tokens": 4096, **settings}
    with mock.patch.object(app, "build_app", lambda *given: _Recorder(build(*given), exchanges)):
        async with serving(make_front(script, ledger=ledger), **settings) as url:
            yield Door(url, script, ledger, exchanges)
            await asyncio.sleep(0)
