"""The benchmarks' cheap client returns the server's status, over connections that stay open."""

import asyncio

import pytest

from benchmarks.load_client import LoadClient
from tests.gateway.scripted import Script, make_front, serving


async def test_it_tells_statuses_and_keeps_connections():
    front = make_front(Script(), ledger=None)
    async with serving(front) as url:
        host, _, port = url.removeprefix("http://").rpartition(":")
        client = LoadClient(host, int(port))
        body = {"model": "antefix-tiny", "prompt": "hello", "max_tokens": 2}
        assert [await client.post("/v1/completions", body, {}) for _ in range(3)] == [200] * 3
        assert len(client._idle) == 1
        assert await client.post("/v1/completions", {"prompt": 1.5}, {}) == 400
        assert await client.post("/nothing", body, {}) == 404
        client.close()


async def test_a_connection_that_was_closed_meanwhile_is_opened_again_and_no_answer_is_an_error():
    async def once(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 429 Too Many\r\ncontent-length: 0\r\n\r\n")
        await asyncio.sleep(0)
        writer.close()

    server = await asyncio.start_server(once, "127.0.0.1", 0)
    client = LoadClient("127.0.0.1", server.sockets[0].getsockname()[1])
    assert [await client.post("/", {}, {}) for _ in range(2)] == [429, 429]
    server.close()
    client._idle.clear()
    with pytest.raises(OSError):
        await client.post("/", {}, {})
