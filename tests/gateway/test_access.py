"""Each HTTP answer has an id, and each request a log line with what the cache did, but never the request's text."""

import asyncio
import io
import json
import logging

import pytest

from antefix.errors import Overloaded
from antefix.telemetry.logs import set_up_logs
from antefix_router.gateway.access import id_of
from tests.gateway.scripted import Script, make_front, serving
from tests.waiting import AT_MOST_S, until

pytestmark = pytest.mark.slow

httpx2 = pytest.importorskip("httpx2")

CANARY = "canary-9f3b"
TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
BODIES = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": CANARY * 20}], "max_tokens": 50},
    "/v1/completions": {"prompt": CANARY * 20, "max_tokens": 50},
    "/v1/responses": {"input": CANARY * 20, "max_output_tokens": 50},
    "/v1/messages": {"messages": [{"role": "user", "content": CANARY * 20}], "max_tokens": 50},
}


@pytest.fixture
def logged():
    """All log lines, from level debug up, as JSON."""
    out, root = io.StringIO(), logging.getLogger()
    handlers, level = root.handlers[:], root.level
    set_up_logs("debug", "json", out)
    yield out.getvalue
    set_up_logs()
    root.handlers[:] = handlers
    root.setLevel(level)


def access_lines(text):
    lines = [json.loads(line) for line in text.splitlines()]
    return [line for line in lines if line["logger"] == "antefix.access"]


@pytest.mark.parametrize("path", BODIES)
async def test_whole_answers_say_what_the_cache_did(path):
    async with (
        serving(make_front(Script(hit=64), ledger=None)) as url,
        httpx2.AsyncClient(base_url=url, timeout=AT_MOST_S) as client,
    ):
        answer = await client.post(path, json={"model": "antefix-tiny", **BODIES[path]})
        assert answer.status_code == 200, answer.text
        assert answer.headers["antefix-hit-tokens"] == "64" and answer.headers["antefix-tier"] == "store"
        assert answer.headers["antefix-plan"] == "checkpoint" and answer.headers["antefix-miss-reason"] == "none"
        assert "antefix" not in answer.json()["usage"]
        wanted = {"antefix-usage-details": "true"}
        answer = await client.post(path, json={"model": "antefix-tiny", **BODIES[path]}, headers=wanted)
        details = answer.json()["usage"]["antefix"]
        assert (details["plan"], details["hit_tokens"], details["hit_store_tokens"]) == ("checkpoint", 64, 64)


@pytest.mark.parametrize("path", BODIES)
async def test_a_streams_last_usage_says_it_where_the_client_wants_it(path):
    body = {"model": "antefix-tiny", "stream": True, **BODIES[path]}
    if path in ("/v1/chat/completions", "/v1/completions"):
        body["stream_options"] = {"include_usage": True}
    async with (
        serving(make_front(Script(hit=64), ledger=None)) as url,
        httpx2.AsyncClient(base_url=url, timeout=AT_MOST_S) as client,
    ):
        plain = await client.post(path, json=body)
        asked = await client.post(path, json=body, headers={"antefix-usage-details": "true"})
        assert '"hit_store_tokens":64' in asked.text and '"antefix":' not in plain.text
        assert plain.headers["x-request-id"] != asked.headers["x-request-id"]


async def test_the_setting_gives_usage_details_to_all_callers():
    front = make_front(Script(), ledger=None)
    async with (
        serving(front, http_usage_details=True) as url,
        httpx2.AsyncClient(base_url=url, timeout=AT_MOST_S) as client,
    ):
        answer = await client.post("/v1/completions", json={"model": "m", "prompt": "a", "max_tokens": 5})
        assert answer.json()["usage"]["antefix"]["plan"] == "cold"


@pytest.mark.parametrize(
    ("call", "status"),
    [
        (("GET", "/nothing/there"), 404),
        (("PUT", "/v1/completions"), 405),
        (("POST", "/v1/completions", b"not json"), 400),
        (("POST", "/v1/messages", b'{"messages": 1}'), 400),
        (("POST", "/v1/completions", json.dumps({"model": "m", "prompt": "a", "max_tokens": 5}).encode()), 429),
        (("POST", "/v1/messages/count_tokens", b"{}"), 400),
        (("GET", "/v1/models"), 200),
        (("GET", "/healthz"), 200),
    ],
)
async def test_every_answer_has_an_id_errors_included(call, status):
    method, path, *body = call
    front = make_front(Script(error=Overloaded("full")), ledger=None)
    async with serving(front) as url, httpx2.AsyncClient(base_url=url, timeout=AT_MOST_S) as client:
        answer = await client.request(method, path, content=body[0] if body else None)
        assert answer.status_code == status and len(answer.headers["x-request-id"]) >= 16


async def test_a_refused_request_has_its_clients_key_as_id(tmp_path):
    front = make_front(Script(error=Overloaded("full")), ledger=tmp_path / "ledger")
    async with serving(front) as url, httpx2.AsyncClient(base_url=url, timeout=AT_MOST_S) as client:
        body = {"model": "m", "prompt": "a", "max_tokens": 5}
        answer = await client.post("/v1/completions", json=body, headers={"idempotency-key": "mine"})
        assert answer.status_code == 429 and answer.headers["x-request-id"] == "mine"


def test_a_key_that_is_too_long_is_no_id():
    class Headers(dict):
        pass

    assert id_of(Headers({"idempotency-key": "k" * 300})) != "k" * 300


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", BODIES)
async def test_no_line_holds_a_prompt_or_an_answer(path, stream, logged):
    secret = "the-answer-is-7c1d"
    script = Script(say=lambda prompt: secret)
    async with (
        serving(make_front(script, ledger=None)) as url,
        httpx2.AsyncClient(base_url=url, timeout=AT_MOST_S) as client,
    ):
        body = {"model": "antefix-tiny", "stream": stream, CANARY: CANARY, **BODIES[path]}
        good = await client.post(path, json=body, headers={"traceparent": TRACE})
        assert secret in good.text or stream
        broken = {**body, "max_tokens": CANARY}
        await client.post(path, json=broken)
        await client.post(path, content=CANARY)
        script.error, script.fail_after = RuntimeError("ours"), 2
        await client.post(path, json=body)
    text = logged()
    # The log names an ignored field but not its value. Here the client has put the same text into both.
    names = [line for line in text.splitlines() if "ignored and counted" in line]
    assert all(CANARY not in line or line in names for line in text.splitlines()) and secret not in text
    lines = access_lines(text)
    (line,) = [line for line in lines if line["request_id"] == good.headers["x-request-id"]]
    assert len(lines) == 4 and line["status"] == 200 and line["trace_id"] == TRACE[3:35]


async def test_an_address_is_written_encoded_and_cut(logged):
    async with (
        serving(make_front(Script(), ledger=None)) as url,
        httpx2.AsyncClient(base_url=url, timeout=AT_MOST_S) as client,
    ):
        await client.get("/v1/models/" + "%0aforged%20line" + "x" * 5000)
    (line,) = access_lines(logged())
    assert "%0Aforged%20line" in line["message"] and len(line["message"]) < 300


async def test_a_client_that_leaves_has_a_line_too(logged):
    script = Script(hold=asyncio.Event())
    async with serving(make_front(script, ledger=None)) as url:
        async with httpx2.AsyncClient(base_url=url, timeout=AT_MOST_S) as client:
            body = {"model": "m", "prompt": "a", "max_tokens": 5}
            asked = asyncio.create_task(client.post("/v1/completions", json=body))
            await until(lambda: script.requests)
            asked.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asked
        await until(lambda: access_lines(logged()))
    assert access_lines(logged())[0]["status"] == 499


async def test_the_ids_of_a_request_are_on_the_lines_that_it_causes(logged):
    script = Script(error=RuntimeError("ours"))
    async with (
        serving(make_front(script, ledger=None)) as url,
        httpx2.AsyncClient(base_url=url, timeout=AT_MOST_S) as client,
    ):
        answer = await client.post("/v1/completions", json={"model": "m", "prompt": "a", "max_tokens": 5})
    lines = [json.loads(line) for line in logged().splitlines()]
    (ours,) = [line for line in lines if line["message"].startswith("internal error")]
    assert ours["request_id"] == answer.headers["x-request-id"]
