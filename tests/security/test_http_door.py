"""The HTTP API over raw sockets: no request smuggling, only named proxies are trusted, and no web page may call it."""

import asyncio
import json
import logging
from decimal import Decimal

import httpx2
import pytest
from starlette.datastructures import Headers

from antefix.errors import ConfigError
from antefix_billing.limits import Limit, LimitWindow, TenantLimits
from antefix_billing.tenants import TenantBook
from antefix_router.gateway.app import start_http
from antefix_router.gateway.gateway_config import GatewayConfig
from antefix_router.gateway.trusted_proxies import TrustedProxies
from tests.billing.test_accounting import DEPLOY, load_cards
from tests.gateway.scripted import Script, make_front, serving
from tests.on_demand import anthropic, openai
from tests.waiting import AT_MOST_S, until

pytestmark = pytest.mark.slow

BODY = json.dumps({"model": "m", "prompt": "first", "max_tokens": 2}).encode()
SMUGGLED = json.dumps({"model": "m", "prompt": "smuggled", "max_tokens": 2}).encode()


def request(body=SMUGGLED, *, path=b"/v1/completions", headers=b""):
    return (
        b"POST " + path + b" HTTP/1.1\r\nHost: door\r\nContent-Type: application/json\r\n"
        + headers + b"Content-Length: %d\r\n\r\n" % len(body) + body
    )  # fmt: skip


def head(*lines):
    return b"\r\n".join((b"POST /v1/completions HTTP/1.1", b"Host: door", *lines, b"", b""))


def chunked(*chunks):
    return b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks) + b"0\r\n\r\n"


LENGTH = b"Content-Length: %d" % len(BODY)
CHUNKS = b"Transfer-Encoding: chunked"
HIDDEN = request()
# Bytes that one reader could take as one request, and another reader as two.
AMBIGUOUS = {
    "two lengths, the first counts": head(LENGTH, b"Content-Length: 0") + BODY + HIDDEN,
    "two lengths, the second counts": head(b"Content-Length: 0", LENGTH) + BODY + HIDDEN,
    "the same length twice": head(LENGTH, LENGTH) + BODY + HIDDEN,
    "two lengths in one header": head(LENGTH + b", %d" % len(BODY)) + BODY + HIDDEN,
    "two lengths in one header that differ": head(LENGTH + b", 0") + BODY + HIDDEN,
    "length and chunks": head(LENGTH, CHUNKS) + chunked(BODY) + HIDDEN,
    "chunks and length": head(CHUNKS, LENGTH) + chunked(BODY) + HIDDEN,
    "chunks and length zero": head(CHUNKS, b"Content-Length: 0") + chunked(BODY) + HIDDEN,
    "chunks twice": head(CHUNKS, CHUNKS) + chunked(BODY) + HIDDEN,
    "chunks and identity": head(b"Transfer-Encoding: chunked, identity") + chunked(BODY) + HIDDEN,
    "identity and a length": head(b"Transfer-Encoding: identity", LENGTH) + BODY + HIDDEN,
    "xchunked": head(b"Transfer-Encoding: xchunked", LENGTH) + BODY + HIDDEN,
    "chunked, quoted": head(b'Transfer-Encoding: "chunked"', LENGTH) + BODY + HIDDEN,
    "chunked with a vertical tab": head(b"Transfer-Encoding: \x0bchunked", LENGTH) + BODY + HIDDEN,
    "chunks in HTTP/1.0": head(CHUNKS).replace(b"1.1", b"1.0") + chunked(BODY) + HIDDEN,
    "a folded header": head(LENGTH, b"X-A: b\r\n c") + BODY + HIDDEN,
    "a folded length": head(b"Content-Length:\r\n %d" % len(BODY)) + BODY + HIDDEN,
    "folded chunks": head(b"Transfer-Encoding:\r\n chunked", LENGTH) + BODY + HIDDEN,
    "folded with a tab": head(LENGTH, b"X-A: b\r\n\tTransfer-Encoding: chunked") + BODY + HIDDEN,
    "space before the colon of the length": head(b"Content-Length : %d" % len(BODY)) + BODY + HIDDEN,
    "space before the colon of chunks": head(b"Transfer-Encoding : chunked", LENGTH) + BODY + HIDDEN,
    "tab before a colon": head(b"Transfer-Encoding\t: chunked", LENGTH) + BODY + HIDDEN,
    "space before a name": head(LENGTH, b" Transfer-Encoding: chunked") + BODY + HIDDEN,
    "a line without a colon": head(LENGTH, b"Transfer-Encoding chunked") + BODY + HIDDEN,
    "bare LF in the head": head(LENGTH, b"X-A: b\nTransfer-Encoding: chunked") + BODY + HIDDEN,
    "bare LF after the request line": head(LENGTH).replace(b"\r\n", b"\n", 1) + BODY + HIDDEN,
    "bare LF at the head's end": head(LENGTH)[:-2] + b"\n" + BODY + HIDDEN,
    "LF alone everywhere": head(LENGTH).replace(b"\r\n", b"\n") + BODY + HIDDEN,
    "bare CR in the head": head(LENGTH, b"X-A: b\rTransfer-Encoding: chunked") + BODY + HIDDEN,
    "NUL in a header": head(LENGTH, b"X-A: b\0c") + BODY + HIDDEN,
    "NUL in a name": head(LENGTH, b"Transfer-\0Encoding: chunked") + BODY + HIDDEN,
    "a length with a sign": head(b"Content-Length: +%d" % len(BODY)) + BODY + HIDDEN,
    "a negative length": head(b"Content-Length: -1") + BODY + HIDDEN,
    "a length in hex": head(b"Content-Length: 0x%x" % len(BODY)) + BODY + HIDDEN,
    "a length with an underscore": head(b"Content-Length: 1_0") + BODY + HIDDEN,
    "an empty length": head(b"Content-Length:") + BODY + HIDDEN,
    "a length of 30 digits": head(b"Content-Length: " + b"0" * 28 + b"%d" % len(BODY)) + BODY + HIDDEN,
    "chunk extension": head(CHUNKS) + b"%x;a=b\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY) + HIDDEN,
    "chunk extension with LF": head(CHUNKS) + b"%x;a\n\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY) + HIDDEN,
    "chunk extension at the end": head(CHUNKS) + b"%x\r\n%b\r\n0;a\r\n\r\n" % (len(BODY), BODY) + HIDDEN,
    "chunk size with a space": head(CHUNKS) + b"%x \r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY) + HIDDEN,
    "chunk size with 0x": head(CHUNKS) + b"0x%x\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY) + HIDDEN,
    "chunk size with a sign": head(CHUNKS) + b"+%x\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY) + HIDDEN,
    "chunk size of 20 digits": head(CHUNKS) + b"%020x\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY) + HIDDEN,
    "chunk size that overflows": head(CHUNKS) + b"f" * 16 + b"\r\n" + BODY + HIDDEN,
    "chunk size ended by LF": head(CHUNKS) + b"%x\n%b\r\n0\r\n\r\n" % (len(BODY), BODY) + HIDDEN,
    "chunk ended by LF": head(CHUNKS) + b"%x\r\n%b\n0\r\n\r\n" % (len(BODY), BODY) + HIDDEN,
    "chunk longer than it says": head(CHUNKS) + b"%x\r\n%bXX\r\n0\r\n\r\n" % (len(BODY), BODY) + HIDDEN,
    "lengths in the trailer": head(CHUNKS) + b"%x\r\n%b\r\n0\r\n%b\r\n%b\r\n\r\n" % (len(BODY), BODY, LENGTH, LENGTH) + HIDDEN,  # noqa: E501
    "bare LF in the trailer": head(CHUNKS) + b"%x\r\n%b\r\n0\r\nX: y\n\r\n" % (len(BODY), BODY) + HIDDEN,
    "no host": b"POST /v1/completions HTTP/1.1\r\n" + LENGTH + b"\r\n\r\n" + BODY + HIDDEN,
    "two hosts": head(LENGTH, b"Host: other") + BODY + HIDDEN,
}  # fmt: skip


@pytest.fixture
async def door():
    script = Script()
    front = make_front(script, ledger=None)
    async with serving(front) as url:
        yield int(url.rpartition(":")[2]), script


async def send(port, *pieces, wait_s=0.0):
    """Send the pieces. Returns all bytes until the server closes, which must happen within a minute."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(wait_s)
        return await asyncio.wait_for(reader.read(), AT_MOST_S)
    except ConnectionResetError:
        return b""
    finally:
        writer.close()


def statuses(answer):
    return [int(part[:3]) for part in answer.split(b"HTTP/1.1 ")[1:]]


async def all_refused(port, script, sendings):
    """Send all of these. Returns the names of those that were not refused."""

    async def is_refused(pieces):
        answer = await send(port, *pieces)
        return statuses(answer) in ([400], []) and (b"connection: close" in answer.lower() or not answer)

    good = await asyncio.gather(*(is_refused(pieces) for pieces in sendings.values()))
    assert not script.requests
    return [name for name, is_good in zip(sendings, good, strict=True) if not is_good]


async def test_what_could_be_cut_in_two_ways_ends_the_connection_and_nothing_behind_it_is_read(door):
    assert await all_refused(*door, {name: [raw] for name, raw in AMBIGUOUS.items()}) == []


async def test_nor_where_it_comes_in_pieces(door):
    sendings = {}
    for name, raw in AMBIGUOUS.items():
        line = raw.index(b"\n") + 1
        sendings[name] = [*(bytes([byte]) for byte in raw[:line]), raw[line:-30], raw[-30:]]
    assert await all_refused(*door, sendings) == []


async def test_it_is_counted():
    front = make_front(Script(), ledger=None)
    http = await start_http(front, GatewayConfig(http_address="127.0.0.1:0"))
    for raw in list(AMBIGUOUS.values())[:3]:
        await send(int(http.address.rpartition(":")[2]), raw)
    (shown,) = [each for each in http.metrics() if each.name == "antefix_http_malformed_requests"]
    assert shown.samples[0].value == 3
    await http.stop()
    await front.close()


GOOD = {
    "a length": request(BODY),
    "chunks": head(CHUNKS) + chunked(BODY),
    "many chunks": head(CHUNKS) + chunked(*(BODY[at : at + 1] for at in range(len(BODY)))),
    "chunks in capitals": head(b"TRANSFER-ENCODING: Chunked") + chunked(BODY),
    "a trailer": head(CHUNKS) + b"%x\r\n%b\r\n0\r\nX-Checksum: 1\r\n\r\n" % (len(BODY), BODY),
}


@pytest.mark.parametrize("raw", GOOD.values(), ids=GOOD.keys())
@pytest.mark.parametrize("pieces", [1, 7])
async def test_right_requests_are_each_read_once_on_one_connection(raw, pieces, door):
    port, script = door
    last = request(SMUGGLED, headers=b"Connection: close\r\n")
    both = raw + last
    size = -(-len(both) // pieces)
    answer = await send(port, *(both[at : at + size] for at in range(0, len(both), size)), wait_s=0.01)
    assert statuses(answer) == [200, 200]
    assert len(script.requests) == 2


async def test_the_body_of_a_request_that_is_refused_early_is_no_request(door):
    """The answer comes before the body. The body is discarded, and a request inside it is never served."""
    port, script = door
    wrong = request(HIDDEN, path=b"/v1/nothing") + request(BODY, headers=b"Connection: close\r\n")
    assert statuses(await send(port, wrong)) == [404, 200]
    assert len(script.requests) == 1


async def test_no_variable_of_the_environment_changes_what_is_believed(monkeypatch):
    monkeypatch.setenv("FORWARDED_ALLOW_IPS", "*")
    assert await seen_client({"x-forwarded-for": "6.6.6.6"}) == "127.0.0.1"


# The client's address.


async def seen_client(headers, **settings):
    """The client's address in the access log."""
    records = []
    handler = logging.Handler()
    handler.emit = records.append
    logger = logging.getLogger("antefix.access")
    logger.addHandler(handler)
    before = logger.level
    logger.setLevel(logging.INFO)
    try:
        front = make_front(Script(), ledger=None)
        async with serving(front, **settings) as url, httpx2.AsyncClient(base_url=url, timeout=AT_MOST_S) as client:
            assert (await client.get("/healthz", headers=headers)).status_code == 200
        await until(lambda: records)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)
    return records[-1].client


SPOOFS = {
    "x-forwarded-for": "6.6.6.6",
    "forwarded": "for=6.6.6.6",
    "x-real-ip": "6.6.6.6",
    "true-client-ip": "6.6.6.6",
    "x-forwarded-proto": "https",
}


async def test_headers_of_a_proxy_that_was_not_named_say_nothing():
    assert await seen_client(SPOOFS) == "127.0.0.1"
    assert await seen_client(SPOOFS, http_trusted_proxies=("10.0.0.0/8",), http_client_header="x-forwarded-for") == (
        "127.0.0.1"
    )


async def test_the_header_that_is_named_counts_from_the_proxy_that_is_named():
    trusted = {"http_trusted_proxies": ("127.0.0.1",), "http_client_header": "x-forwarded-for"}
    assert await seen_client({"x-forwarded-for": "9.9.9.9"}, **trusted) == "9.9.9.9"
    assert await seen_client({"forwarded": "for=9.9.9.9", "x-real-ip": "9.9.9.9"}, **trusted) == "127.0.0.1"
    # The client itself wrote the first address.
    assert await seen_client({"x-forwarded-for": "6.6.6.6, 9.9.9.9"}, **trusted) == "9.9.9.9"


@pytest.mark.parametrize(
    ("header", "values", "expected"),
    [
        ("x-forwarded-for", ["6.6.6.6, 9.9.9.9, 10.0.0.2"], "9.9.9.9"),
        ("x-forwarded-for", ["6.6.6.6", "9.9.9.9"], "9.9.9.9"),
        ("x-forwarded-for", ["10.0.0.3, 10.0.0.2"], "10.0.0.3"),
        ("x-forwarded-for", ["9.9.9.9:4711"], "9.9.9.9"),
        ("x-forwarded-for", ["[2001:db8::1]:4711"], "2001:db8::1"),
        ("x-forwarded-for", ["6.6.6.6, unknown"], "10.0.0.1"),
        ("x-forwarded-for", ["6.6.6.6, unknown, 10.0.0.2"], "10.0.0.2"),
        ("x-forwarded-for", [""], "10.0.0.1"),
        ("x-forwarded-for", [], "10.0.0.1"),
        ("x-forwarded-for", ["6.6.6.6\x1b[2J"], "10.0.0.1"),
        ("forwarded", ['for=6.6.6.6, for="[2001:db8::1]:1";proto=https;by=10.0.0.2'], "2001:db8::1"),
        ("forwarded", ["proto=https"], "10.0.0.1"),
        ("forwarded", ["for=_hidden"], "10.0.0.1"),
        ("x-real-ip", ["9.9.9.9"], "9.9.9.9"),
    ],
)
def test_the_last_address_that_is_no_proxys_is_the_clients(header, values, expected):
    proxies = TrustedProxies(("10.0.0.0/8",), header)
    raw = [(header.encode(), value.encode()) for value in values]
    assert proxies.client("10.0.0.1", Headers(raw=raw)) == expected
    assert proxies.client("::ffff:10.0.0.1", Headers(raw=raw)) in (expected, "::ffff:10.0.0.1")
    for stranger in ("9.9.9.9", "", "::1"):
        assert proxies.client(stranger, Headers(raw=raw)) == stranger


@pytest.mark.parametrize(
    "settings",
    [
        {"http_trusted_proxies": ("127.0.0.1",)},
        {"http_client_header": "x-forwarded-for"},
        {"http_trusted_proxies": ("*",), "http_client_header": "x-forwarded-for"},
        {"http_trusted_proxies": ("10.0.0.1/8",), "http_client_header": "x-forwarded-for"},
        {"http_trusted_proxies": ("10.0.0.0/8",), "http_client_header": "x forwarded"},
        {"http_cors_origins": ("example.com",)},
        {"http_cors_origins": ("https://example.com/path",)},
        {"http_cors_origins": ("null",)},
    ],
)
def test_a_setting_that_says_half_of_it_is_refused(settings):
    with pytest.raises(ConfigError):
        GatewayConfig(**settings)


# Requests of web pages.

PREFLIGHT = {
    "origin": "https://evil.example",
    "access-control-request-method": "POST",
    "access-control-request-headers": "authorization,content-type",
}


async def test_no_page_may_call_unless_it_is_named():
    front = make_front(Script(), ledger=None)
    async with serving(front) as url, httpx2.AsyncClient(base_url=url, timeout=AT_MOST_S) as client:
        for answer in (
            await client.options("/v1/chat/completions", headers=PREFLIGHT),
            await client.get("/healthz", headers={"origin": "https://evil.example"}),
            await client.post("/v1/completions", content=BODY, headers={"origin": "https://evil.example"}),
        ):
            assert not [name for name in answer.headers if name.startswith("access-control")]


async def test_a_page_that_is_named_may_and_another_may_not():
    front = make_front(Script(), ledger=None)
    mine = "https://app.example"
    async with (
        serving(front, http_cors_origins=(mine,)) as url,
        httpx2.AsyncClient(base_url=url, timeout=AT_MOST_S) as client,
    ):
        allowed = await client.options("/v1/chat/completions", headers={**PREFLIGHT, "origin": mine})
        assert allowed.headers["access-control-allow-origin"] == mine
        assert "access-control-allow-credentials" not in allowed.headers
        called = await client.post("/v1/completions", content=BODY, headers={"origin": mine})
        assert (called.status_code, called.headers["access-control-allow-origin"]) == (200, mine)
        for answer in (
            await client.options("/v1/chat/completions", headers=PREFLIGHT),
            await client.get("/healthz", headers={"origin": "https://evil.example"}),
        ):
            assert "access-control-allow-origin" not in answer.headers


# Refusals with status 429.


def limited(**limits):
    return TenantBook(default=TenantLimits(**limits))


RATE = limited(limits=(Limit(window=LimitWindow.MINUTE, tokens=10),))
MONEY = limited(limits=(Limit(window=LimitWindow.DAY, money=Decimal("0.000001")),))
CONCURRENCY = limited(requests=1)
ASK = [{"role": "user", "content": "hello"}]


async def refusals(tenants, *, busy=False, **settings):
    """Refusals as OpenAI's and Anthropic's own clients see them: errors, bodies, headers."""
    script = Script(hold=asyncio.Event() if busy else None)
    front = make_front(script, ledger=None, tenants=tenants, cards=load_cards([DEPLOY / "example.toml"]))
    async with serving(front, **settings) as url:
        ask_openai = openai.AsyncOpenAI(base_url=url + "/v1", api_key="k", max_retries=0).chat.completions.create
        ask_anthropic = anthropic.AsyncAnthropic(base_url=url, api_key="k", max_retries=0).messages.create
        held = asyncio.create_task(ask_openai(model="m", messages=ASK, max_tokens=5)) if busy else None
        if busy:
            await until(lambda: script.requests)
        with pytest.raises(openai.RateLimitError) as one:
            await ask_openai(model="m", messages=ASK, max_tokens=50)
        with pytest.raises(anthropic.RateLimitError) as other:
            await ask_anthropic(model="m", messages=ASK, max_tokens=50)
        if held is not None:
            script.hold.set()
            await held
    return one.value, other.value


async def test_429_says_whether_rate_concurrency_money_or_the_server_is_at_its_end():
    cases = {
        "rate": (await refusals(RATE), "tokens", "rate_limit_exceeded", "rate limit: 10 tokens per minute", 60),
        "concurrency": (
            await refusals(CONCURRENCY, busy=True),
            *("requests", "concurrency_limit_exceeded", "concurrency limit: 1 requests", 1),
        ),
        "money": (
            await refusals(MONEY),
            "insufficient_quota",
            "insufficient_quota",
            "budget of 0.000001 per day",
            86400,
        ),
        "server": (
            await refusals(limited(), busy=True, http_requests_max=1),
            *("rate_limit_error", "server_overloaded", "running already", 1),
        ),
    }
    for name, ((one, other), kind, code, words, wait_s_max) in cases.items():
        assert (one.status_code, one.type, one.code) == (429, kind, code), name
        assert other.body["error"]["type"] == "rate_limit_error"
        assert other.body["error"]["code"] == code
        for err in (one, other):
            assert words in str(err)
            assert 1 <= int(err.response.headers["retry-after"]) <= wait_s_max
            # A tenant without money gains nothing by a retry. Both clients obey this header.
            assert err.response.headers.get("x-should-retry") == ("false" if name == "money" else None)
    assert len({case[2] for case in cases.values()}) == 4
