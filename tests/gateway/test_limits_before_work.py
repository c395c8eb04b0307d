"""A bad head is refused before the body is read. A bad body is refused before it is parsed or encoded."""

import asyncio
import hashlib
import json
import logging
import threading
from decimal import Decimal

import httpx2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from antefix.errors import InvalidRequest, Overloaded, TooManyRequests
from antefix_billing.limits import Limit, LimitWindow, TenantLimits
from antefix_billing.tenants import TenantBook
from antefix_router.encoding import Encoding
from antefix_router.gateway import bodies
from antefix_router.gateway.bodies import Room, parse_body, structure_of
from tests.gateway.scripted import Script, make_front, serving
from tests.waiting import AT_MOST_S, until

HEAD = "POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n{more}\r\n"
CHAT = "/v1/chat/completions"


async def slow(url, num, *, path=CHAT, key="", length=500):
    """`num` connections that have sent a head and one byte of a body."""
    host, port = url.removeprefix("http://").split(":")
    more = f"authorization: Bearer {key}\r\n" if key else ""
    pairs = [await asyncio.open_connection(host, int(port)) for _ in range(num)]
    for _, writer in pairs:
        writer.write(HEAD.format(path=path, length=length, more=more).encode() + b"{")
        await writer.drain()
    return pairs


def chat(text="hi", **more):
    return {"model": "antefix-tiny", "messages": [{"role": "user", "content": text}], "max_tokens": 3, **more}


def headers(key):
    return {"authorization": f"Bearer {key}"}


def tenants(**limits):
    return TenantBook(limits=limits, keys={hashlib.sha256(f"{name}-key".encode()).digest(): name for name in limits})


async def status_of(pair):
    async with asyncio.timeout(AT_MOST_S):
        return int((await pair[0].readline()).split()[1])


@pytest.mark.parametrize("path", [CHAT, "/v1/messages/count_tokens"])
async def test_slow_bodies_of_one_tenant_leave_room_for_the_others(path):
    book = tenants(greedy=TenantLimits(requests=4), modest=TenantLimits(requests=4))
    front = make_front(Script(), ledger=None, tenants=book)
    async with (
        serving(front, http_requests_max=20) as url,
        httpx2.AsyncClient(base_url=url, timeout=AT_MOST_S) as client,
    ):
        pairs = await slow(url, 40, path=path, key="greedy-key")
        refused = await asyncio.gather(*(status_of(pair) for pair in pairs[8:]))
        assert set(refused) == {429}, "as many are read as may run, twice over"
        answer = await client.post(CHAT, json=chat(), headers=headers("modest-key"))
        assert answer.status_code == 200
        for _, writer in pairs:
            writer.close()


async def test_a_tenant_without_limits_leaves_room_too():
    book = tenants(greedy=TenantLimits(), modest=TenantLimits())
    front = make_front(Script(), ledger=None, tenants=book)
    async with (
        serving(front, http_requests_max=8) as url,
        httpx2.AsyncClient(base_url=url, timeout=AT_MOST_S) as client,
    ):
        pairs = await slow(url, 12, key="greedy-key")
        assert set(await asyncio.gather(*(status_of(pair) for pair in pairs[6:]))) == {429}
        assert (await client.post(CHAT, json=chat(), headers=headers("modest-key"))).status_code == 200
        for _, writer in pairs:
            writer.close()


async def test_who_has_no_quota_left_is_told_before_the_body_comes():
    book = tenants(acme=TenantLimits(limits=(Limit(window=LimitWindow.DAY, tokens=0),)))
    front = make_front(Script(), ledger=None, tenants=book)
    async with serving(front) as url:
        (pair,) = await slow(url, 1, key="acme-key", length=30_000_000)
        assert await status_of(pair) == 429
        pair[1].close()


async def test_a_length_is_refused_by_the_head():
    async with serving(make_front(Script(), ledger=None), http_body_bytes_max=1000) as url:
        (pair,) = await slow(url, 1, length=1001)
        assert await status_of(pair) == 413
        pair[1].close()


async def test_a_prompt_that_must_be_too_long_is_not_encoded():
    front = make_front(Script(), ledger=None)
    num_max = front.identity.max_tokens
    encoded = []
    front.tokenizer.encode_plain = lambda text: encoded.append(text) or []
    front.tokenizer.encode = lambda text: []
    async with serving(front) as url, httpx2.AsyncClient(base_url=url, timeout=AT_MOST_S) as client:
        answer = await client.post(CHAT, json=chat("x" * (num_max + 1)))
        assert answer.status_code == 400 and answer.json()["error"]["code"] == "context_length_exceeded"
        assert not encoded
        answer = await client.post("/v1/completions", json={"model": "m", "prompt": "x" * (20 * num_max)})
        assert answer.status_code == 400 and answer.json()["error"]["code"] == "context_length_exceeded"


async def test_a_prompt_that_must_be_over_the_quota_is_not_encoded():
    book = tenants(acme=TenantLimits(limits=(Limit(window=LimitWindow.DAY, tokens=2000),)))
    front = make_front(Script(), ledger=None, tenants=book)
    encoded = []
    front.tokenizer.encode_plain = lambda text: encoded.append(text) or []
    async with serving(front) as url, httpx2.AsyncClient(base_url=url, timeout=AT_MOST_S) as client:
        answer = await client.post(CHAT, json=chat("x" * 2001), headers=headers("acme-key"))
        assert answer.status_code == 429 and not encoded


async def test_a_paid_answer_is_given_again_without_quota(tmp_path):
    """No quota is left for the second request, and it needs none."""
    book = tenants(acme=TenantLimits(limits=(Limit(window=LimitWindow.DAY, tokens=60),), requests=1))
    front = make_front(Script(), ledger=tmp_path / "ledger", tenants=book)
    async with serving(front) as url, httpx2.AsyncClient(base_url=url, timeout=AT_MOST_S) as client:
        named = {**headers("acme-key"), "idempotency-key": "one"}
        first = await client.post(CHAT, json=chat("x" * 10), headers=named)
        while True:
            other = await client.post(CHAT, json=chat("y" * 10), headers=headers("acme-key"))
            if other.status_code == 429:
                break
        again = await client.post(CHAT, json=chat("x" * 10), headers=named)
    assert (first.status_code, again.status_code) == (200, 200)
    assert first.json()["choices"] == again.json()["choices"]


async def test_bodies_take_so_much_memory_and_no_more():
    room = Room(100, held_bytes_max=1000)
    with room.holding("a", is_shared=True) as held:
        held.grow(700)
        with pytest.raises(Overloaded), room.holding("a", is_shared=True) as more:
            more.grow(100)
        with room.holding("b", is_shared=True) as other:
            other.grow(200)
            with pytest.raises(Overloaded):
                other.grow(200)
    assert room.held_bytes == 0 and not room._held_by_tenant


def test_places_are_counted_by_tenant_and_come_back():
    room = Room(4)
    with room.taken("a", requests=1):
        with pytest.raises(TooManyRequests), room.taken("a", requests=1):
            pass
        with room.taken("b"), room.taken("b"), room.taken("b"), pytest.raises(Overloaded), room.taken("c"):
            pass
    with room.taken("a", is_shared=True), room.taken("a", is_shared=True), room.taken("a", is_shared=True):
        with pytest.raises(Overloaded), room.taken("a", is_shared=True):
            pass
        with room.taken("b", is_shared=True):
            pass
    assert room.num_running == 0 and not room._by_tenant


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text('ab"\\,{}[]:\n\u2200é', max_size=12),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text('a"\\,{[', max_size=4), inner, max_size=4),
    max_leaves=30,
)


def count(value):
    if isinstance(value, (list, dict)):
        inner = [count(each) for each in (value.values() if isinstance(value, dict) else value)]
        return 1 + sum(each[0] for each in inner), max(0, len(value) - 1) + sum(each[1] for each in inner)
    return 0, 0


@given(json_values, st.booleans())
def test_structure_is_counted_without_parsing(value, ascii_only):
    assert structure_of(json.dumps(value, ensure_ascii=ascii_only).encode()) == count(value)


@pytest.mark.parametrize("unit", ["{}", "[]", "0", '""'], ids=["objects", "lists", "numbers", "texts"])
async def test_a_body_full_of_structure_is_refused_unparsed(unit, monkeypatch):
    monkeypatch.setattr(bodies, "_CONTAINERS_MAX", 1000)
    monkeypatch.setattr(bodies, "_VALUES_MAX", 1000)
    parsed = []
    monkeypatch.setattr(bodies, "_parse", lambda body: parsed.append(len(body)))
    body = ("[" + ",".join([unit] * 200_000) + "]").encode()
    for coded in (body, body.decode().encode("utf-16-le")):
        with pytest.raises(InvalidRequest, match="more than"):
            await parse_body(bytearray(coded), Encoding(), tenant="", num_tokens_max=100)
    assert not parsed


async def test_a_million_token_ids_and_a_long_text_are_taken():
    ids = list(range(300_000))
    body = bytearray(json.dumps({"prompt": ids}).encode())
    assert (await parse_body(body, Encoding(), tenant="", num_tokens_max=1 << 20))["prompt"] == ids
    text = 'a, "b", {c}: [d]\n' * 50_000
    body = bytearray(json.dumps({"text": text}).encode())
    assert (await parse_body(body, Encoding(), tenant="", num_tokens_max=0))["text"] == text


async def test_a_large_body_is_parsed_beside_the_loop(monkeypatch):
    parse, may_end = bodies._parse, threading.Event()

    def slow_parse(body):
        assert may_end.wait(AT_MOST_S), "the loop stands still meanwhile"
        return parse(body)

    monkeypatch.setattr(bodies, "_parse", slow_parse)
    body = bytearray(json.dumps({"text": "x" * 300_000}).encode())
    task = asyncio.create_task(parse_body(body, Encoding(), tenant="", num_tokens_max=0))
    for _ in range(20):
        await asyncio.sleep(0.001)
    assert not task.done()
    may_end.set()
    assert (await task)["text"] == "x" * 300_000


async def test_long_texts_take_turns_by_tenant():
    encoding, order, gate = Encoding(), [], asyncio.Event()
    loop = asyncio.get_running_loop()

    def work(name):
        asyncio.run_coroutine_threadsafe(gate.wait(), loop).result(AT_MOST_S)
        order.append(name)

    async def ask(tenant):
        await encoding.run(5 << 20, lambda: work(tenant), tenant=tenant)

    tasks = [asyncio.create_task(ask(tenant)) for tenant in (*["greedy"] * 6, "modest")]
    await asyncio.sleep(0.05)
    gate.set()
    await asyncio.gather(*tasks)
    assert order.index("modest") <= 1


async def test_a_client_that_leaves_in_mid_body_is_no_error(caplog):
    async with serving(make_front(Script(), ledger=None)) as url:
        with caplog.at_level(logging.INFO):
            for path in (CHAT, "/v1/messages/count_tokens"):
                for _, writer in await slow(url, 3, path=path):
                    writer.close()
            await until(lambda: caplog.text.count("left before") >= 3)
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert "Traceback" not in caplog.text


def test_a_check_before_work_agrees_with_the_reservation():
    from datetime import UTC, datetime

    from antefix.errors import QuotaExceeded
    from antefix_billing.limits import QuotaBook

    now = datetime(2026, 1, 1, tzinfo=UTC)
    book = QuotaBook({"a": TenantLimits(limits=(Limit(window=LimitWindow.DAY, tokens=100, money=Decimal(1)),))})
    book.check("a", tokens=100, now=now)
    with pytest.raises(QuotaExceeded):
        book.check("a", tokens=101, now=now)
    reserved = book.reserve("a", tokens=100, money=Decimal(1), now=now)
    with pytest.raises(QuotaExceeded):
        book.check("a", now=now)
    book.release(reserved)
    book.check("a", now=now)
    book.check("nobody", tokens=10**9, now=now)
