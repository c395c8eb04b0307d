"""A proxy in front of an S3 server that damages some of the answers. A seed decides which."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

HARMS = ("delay", "truncate", "reset", "500", "503", "slow-down", "flip")
_SLOW_DOWN = b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>Reduce your request rate.</Message></Error>"


@dataclass
class Harm:
    """share: of requests whose answers are damaged.  kinds: of damage to draw from.  done: the count of each kind."""

    share: float = 0.0
    kinds: Sequence[str] = HARMS
    seed: int = 0
    delay_s: float = 0.3
    done: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)

    def next(self) -> str:
        if self._random.random() >= self.share:
            return ""
        kind = self._random.choice(list(self.kinds))
        self.done[kind] += 1
        return kind

    def place(self, count: int) -> int:
        return self._random.randrange(count)


@asynccontextmanager
async def faulty_proxy(
    server_url: str, harm: Harm, *, rewrite: Callable[[bytes], bytes] = lambda request: request
) -> AsyncIterator[str]:
    """The proxy's URL. A connection carries one request, so that each fault affects one request.

    rewrite: changes each request on its way to the server.
    """
    host, _, port = server_url.removeprefix("http://").partition(":")

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError, asyncio.IncompleteReadError, OSError):
            request = rewrite(await _message(reader))
            await _answer(request, writer)
        writer.close()

    async def _answer(request: bytes, writer: asyncio.StreamWriter) -> None:
        kind = harm.next()
        if kind == "reset":
            writer.transport.abort()
            return
        if kind == "delay":
            await asyncio.sleep(harm.delay_s)
        if kind in ("500", "503", "slow-down"):
            status = b"500 Internal Server Error" if kind == "500" else b"503 Service Unavailable"
            body = _SLOW_DOWN if kind == "slow-down" else b""
            length = str(len(body)).encode()
            writer.write(
                b"HTTP/1.1 " + status + b"\r\nContent-Length: " + length + b"\r\nConnection: close\r\n\r\n" + body
            )
            await writer.drain()
            return
        answer = await _ask(host, int(port), request)
        head, body = answer.split(b"\r\n\r\n", 1) if b"\r\n\r\n" in answer else (answer, b"")
        is_data = b"octet-stream" in head and len(body) > 1
        if kind == "truncate" and body:
            body = body[: harm.place(len(body))]
        if kind == "flip" and is_data:
            at = harm.place(len(body))
            body = body[:at] + bytes([body[at] ^ 0x10]) + body[at + 1 :]
        writer.write(head + b"\r\n\r\n" + body)
        await writer.drain()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, limit=1 << 24)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


async def _message(reader: asyncio.StreamReader) -> bytes:
    """A request with its body, without headers that would keep the connection open."""
    head = await reader.readuntil(b"\r\n\r\n")
    lines = head[:-4].split(b"\r\n")
    kept = [line for line in lines if not line.lower().startswith(b"connection:")]
    length = next((int(line.split(b":")[1]) for line in lines if line.lower().startswith(b"content-length:")), 0)
    body = await reader.readexactly(length)
    return b"\r\n".join([*kept, b"Connection: close"]) + b"\r\n\r\n" + body


async def _ask(host: str, port: int, request: bytes) -> bytes:
    reader, writer = await asyncio.open_connection(host, port)
    try:
        writer.write(request)
        await writer.drain()
        return await reader.read()
    finally:
        writer.close()
