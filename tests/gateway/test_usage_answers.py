"""What tenants can learn about their usage: GET /v1/usage, receipts by request id, limits, retention."""

import json
import time
from dataclasses import replace

import httpx
import pytest

from antefix_billing.api_keys import digest_of
from antefix_billing.key_register import KeyRegister
from antefix_billing.limits import Limit, LimitWindow, TenantLimits
from antefix_billing.receipt import Signer
from antefix_billing.tenants import TenantBook
from antefix_router.gateway.limit_headers import duration
from tests.gateway.scripted import Script, make_front, serving
from tests.waiting import AT_MOST_S

ASK = {"model": "antefix-tiny", "messages": [{"role": "user", "content": "hello"}]}
URLS = {
    "/v1/chat/completions": ASK,
    "/v1/completions": {"model": "antefix-tiny", "prompt": "hello there"},
    "/v1/responses": {"model": "antefix-tiny", "input": "hello"},
    "/v1/messages": {**ASK, "max_tokens": 16},
}
ACME, GLOBEX = {"authorization": "Bearer a"}, {"authorization": "Bearer g"}


@pytest.fixture
async def door(tmp_path):
    keys = KeyRegister(named={digest_of("a"): "acme", digest_of("g"): "globex"})
    limits = (Limit(window=LimitWindow.DAY, tokens=100_000, requests=50),)
    front = make_front(
        script := Script(hit=3),
        ledger=tmp_path / "ledger",
        keys=keys,
        signer=Signer.create(tmp_path / "receipts.key"),
        tenants=TenantBook(limits={"acme": TenantLimits(limits=limits)}),
    )
    async with serving(front) as url, httpx.AsyncClient(base_url=url, timeout=AT_MOST_S) as client:
        client.script = script
        yield client


async def post(door, path, headers=ACME, **changes):
    answer = await door.post(path, json={**URLS[path], **changes}, headers=headers)
    assert answer.status_code == 200, answer.text
    return answer


@pytest.mark.parametrize("path", URLS)
async def test_a_receipt_is_found_by_the_id_that_the_client_was_given(door, path):
    answer = await post(door, path)
    for given in (answer.json()["id"], answer.headers["x-request-id"]):
        receipt = await door.get(f"/v1/usage/receipts/{given}", headers=ACME)
        assert json.loads(receipt.json()["payload"])["request_id"] == answer.headers["x-request-id"]
        assert (await door.get(f"/v1/usage/receipts/{given}", headers=GLOBEX)).status_code == 404


async def test_a_clients_own_id_that_looks_like_one_of_ours_is_its_own(door):
    await post(door, "/v1/completions", {**ACME, "idempotency-key": "msg_1"})
    await post(door, "/v1/completions", {**ACME, "idempotency-key": "1"}, prompt="another")
    receipt = await door.get("/v1/usage/receipts/msg_1", headers=ACME)
    assert json.loads(receipt.json()["payload"])["request_id"] == "msg_1"


async def test_an_answer_says_that_entries_were_pruned(door, monkeypatch):
    assert "antefix-pruned" not in (await door.get("/v1/usage", headers=ACME)).headers
    monkeypatch.setattr("antefix_router.gateway.usage_answers.pruned_to", lambda directory: (7, b""))
    assert (await door.get("/v1/usage", headers=ACME)).headers["antefix-pruned"] == "7"


async def test_usage_is_openais_page_of_buckets(door):
    answers = [await post(door, "/v1/chat/completions") for _ in range(3)]
    await post(door, "/v1/chat/completions", GLOBEX)
    used = [answer.json()["usage"] for answer in answers]
    start = int(time.time()) // 86400 * 86400
    asked = {"start_time": start, "bucket_width": "1h", "group_by": "model", "limit": 24}
    page = (await door.get("/v1/organization/usage/completions", params=asked, headers=ACME)).json()
    assert page["object"] == "page" and page["has_more"] is False
    (result,) = [result for bucket in page["data"] for result in bucket["results"]]
    assert result["num_model_requests"] == 3 and result["model"] == "antefix-tiny"
    assert result["input_tokens"] == sum(each["prompt_tokens"] for each in used)
    assert result["output_tokens"] == sum(each["completion_tokens"] for each in used)
    assert result["input_cached_tokens"] == sum(each["prompt_tokens_details"]["cached_tokens"] for each in used)


async def test_usage_as_rows_by_several_groups(door):
    await post(door, "/v1/chat/completions", user="ann")
    await post(door, "/v1/chat/completions", user="bob")
    groups = "user,tier,miss_reason,key"
    answer = await door.get("/v1/usage", params={"shape": "plain", "group_by": groups}, headers=ACME)
    rows = answer.json()["rows"]
    assert [(row["user"], row["tier"], row["requests"]) for row in rows] == [("ann", "store", 1), ("bob", "store", 1)]
    filtered = {"shape": "plain", "user_ids[]": "ann"}
    assert (await door.get("/v1/usage", params=filtered, headers=ACME)).json()["rows"][0]["requests"] == 1


async def test_pages_go_on_where_the_one_before_ended(door):
    await post(door, "/v1/completions")
    now = int(time.time())
    start, seen, pages = now // 60 * 60 - 3600, 0, 0
    params = {"start_time": start, "end_time": now + 60, "bucket_width": "1m", "limit": 20}
    while True:
        page = (await door.get("/v1/usage", params=params, headers=ACME)).json()
        pages += 1
        seen += sum(result["num_model_requests"] for bucket in page["data"] for result in bucket["results"])
        if not page["has_more"]:
            break
        params["page"] = page["next_page"]
    assert (seen, pages) == (1, 4) or (seen, pages) == (1, 5)


@pytest.mark.parametrize(
    "params",
    [{"bucket_width": "2d"}, {"limit": "0"}, {"limit": "32"}, {"start_time": "x"}, {"start_time": "9" * 30},
     {"group_by": "price"}, {"shape": "xml"}, {"start_time": "100", "end_time": "50"}, {"page": "-1"}],
)  # fmt: skip
async def test_an_invalid_parameter_is_named(door, params):
    answer = await door.get("/v1/usage", params=params, headers=ACME)
    assert answer.status_code == 400 and next(iter(params)).split("_")[0] in answer.json()["error"]["message"]


async def test_another_tenants_usage_needs_more(door):
    assert (await door.get("/v1/usage", params={"tenant": "globex"}, headers=ACME)).status_code == 403
    assert (await door.get("/v1/usage")).status_code == 401


async def test_what_a_limit_leaves_is_in_the_headers_that_clients_read(door):
    answer = await post(door, "/v1/chat/completions")
    named = {name: answer.headers[f"x-ratelimit-{name}"] for name in ("limit-requests", "remaining-requests")}
    assert named == {"limit-requests": "50", "remaining-requests": "49"}
    assert answer.headers["x-ratelimit-limit-tokens"] == "100000"
    used = answer.json()["usage"]["total_tokens"]
    second = await post(door, "/v1/messages")
    assert int(second.headers["anthropic-ratelimit-tokens-remaining"]) <= 100_000 - used
    assert "T" in second.headers["anthropic-ratelimit-requests-reset"]
    assert not [name for name in (await post(door, "/v1/completions", GLOBEX)).headers if "ratelimit" in name]


async def test_one_that_is_refused_says_what_is_left_too(door):
    answer = await door.post("/v1/completions", json={**URLS["/v1/completions"], "max_tokens": 10**6}, headers=ACME)
    assert answer.status_code in (400, 429)
    assert answer.headers["x-ratelimit-limit-requests"] == "50"


def test_durations_are_written_as_openai_does():
    assert [duration(seconds) for seconds in (0.25, 1, 360, 3600)] == ["250ms", "1s", "6m0s", "1h0m0s"]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses", "/v1/completions"])
async def test_prompt_cache_retention_keeps_the_whole_prompt_for_a_day(door, path):
    answer = await post(door, path, prompt_cache_retention="24h")
    (kept,) = door.script.requests[-1].breakpoints
    assert kept.ttl_s == 86400 and kept.num_tokens >= len(door.script.prompts[-1]) - 8
    assert "prompt_cache_retention" not in answer.headers.get("antefix-ignored", "")
    await post(door, path, prompt_cache_retention="in_memory")
    assert door.script.requests[-1].breakpoints == ()


def test_an_hours_writes_are_told_and_priced_apart():
    from decimal import Decimal

    from antefix.usage import Usage
    from antefix_billing.providers import messages_usage
    from antefix_billing.ratecard import FREE

    used = Usage(prompt_tokens=1000, cache_write_tokens=800, cache_write_1h_tokens=300)
    assert messages_usage(used)["cache_creation"] == {
        "ephemeral_5m_input_tokens": 500,
        "ephemeral_1h_input_tokens": 300,
    }
    prices = replace(FREE.prices, write=Decimal("1.25"), write_1h=Decimal(2))
    assert prices.price(used) == (Decimal("1.25") * 500 + 2 * 300) / 10**6
    assert replace(prices, write_1h=None).price(used) == Decimal("1.25") * 800 / 10**6


async def test_what_lies_before_an_hours_breakpoint_is_an_hours_write(door):
    run = door.script.run

    async def writing(generation, timeout_s):
        async for piece in run(generation, timeout_s):
            generation.restore = replace(generation.restore, written_tokens=len(generation.request.tokens))
            yield piece

    door.script.run = writing
    mark = {"cache_control": {"type": "ephemeral", "ttl": "1h"}}
    content = [{"type": "text", "text": "a" * 40, **mark}, {"type": "text", "text": "b" * 40}]
    told = (await post(door, "/v1/messages", messages=[{"role": "user", "content": content}])).json()["usage"]
    hour = told["cache_creation"]["ephemeral_1h_input_tokens"]
    assert 0 < hour < told["cache_creation_input_tokens"]
    assert hour + told["cache_creation"]["ephemeral_5m_input_tokens"] == told["cache_creation_input_tokens"]
    (kept,) = door.script.requests[-1].breakpoints
    assert hour == kept.num_tokens - told["cache_read_input_tokens"]
    short = {"cache_control": {"type": "ephemeral"}}
    content = [{"type": "text", "text": "c" * 40, **short}]
    told = (await post(door, "/v1/messages", messages=[{"role": "user", "content": content}])).json()["usage"]
    assert told["cache_creation"]["ephemeral_1h_input_tokens"] == 0
