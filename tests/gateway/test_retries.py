"""A client times out and repeats a request with the same Idempotency-Key, with the real gateway and a real ledger."""

import asyncio
import contextlib
import dataclasses
import json

import numpy as np
import pytest

from antefix.block import as_tokens
from antefix.errors import Unavailable
from antefix.generation_request import Caller, GenerationRequest
from antefix.sampling import Sampling
from antefix_billing.ledger_files import read_settled
from antefix_billing.pricing import priced
from antefix_billing.ratecard import load_cards
from antefix_billing.reconcile import verify
from antefix_billing.usage_record import Status
from antefix_router import retries
from antefix_router.answers import KeptAnswer, KeptOutput, RetryConfig, Shelf
from tests.billing.test_ratecard import DEPLOY
from tests.gateway.scripted import Script, make_front, serving
from tests.on_demand import openai
from tests.waiting import AT_MOST_S, until

pytestmark = pytest.mark.slow

httpx2 = pytest.importorskip("httpx2")

CARDS = load_cards([DEPLOY / "example.toml"])
MODEL = "antefix-tiny"
TEXT = "abcdefghij"
BODIES = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "a"}], "max_tokens": 50},
    "/v1/completions": {"prompt": "a", "max_tokens": 50},
    "/v1/responses": {"input": "a", "max_output_tokens": 50},
    "/v1/messages": {"messages": [{"role": "user", "content": "a"}], "max_tokens": 50},
}


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(retries, "_MADE_S", 0.05)


@contextlib.asynccontextmanager
async def door(script, ledger, **settings):
    front = make_front(script, ledger=ledger, cards=CARDS, retries=RetryConfig(**settings))
    async with serving(front) as url, httpx2.AsyncClient(base_url=url, timeout=AT_MOST_S) as client:
        yield client, front


def ask(client, path, *, stream=False, key="k", **changes):
    body = {"model": MODEL, "stream": stream, "temperature": 0, **BODIES[path], **changes}
    return client.post(path, json=body, headers={"idempotency-key": key})


def records(ledger):
    return [item.record for item in read_settled(ledger)]


async def leave(asking):
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)


def text_of(path, answer):
    """The text of a whole answer, or of a stream's body."""
    if answer.headers["content-type"].startswith("text/event-stream"):
        events = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
        if path == "/v1/chat/completions":
            return "".join(c["delta"].get("content") or "" for e in events for c in e["choices"])
        if path == "/v1/completions":
            return "".join(c["text"] for e in events for c in e["choices"])
        return "".join(
            e["delta"] if isinstance(e["delta"], str) else e["delta"].get("text", "")
            for e in events
            if e["type"] in ("response.output_text.delta", "content_block_delta")
        )
    body = answer.json()
    if path == "/v1/responses":
        return body["output"][0]["content"][0]["text"]
    if path == "/v1/messages":
        return body["content"][0]["text"]
    choice = body["choices"][0]
    return choice["text"] if path == "/v1/completions" else choice["message"]["content"]


@pytest.mark.parametrize("streams", [(False, False), (True, True), (True, False), (False, True)])
@pytest.mark.parametrize("path", BODIES)
async def test_a_retry_joins_the_running_answer_and_reads_it_from_its_start(tmp_path, path, streams):
    script = Script(say=lambda prompt: TEXT, pause_s=0.02)
    async with door(script, tmp_path / "ledger") as (client, _):
        first = asyncio.create_task(ask(client, path, stream=streams[0]))
        await until(lambda: script.requests and len(script.generations[0].samples[0].emitted) >= 3)
        await leave(first)
        answer = await ask(client, path, stream=streams[1])
        assert (answer.status_code, text_of(path, answer)) == (200, TEXT)
    assert len(script.requests) == 1 and script.num_cancelled == 0
    (record,) = records(tmp_path / "ledger")
    assert (record.status, record.attempt, record.output_tokens) == (Status.STOP, 1, len(TEXT))


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("stream", [False, True])
async def test_an_answer_that_ended_without_its_client_is_kept_and_only_then_paid_for(tmp_path, path, stream):
    script = Script(say=lambda prompt: TEXT, pause_s=0.02)
    ledger = tmp_path / "ledger"
    async with door(script, ledger) as (client, front):
        first = asyncio.create_task(ask(client, path))
        await until(lambda: script.requests and script.generations[0].samples[0].emitted)
        await leave(first)
        await until(lambda: records(ledger))
        (left,) = records(ledger)
        # A whole answer was not sent at all, so none of its output is billed.
        assert (left.status, left.output_tokens) == (Status.CANCELLED, 0)
        answer = await ask(client, path, stream=stream)
        assert text_of(path, answer) == TEXT
        again = await ask(client, path, stream=stream)
        assert text_of(path, again) == TEXT
        assert (front.accounts.retries.counts().kept, front.accounts.retries.counts().given_again) == (1, 2)
    assert len(script.requests) == 1
    left, whole = records(ledger)
    assert (whole.status, whole.attempt, whole.output_tokens) == (Status.STOP, 2, len(TEXT))
    assert whole.paid_before == left.price and whole.started_us == left.started_us
    assert verify(ledger).ok


async def test_an_answer_is_given_again_without_a_ledger_too():
    script = Script(say=lambda prompt: TEXT)
    async with door(script, None) as (client, _):
        for _ in range(5):
            assert text_of("/v1/completions", await ask(client, "/v1/completions")) == TEXT
    assert len(script.requests) == 1


async def test_the_openai_clients_own_retry_gets_the_answer_that_it_timed_out_on(tmp_path):
    script = Script(say=lambda prompt: TEXT, pause_s=0.08)
    async with door(script, tmp_path / "ledger") as (client, _):
        sdk = openai.AsyncOpenAI(base_url=f"{client.base_url}/v1", api_key="none", timeout=0.4, max_retries=50)
        answer = await sdk.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": "a"}], extra_headers={"Idempotency-Key": "k"}
        )
        await sdk.close()
    assert answer.choices[0].message.content == TEXT and len(script.requests) == 1


async def test_a_stream_that_broke_off_costs_what_was_given_and_its_retry_the_rest(tmp_path):
    script = Script(say=lambda prompt: TEXT, pause_s=0.03)
    ledger = tmp_path / "ledger"
    async with door(script, ledger, unattended_s=0) as (client, _):
        first = asyncio.create_task(ask(client, "/v1/completions", stream=True))
        await until(lambda: script.requests and len(script.generations[0].samples[0].emitted) >= 3)
        await leave(first)
        await until(lambda: records(ledger))
        assert script.num_cancelled == 1
        assert text_of("/v1/completions", await ask(client, "/v1/completions")) == TEXT
    left, whole = records(ledger)
    assert left.status is Status.CANCELLED and 3 <= left.output_tokens < len(TEXT)
    assert (whole.attempt, whole.output_tokens, len(script.requests)) == (2, len(TEXT), 2)
    assert left.price > 0 and whole.paid == whole.price + left.price == _whole_price(whole)


def _whole_price(record):
    return priced(dataclasses.replace(record, paid_before=0, attempt=1), CARDS).price


async def test_answers_without_a_client_are_bounded(tmp_path):
    hold = asyncio.Event()
    script = Script(say=lambda prompt: TEXT, hold=hold)
    async with door(script, tmp_path / "ledger", unattended_max=2) as (client, front):
        asking = [asyncio.create_task(ask(client, "/v1/completions", key=f"k{n}")) for n in range(4)]
        await until(lambda: len(script.requests) == 4)
        for task in asking:
            await leave(task)
        await until(lambda: script.num_cancelled == 2)
        counts = front.accounts.retries.counts()
        assert (counts.running, counts.unattended, counts.unattended_max) == (2, 2, 2)
        hold.set()
        await until(lambda: front.accounts.retries.counts().kept == 2)


async def test_a_stop_text_ends_a_shared_answer_where_it_was_found(tmp_path):
    script = Script(say=lambda prompt: TEXT, pause_s=0.02)
    ledger = tmp_path / "ledger"
    async with door(script, ledger) as (client, _):
        first = asyncio.create_task(ask(client, "/v1/completions", stop=["gh"]))
        await until(lambda: script.requests and len(script.generations[0].samples[0].emitted) >= 4)
        joined = asyncio.create_task(ask(client, "/v1/completions", stop=["gh"], stream=True))
        assert text_of("/v1/completions", await first) == "abcdef" == text_of("/v1/completions", await joined)
        assert text_of("/v1/completions", await ask(client, "/v1/completions", stop=["gh"])) == "abcdef"
    (record,) = records(ledger)
    assert (record.status, record.output_tokens, len(script.requests)) == (Status.STOP, len("abcdefgh"), 1)


async def test_a_key_belongs_to_one_prompt_and_one_user(tmp_path):
    script = Script(say=lambda prompt: TEXT, hold=asyncio.Event())
    async with door(script, tmp_path / "ledger") as (client, _):
        first = asyncio.create_task(ask(client, "/v1/completions", user="ada"))
        await until(lambda: script.requests)
        for changes in ({"user": "eve"}, {"user": "ada", "prompt": "b"}, {"user": "ada", "max_tokens": 9}):
            refused = await ask(client, "/v1/completions", **changes)
            assert refused.status_code == 400 and "another request" in refused.text
        # A running answer whose request did not ask for log probabilities has none.
        assert (await ask(client, "/v1/completions", user="ada", logprobs=1)).status_code == 409
        script.hold.set()
        assert (await first).status_code == 200
        assert (await ask(client, "/v1/completions", user="eve")).status_code == 400
        told = await ask(client, "/v1/completions", user="ada", logprobs=1)
        assert len(told.json()["choices"][0]["logprobs"]["tokens"]) == len(TEXT)
    assert len(records(tmp_path / "ledger")) == 1


async def test_a_failure_reaches_all_clients_of_an_answer_and_is_tried_again(tmp_path):
    script = Script(say=lambda prompt: TEXT, pause_s=0.02, error=Unavailable("gone"), fail_after=4)
    ledger = tmp_path / "ledger"
    async with door(script, ledger) as (client, _):
        both = [asyncio.create_task(ask(client, "/v1/completions")) for _ in range(2)]
        assert [answer.status_code for answer in await asyncio.gather(*both)] == [503, 503]
        script.error = None
        assert text_of("/v1/completions", await ask(client, "/v1/completions")) == TEXT
    assert [(record.status, record.attempt) for record in records(ledger)] == [(Status.FAILED, 1), (Status.STOP, 2)]


async def admitted(front):
    caller, sampling = Caller(request_id="k"), Sampling(max_tokens=2000)
    request = GenerationRequest(tokens=as_tokens([1, 2]), sampling=sampling, caller=caller)
    return await front.admit(request, retryable=True)


async def test_a_slow_reader_holds_up_no_other_reader_and_no_more_than_its_share(tmp_path):
    """An answer without a client continues to its end. An answer with a client is never far ahead of the client."""
    script = Script(say=lambda prompt: "x" * 2000)
    front = make_front(script, ledger=tmp_path / "ledger")
    bill = await admitted(front)
    slow = front.run(bill, 120.0)
    await anext(slow)
    await asyncio.sleep(0.2)
    assert len(script.generations[0].samples[0].emitted) <= 300
    quick = [token async for piece in front.run(await admitted(front), 120.0) for token in piece.tokens]
    assert len(quick) == 2000
    await slow.aclose()
    await front.accounts.close()
    (record,) = records(tmp_path / "ledger")
    assert (record.status, record.output_tokens) == (Status.STOP, 2000)


async def test_a_router_that_stops_still_answers_a_client_that_it_has_admitted(tmp_path):
    front = make_front(Script(say=lambda prompt: "x" * 2000), ledger=tmp_path / "ledger")
    bill = await admitted(front)
    front.accounts.retries.drain()
    assert sum([len(piece.tokens) async for piece in front.run(bill, 300.0)]) == 2000
    await front.accounts.close()
    (record,) = records(tmp_path / "ledger")
    assert (record.status, record.output_tokens) == (Status.STOP, 2000)


async def test_a_router_that_stops_still_answers_a_retry_whose_first_client_leaves(tmp_path):
    front = make_front(Script(say=lambda prompt: "x" * 2000), ledger=tmp_path / "ledger")
    first = front.run(await admitted(front), 300.0)
    await anext(first)
    retry = await admitted(front)
    front.accounts.retries.drain()
    await first.aclose()
    assert sum([len(piece.tokens) async for piece in front.run(retry, 300.0)]) == 2000
    await front.accounts.close()
    (record,) = records(tmp_path / "ledger")
    assert (record.status, record.output_tokens) == (Status.STOP, 2000)


async def test_an_admitted_client_that_never_reads_ends_with_its_router(tmp_path):
    front = make_front(Script(), ledger=tmp_path / "ledger")
    await admitted(front)
    front.accounts.retries.drain()
    await front.accounts.close()
    (record,) = records(tmp_path / "ledger")
    assert (record.status, record.output_tokens) == (Status.CANCELLED, 0)


def kept(num_tokens):
    tokens = np.zeros(num_tokens, np.uint32)
    output = KeptOutput(tokens=tokens, logprobs=(), finish_reason="stop", stop_number=0)
    return KeptAnswer(
        request_digest="",
        user="",
        outputs=(output,),
        num_top_logprobs=None,
        restore=None,
        output_written_tokens=0,
        ttft_s=0.0,
        started_us=0,
    )


def test_kept_answers_are_bounded_in_bytes_and_in_time():
    now = [0.0]
    shelf = Shelf(3 * kept(100).nbytes, 86400.0, clock=lambda: now[0])
    for number in range(5):
        now[0] += 1
        shelf.put(f"k{number}", kept(100))
    assert (len(shelf), shelf.num_dropped, shelf.nbytes) == (3, 2, shelf.bytes_max)
    assert shelf.get("k1") is None and shelf.get("k2") is not None
    now[0] += 86400 - 2
    assert shelf.get("k2") is None and shelf.get("k4") is not None and shelf.num_dropped == 2
    now[0] += 10
    assert shelf.get("k4") is None and shelf.nbytes == 0 == len(shelf)
    shelf.put("large", kept(10_000))
    assert len(shelf) == 0 == shelf.nbytes
