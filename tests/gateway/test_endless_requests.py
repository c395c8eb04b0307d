"""Requests that never end, or try to leave HTTP: a clear answer or a closed connection, before any work."""

from __future__ import annotations

import asyncio
import contextlib
import itertools

import pytest

from antefix_router.gateway import app
from tests.gateway.scripted import Script, make_front, serving
from tests.gateway.test_connections import asked, opened
from tests.waiting import AT_MOST_S, until

pytestmark = pytest.mark.slow

HEAD = "POST {} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n{}\r\n"
PATHS = ["/v1/chat/completions", "/v1/messages", "/v1/completions"]
BYTES_MAX = 20_000
# Ten times what a client may send in a head before it is refused.
ENDLESS = 1 << 20


@contextlib.asynccontextmanager
async def door(monkeypatch, **settings):
    """A door, and a function that says whether it holds no connection and runs no task of one."""
    made, real, script = [], app.Connections, Script()
    monkeypatch.setattr(app, "Connections", lambda **options: made.append(real(**options)) or made[-1])
    async with serving(make_front(script, ledger=None), **settings) as url, asyncio.timeout(AT_MOST_S):
        before = asyncio.all_tasks()
        yield url, lambda: not len(made[0]) and not asyncio.all_tasks() - before


async def answer_to(url, pieces, every_s=0.0):
    """Send pieces until the door has answered or closed. Returns the answer and the number of bytes that were sent."""
    ((reader, writer),) = await opened(url, 1)
    answer = bytearray()

    async def read():
        with contextlib.suppress(ConnectionError):
            while piece := await reader.read(1000):
                answer.extend(piece)

    reading, num_bytes = asyncio.create_task(read()), 0
    with contextlib.suppress(ConnectionError):
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            num_bytes += len(piece)
            await asyncio.sleep(every_s)
            if reading.done():
                break
    await reading
    writer.close()
    return answer.decode(), num_bytes


def chunks(size):
    while True:
        yield b"%x\r\n%b\r\n" % (size, b" " * size)


@pytest.mark.parametrize("path", PATHS)
async def test_a_chunked_body_without_end_is_refused_at_the_limit(monkeypatch, path):
    async with door(monkeypatch, http_body_bytes_max=BYTES_MAX, http_head_timeout_s=0.5) as (url, is_free):
        head = HEAD.format(path, "transfer-encoding: chunked\r\n").encode()
        answer, _ = await answer_to(url, itertools.chain([head], chunks(1000)), 0.001)
        assert answer.startswith("HTTP/1.1 413") and f"{BYTES_MAX}" in answer.replace(",", "")
        await until(is_free)
        assert await asked(url) == 200


@pytest.mark.parametrize("path", PATHS)
async def test_a_chunked_body_that_trickles_is_cut_off_in_time(monkeypatch, path):
    async with door(monkeypatch, http_body_timeout_s=0.3) as (url, is_free):
        head = HEAD.format(path, "transfer-encoding: chunked\r\n").encode()
        answer, num_bytes = await answer_to(url, itertools.chain([head], chunks(1)), 0.02)
        assert answer.startswith("HTTP/1.1 408") and num_bytes < 10_000
        await until(is_free)
        assert await asked(url) == 200


@pytest.mark.parametrize("line", [b"x: %b" % (b"y" * 1000), b"y" * 1000], ids=["one header", "no end of a line"])
@pytest.mark.parametrize("begins", [b"GET /v1/models HTTP/1.1\r\n", b""])
async def test_a_head_without_end_is_refused(monkeypatch, begins, line):
    async with door(monkeypatch) as (url, is_free):
        many = itertools.repeat(line + (b"\r\n" if b":" in line else b""), ENDLESS // 1000)
        answer, num_bytes = await answer_to(url, itertools.chain([begins], many), 0.001)
        assert answer == "" or answer.startswith(("HTTP/1.1 400", "HTTP/1.1 431"))
        assert num_bytes < ENDLESS // 2
        await until(is_free)
        assert await asked(url) == 200


UPGRADE = (
    "upgrade: websocket\r\nconnection: Upgrade\r\nsec-websocket-version: 13\r\n"
    "sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/models", "/livez", "/nowhere", "/"])
async def test_a_websocket_is_not_opened_and_its_frames_are_refused(monkeypatch, path):
    async with door(monkeypatch, http_head_timeout_s=0.5) as (url, is_free):
        head = f"GET {path} HTTP/1.1\r\nhost: x\r\n{UPGRADE}\r\n".encode()
        # A client that takes the connection for a websocket sends frames.
        frames = itertools.repeat(b"\x81\x85\x00\x00\x00\x00hello", 500)
        answer, num_bytes = await answer_to(url, itertools.chain([head], frames), 0.02)
        assert not answer.startswith("HTTP/1.1 101") and answer.startswith("HTTP/1.1 ")
        assert num_bytes < 3000
        await until(is_free)
        assert await asked(url) == 200


async def test_an_upgrade_to_http2_is_not_made(monkeypatch):
    async with door(monkeypatch, http_head_timeout_s=0.5) as (url, is_free):
        preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
        asks = HEAD.format("/v1/models", "connection: upgrade\r\nupgrade: h2c\r\ncontent-length: 0\r\n").encode()
        for sent in ([preface], [asks, preface]):
            answer, _ = await answer_to(url, sent)
            assert "101" not in answer[:20] and "HTTP/2" not in answer
            await until(is_free)
        assert await asked(url) == 200


async def test_a_connection_is_kept_after_a_body_that_ended_behind_its_answer(monkeypatch):
    async with door(monkeypatch, http_body_bytes_max=BYTES_MAX, http_head_timeout_s=0.3) as (url, _):
        ((reader, writer),) = await opened(url, 1)
        size = BYTES_MAX + 100
        writer.write(HEAD.format(PATHS[0], f"content-length: {size}\r\n").encode() + b" " * 50)
        head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), AT_MOST_S)
        assert head.startswith(b"HTTP/1.1 413")
        await reader.readexactly(int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0]))
        writer.write(b" " * (size - 50))
        await writer.drain()
        await asyncio.sleep(0.6)
        writer.write(b"GET /livez HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        assert (await asyncio.wait_for(reader.readline(), AT_MOST_S)).startswith(b"HTTP/1.1 200")
        writer.close()
