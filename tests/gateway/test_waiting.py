"""While its prompt is computed, a stream's client gets a head, signs of life, and errors in its API's shape."""

import asyncio
import contextlib
import json
from types import SimpleNamespace

import pytest

from antefix.errors import Overloaded, Unavailable
from antefix_router.gateway import http
from tests.gateway.scripted import Script, make_front, serving
from tests.gateway.test_retries import BODIES, MODEL, TEXT, text_of
from tests.on_demand import anthropic, openai
from tests.waiting import AT_MOST_S, until

pytestmark = pytest.mark.slow

httpx2 = pytest.importorskip("httpx2")

ASK = [{"role": "user", "content": "a"}]


@contextlib.asynccontextmanager
async def door(script, **settings):
    async with (
        serving(make_front(script, ledger=None), http_keep_alive_s=0.05, **settings) as url,
        httpx2.AsyncClient(base_url=url, timeout=AT_MOST_S) as client,
    ):
        yield client


def stream(client, path):
    return client.stream("POST", path, json={"model": MODEL, "stream": True, "temperature": 0, **BODIES[path]})


@pytest.mark.parametrize("path", BODIES)
async def test_a_head_and_signs_of_life_come_before_the_first_token(path):
    script = Script(say=lambda prompt: TEXT, hold=asyncio.Event())
    async with door(script) as client, stream(client, path) as answer:
        # The head arrives although the prompt is still being computed.
        assert not script.generations[0].samples[0].emitted
        assert (answer.status_code, answer.headers["x-accel-buffering"]) == (200, "no")
        lines, body = answer.aiter_lines(), []
        while sum(line.startswith(": keep-alive") or line == "event: ping" for line in body) < 3:
            body.append(await anext(lines))
        script.hold.set()
        body += [line async for line in lines]
    anthropics = path == "/v1/messages"
    assert all(
        line in ("", "event: ping", 'data: {"type":"ping"}') if anthropics else not line or line[0] == ":"
        for line in body[:6]
    )

    text = "\n".join(line for line in body if line != 'data: {"type":"ping"}')
    whole = SimpleNamespace(headers={"content-type": "text/event-stream"}, text=text)
    assert text_of(path, whole) == TEXT


async def test_signs_of_life_do_not_disturb_the_real_clients():
    """Pings come before, between and after the tokens, because every token takes longer than a ping's interval."""

    def script():
        return Script(say=lambda prompt: TEXT, pause_s=0.06)

    async with door(script()) as client:
        sdk = openai.AsyncOpenAI(base_url=f"{client.base_url}/v1", api_key="none", max_retries=0)
        claude = anthropic.AsyncAnthropic(base_url=str(client.base_url), api_key="none", max_retries=0)
        chunks = [c async for c in await sdk.chat.completions.create(model=MODEL, messages=ASK, stream=True)]
        assert "".join(c.choices[0].delta.content or "" for c in chunks) == TEXT
        chunks = [c async for c in await sdk.completions.create(model=MODEL, prompt="a", stream=True)]
        assert "".join(c.choices[0].text for c in chunks) == TEXT
        async with sdk.responses.stream(model=MODEL, input="a") as events:
            kinds = [event.type async for event in events]
            assert (await events.get_final_response()).output_text == TEXT and kinds[-1] == "response.completed"
        async with claude.messages.stream(model=MODEL, messages=ASK, max_tokens=50) as events:
            assert (await events.get_final_message()).content[0].text == TEXT
        await sdk.close()
        await claude.close()


async def test_a_late_error_is_raised_by_the_real_clients(monkeypatch):
    monkeypatch.setattr(http, "HEAD_AFTER_S", 0.02)

    async def late(client, asking):
        asked = asyncio.create_task(asking)
        await asyncio.sleep(0.2)
        script.hold.set()
        try:
            return await asked
        finally:
            script.hold.clear()

    async def read(making):
        return [event async for event in await making]

    async def read_messages():
        async with claude.messages.stream(model=MODEL, messages=ASK, max_tokens=50) as events:
            return await events.get_final_message()

    script = Script(hold=asyncio.Event(), error=Unavailable("gone"))
    async with door(script) as client:
        sdk = openai.AsyncOpenAI(base_url=f"{client.base_url}/v1", api_key="none", max_retries=0)
        claude = anthropic.AsyncAnthropic(base_url=str(client.base_url), api_key="none", max_retries=0)
        for making in (
            sdk.chat.completions.create(model=MODEL, messages=ASK, stream=True),
            sdk.completions.create(model=MODEL, prompt="a", stream=True),
            sdk.responses.create(model=MODEL, input="a", stream=True),
        ):
            with pytest.raises(openai.APIError, match="gone"):
                await late(client, read(making))
        with pytest.raises(anthropic.APIStatusError, match="gone") as caught:
            await late(client, read_messages())
        assert caught.value.body["error"]["type"] == "overloaded_error"
        await sdk.close()
        await claude.close()


async def test_a_late_error_has_the_shape_of_the_responses_api(monkeypatch):
    monkeypatch.setattr(http, "HEAD_AFTER_S", 0.02)
    script = Script(say=lambda prompt: TEXT, error=Unavailable("gone"), fail_after=3)
    async with door(script) as client, stream(client, "/v1/responses") as answer:
        text = "".join([piece async for piece in answer.aiter_text()])
    events = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: ")]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    error, failed = events[-2:]
    assert (error["type"], error["code"], error["message"]) == ("error", "service_unavailable", "gone")
    assert (failed["type"], failed["response"]["status"]) == ("response.failed", "failed")
    assert failed["response"]["error"] == {"code": "service_unavailable", "message": "gone"}


async def test_an_early_error_still_has_its_own_status():
    script = Script(error=Overloaded("full", retry_after_s=3.0))
    async with door(script) as client, stream(client, "/v1/messages") as answer:
        assert (answer.status_code, answer.headers["retry-after"]) == (429, "3")


async def test_a_client_that_leaves_while_it_is_told_that_we_live_stops_the_work():
    script = Script(hold=asyncio.Event())
    async with door(script) as client:
        async with stream(client, "/v1/messages") as answer:
            await anext(answer.aiter_lines())
        await until(lambda: script.num_cancelled)
        assert [each.finish_reason for each in script.generations] == [""]
