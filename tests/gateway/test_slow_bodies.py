"""A client that sends a body too slowly gets an answer and is closed, which makes room for others."""

from __future__ import annotations

import asyncio
import json

import httpx
import pytest

from tests.gateway.scripted import Script, make_front, serving
from tests.waiting import AT_MOST_S

pytestmark = pytest.mark.slow

BODY = {"model": "antefix-tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 5}


async def _begin(url, address):
    """A connection that has sent the head of a request and one byte of its body."""
    host, port = url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    head = f"POST {address} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 500\r\n\r\n{{"
    writer.write(head.encode())
    await writer.drain()
    return reader, writer


@pytest.mark.parametrize(
    ("address", "kind"), [("/v1/chat/completions", "request_timeout"), ("/v1/messages", "timeout_error")]
)
async def test_a_slow_body_is_a_408_in_the_apis_shape_and_frees_its_slot(tmp_path, address, kind):
    front = make_front(Script(), ledger=tmp_path / "ledger")
    async with (
        serving(front, http_requests_max=1, http_body_timeout_s=0.3) as url,
        httpx.AsyncClient(base_url=url, timeout=AT_MOST_S) as client,
        asyncio.timeout(AT_MOST_S),
    ):
        reader, writer = await _begin(url, address)
        answer = (await reader.read()).decode()  # to the end: the connection is closed as well
        head, _, body = answer.partition("\r\n\r\n")
        assert head.startswith("HTTP/1.1 408") and "connection: close" in head
        error = json.loads(body)["error"]
        assert kind in (error.get("code"), error["type"]) and "0.3 s" in error["message"]
        writer.close()
        assert (await client.post(address, json=BODY)).status_code == 200
