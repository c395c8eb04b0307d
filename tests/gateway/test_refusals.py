"""Under overload a refusal costs only the reading of a head and a short answer."""

import asyncio
import json
import sys
import time

import pytest

from antefix.errors import Overloaded
from antefix_router.gateway import bodies
from tests.gateway.scripted import Script, make_front, serving
from tests.waiting import AT_MOST_S

# The limit on calls of Python functions per refused request, in the server and this file's client. About 620 are
# measured, most of them in h11 and the server's framework. Parsing, encoding or admitting a request adds hundreds.
CALLS_MAX = 1300


class Door:
    """A front that a test can tell to refuse requests.

    num_parsed, num_admitted: requests that were parsed, admitted.
    """

    def __init__(self, monkeypatch):
        self.front = make_front(Script(), ledger=None)
        self.refuses = True
        self.num_parsed = self.num_admitted = 0
        parse, admit = bodies._parse, self.front.accounts.admit

        def counted_parse(body):
            self.num_parsed += 1
            return parse(body)

        async def counted_admit(*args, **more):
            self.num_admitted += 1
            return await admit(*args, **more)

        def check(tenant):
            if self.refuses:
                raise Overloaded("the first token would take 3 s, more than 2 s", retry_after_s=1.4)

        monkeypatch.setattr(bodies, "_parse", counted_parse)
        monkeypatch.setattr(self.front.accounts, "admit", counted_admit)
        monkeypatch.setattr(self.front.shedding, "_check", check)


class Client:
    """A client with one connection."""

    def __init__(self, reader, writer):
        self._reader, self._writer = reader, writer

    @classmethod
    async def of(cls, url):
        host, port = url.removeprefix("http://").split(":")
        return cls(*await asyncio.open_connection(host, int(port)))

    async def ask(self, text="hi"):
        """Send a request. Returns status and headers; raises if the connection was closed."""
        body = json.dumps({"model": "antefix-tiny", "prompt": text, "max_tokens": 2}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n"
        self._writer.write(head.encode() + body)
        async with asyncio.timeout(AT_MOST_S):
            answer = (await self._reader.readuntil(b"\r\n\r\n")).decode().lower()
            headers = dict(line.split(": ", 1) for line in answer.split("\r\n")[1:] if line)
            await self._reader.readexactly(int(headers["content-length"]))
        return int(answer.split()[1]), headers

    def close(self):
        self._writer.close()


@pytest.mark.parametrize("text", ["hi", "x" * 300_000], ids=["short", "long"])
async def test_a_refused_request_keeps_its_connection_and_nothing_of_it_is_read(monkeypatch, text):
    door = Door(monkeypatch)
    async with serving(door.front) as url:
        client = await Client.of(url)
        for _ in range(5):
            status, headers = await client.ask(text)
            assert (status, headers["retry-after"], headers.get("connection")) == (429, "1", None)
        assert (door.num_parsed, door.num_admitted) == (0, 0)
        door.refuses = False
        assert (await client.ask())[0] == 200
        assert (door.num_parsed, door.num_admitted) == (1, 1)
        client.close()


async def test_a_refusal_of_a_client_that_asks_again_at_once_is_held_back(monkeypatch):
    front = make_front(Script(), ledger=None)
    asked = []

    def check(tenant):
        asked.append(time.monotonic())
        refusal = Overloaded("the first token would take 3 s, more than 2 s", retry_after_s=1.4)
        refusal.hold_s = 0.25 * (len(asked) > 1)
        raise refusal

    monkeypatch.setattr(front.shedding, "_check", check)
    async with serving(front) as url:
        client = await Client.of(url)
        for _ in range(3):
            assert (await client.ask())[0] == 429
        client.close()
    assert asked[2] - asked[1] >= 0.25


async def test_the_work_of_a_refusal_is_bounded(monkeypatch):
    door = Door(monkeypatch)
    async with serving(door.front) as url:
        client = await Client.of(url)
        await client.ask()
        calls = 0

        def count(frame, event, arg):
            nonlocal calls
            calls += event == "call"

        sys.setprofile(count)
        try:
            for _ in range(10):
                await client.ask()
        finally:
            sys.setprofile(None)
        client.close()
    assert 0 < calls / 10 < CALLS_MAX, calls / 10
