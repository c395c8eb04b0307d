"""A router in front of other engines' workers: where requests go, what comes back, what is billed."""

import asyncio
import hashlib
import json

import pytest

from antefix.errors import ConfigError
from antefix.usage import Evidence
from antefix_billing.receipt import check_receipt
from antefix_billing.usage_record import Status
from antefix_router.fleet.fleet_config import FleetConfig
from tests.fleet.standin import MODEL, Standin
from tests.waiting import until

pytestmark = pytest.mark.slow

LONG = "The quick brown fox jumps over the lazy dog. " * 20
KEYS = f"""
[[tenant]]
name = "alice"
api_key_sha256 = ["{hashlib.sha256(b"key-of-alice").hexdigest()}"]
[[tenant]]
name = "bob"
api_key_sha256 = ["{hashlib.sha256(b"key-of-bob").hexdigest()}"]
[[tenant.limit]]
window = "day"
tokens = 1200
"""


def events_of(answer):
    lines = [line[6:] for line in answer.text.splitlines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


async def test_a_second_request_goes_where_the_first_one_was(fleet, two):
    door = await fleet(*two)
    first = await door.chat(LONG + "one")
    await door.heard()
    second = await door.chat(LONG + "two")
    (worker,) = [each for each in two if each.requests]
    assert len(worker.requests) == 2
    assert first.headers["antefix-worker"] == second.headers["antefix-worker"] == worker.address
    usage = second.json()["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] > 800
    assert second.headers["antefix-evidence"] == "reported"
    assert second.headers["antefix-hit-tokens"] == str(usage["prompt_tokens_details"]["cached_tokens"])
    hits = door.engine(worker).hits
    assert hits.lost == hits.found == 0
    assert hits.expected == hits.reported == usage["prompt_tokens_details"]["cached_tokens"]


@pytest.mark.slow
async def test_conversations_hit_more_than_round_robin_in_the_same_load(fleet):
    """Six agents over two workers, ten turns each, taking turns in an order that alternates workers' parity."""

    async def load(policy):
        workers = Standin(), Standin()
        door = await fleet(*workers, policy=policy, ledger_dir="")
        talks = [[{"role": "system", "content": f"agent {agent} {LONG}"}] for agent in range(5)]
        for turn in range(6):
            for agent, talk in enumerate(talks):
                talk.append({"role": "user", "content": f"step {turn} of agent {agent}: " + "look " * 30})
                answer = (await door.chat(list(talk))).json()["choices"][0]["message"]["content"]
                talk.append({"role": "assistant", "content": answer})
                await door.heard()
        usages = [usage for worker in workers for usage in worker.usages]
        hit = sum(usage["prompt_tokens_details"]["cached_tokens"] for usage in usages)
        return hit / sum(usage["prompt_tokens"] for usage in usages)

    ours, theirs = await load("least_work"), await load("round_robin")
    assert ours > 0.75
    assert ours > theirs + 0.05


async def test_a_worker_without_events_is_guessed_at(fleet):
    workers = Standin(with_events=False), Standin(with_events=False)
    door = await fleet(*workers)
    answers = [await door.chat(LONG + str(number)) for number in range(3)]
    assert len({answer.headers["antefix-worker"] for answer in answers}) == 1
    assert int(answers[-1].headers["antefix-hit-tokens"]) > 800
    assert door.engine(next(each for each in workers if each.requests)).hits.expected > 1600


async def test_a_worker_without_tokenize_still_gets_its_own_conversations(fleet):
    workers = Standin(has_tokenize=False), Standin(has_tokenize=False)
    door = await fleet(*workers)
    answers = [await door.chat(LONG * 10 + str(number)) for number in range(4)]
    assert len({answer.headers["antefix-worker"] for answer in answers}) == 1
    assert door.router.placing.counters.num_unnamed == 4
    assert answers[-1].headers["antefix-miss-reason"] == "unknown"


async def test_token_ids_are_taken_as_they_are(fleet, two):
    door = await fleet(*two)
    body = {"model": MODEL, "prompt": list(range(100)), "max_tokens": 2}
    answer = await door.client.post("/v1/completions", json=body)
    assert answer.json()["choices"][0]["text"] == "w0 w1 "
    assert sum(worker.num_tokenized for worker in two) == 0
    await door.heard()
    assert (await door.client.post("/v1/completions", json=body)).headers["antefix-hit-tokens"] == "96"


async def test_twins_that_come_at_once_meet_at_one_worker(fleet, two):
    door = await fleet(*two)
    for worker in two:
        worker.hold = asyncio.Event()
    asking = [asyncio.create_task(door.chat(LONG + str(number))) for number in range(2)]
    await until(lambda: sum(len(worker.requests) for worker in two) == 2)
    assert sorted(len(worker.requests) for worker in two) == [0, 2]
    for worker in two:
        worker.hold.set()
    await asyncio.gather(*asking)


async def test_load_spreads_what_has_nothing_in_common(fleet, two):
    door = await fleet(*two)
    for worker in two:
        worker.hold = asyncio.Event()
    asking = [asyncio.create_task(door.chat(f"{number} {LONG}")) for number in range(8)]
    await until(lambda: sum(len(worker.requests) for worker in two) == 8)
    assert sorted(len(worker.requests) for worker in two) == [4, 4]
    for worker in two:
        worker.hold.set()
    await asyncio.gather(*asking)
    assert all(worker.num_requests == worker.num_tokens == 0 for worker in door.router.workers.workers)


async def test_an_answer_and_its_request_pass_through_as_they_are(fleet, two):
    door = await fleet(*two)
    more = {"temperature": 0.5, "tools": [{"type": "function", "function": {"name": "look"}}], "of_the_future": [1]}
    answer = await door.chat("look", **more)
    assert answer.json()["choices"][0]["message"]["tool_calls"][0]["function"]["name"] == "look"
    assert answer.json()["id"] == "of-the-worker"
    ((_, body),) = [request for worker in two for request in worker.requests]
    assert {name: body[name] for name in more} == more
    assert "cache_salt" not in body


@pytest.mark.parametrize("usage", [None, False, True])
async def test_a_stream_passes_through_with_the_usage_that_was_asked_for(fleet, two, usage):
    door = await fleet(*two)
    options = {} if usage is None else {"stream_options": {"include_usage": usage}}
    answer = await door.chat("hello", stream=True, **options)
    events = events_of(answer)
    text = "".join(choice["delta"].get("content", "") for event in events for choice in event["choices"])
    assert text == "w0 w1 w2 "
    last = events[-1]
    if usage:
        assert last["choices"] == [] and last["usage"]["completion_tokens"] == 3
        assert all(event["usage"] is None for event in events[:-1])
    else:
        assert last["choices"][0]["finish_reason"] == "stop"
        assert all("usage" not in event for event in events)
    (record,) = door.records
    assert (record.prompt_tokens, record.output_tokens, record.evidence) == (7, 3, Evidence.REPORTED)
    assert record.ttft_us > 0


async def test_running_usage_is_passed_to_who_asked(fleet, two):
    door = await fleet(*two)
    options = {"include_usage": True, "continuous_usage_stats": True}
    events = events_of(await door.chat("hello", stream=True, stream_options=options))
    assert [event["usage"]["completion_tokens"] for event in events] == [1, 2, 3, 3, 3]


async def test_an_output_limit_is_set_where_the_client_names_none(fleet, two):
    door = await fleet(*two, http_max_tokens=2)
    body = {"model": MODEL, "messages": [{"role": "user", "content": "x"}]}
    answer = await door.client.post("/v1/chat/completions", json=body)
    assert answer.json()["usage"]["completion_tokens"] == 2


async def test_models_are_those_of_the_fleet(fleet):
    workers = Standin(name="one"), Standin(name="two")
    door = await fleet(*workers)
    listed = (await door.client.get("/v1/models")).json()["data"]
    assert [(each["id"], each["max_model_len"]) for each in listed] == [("one", 100_000), ("two", 100_000)]
    assert (await door.client.get("/v1/models/two")).json()["id"] == "two"
    assert (await door.client.get("/v1/models/three")).status_code == 404
    for name, worker in zip(("one", "two"), workers, strict=True):
        await door.chat("x", model=name)
        assert len(worker.requests) == 1
    refused = await door.chat("x", model="three", expect=404)
    assert refused.json()["error"]["code"] == "model_not_found"
    assert {record.model for record in door.records} == {"one", "two"}


async def test_a_fleet_of_one_model_answers_to_any_name_unless_told_otherwise(fleet):
    door = await fleet(Standin())
    await door.chat("x", model="gpt-something")
    assert door.workers[0].requests[0][1]["model"] == MODEL


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_tokens": 0},
        {"max_tokens": "3"},
        {"n": 0},
        {"n": 100},
        {"user": 5},
        {"stream_options": []},
        {"cache_salt": 5},
        {"model": 5},
    ],
)
async def test_what_the_router_needs_is_checked(fleet, wrong):
    door = await fleet(Standin())
    answer = await door.chat("x", expect=400, **wrong)
    assert next(iter(wrong)) in answer.json()["error"]["message"]
    assert not door.workers[0].requests


async def test_an_adapters_prefixes_are_its_own(fleet):
    workers = Standin(adapters=("adapter",)), Standin(adapters=("adapter",))
    door = await fleet(*workers)
    hits = []
    for model in (MODEL, "adapter", "adapter", MODEL):
        answer = await door.chat(LONG, model=model)
        hits.append(int(answer.headers["antefix-hit-tokens"]))
        await door.heard()
    assert hits == [0, 0, 896, 896]
    assert sum(door.engine(worker).hits.lost + door.engine(worker).hits.found for worker in workers) == 0


async def test_ranks_are_named_to_the_worker(fleet):
    worker = Standin(with_events=False)
    door = await fleet(worker, ranks=2)
    # Without other reasons a new prompt goes to a random rank. That all 20 go to one is practically impossible.
    for number in range(20):
        await door.chat(f"{number} {LONG}")
    ranks = {headers["x-data-parallel-rank"] for headers, _ in worker.requests}
    assert ranks == {"0", "1"}
    assert {record.worker for record in door.records} == {f"{worker.address}#0", f"{worker.address}#1"}


async def test_workers_that_want_a_key_get_it(fleet, tmp_path):
    (tmp_path / "key").write_text("worker-key\n")
    worker = Standin(api_key="worker-key")
    door = await fleet(worker, worker_key_file=str(tmp_path / "key"))
    await door.chat("x", headers={"authorization": "Bearer of-the-client"})
    assert worker.requests[0][0]["authorization"] == "Bearer worker-key"


@pytest.mark.parametrize("status", [429, 500, 502, 503])
@pytest.mark.parametrize("stream", [False, True])
async def test_a_worker_that_fails_is_replaced(fleet, two, status, stream):
    door = await fleet(*two)
    two[0].status = status
    for number in range(4):
        answer = await door.chat(f"{number} {LONG}", stream=stream)
        assert "w0" in answer.text
    assert len(two[1].requests) == 4
    assert [record.status for record in door.records] == [Status.STOP] * 4
    assert {record.worker for record in door.records} == {two[1].address}


@pytest.mark.slow
async def test_a_killed_worker_is_replaced_and_taken_again_when_it_is_back(fleet, two):
    door = await fleet(*two)
    for number in range(4):
        await door.chat(f"{number} {LONG}")
    await two[0].stop()
    for number in range(6):
        assert (await door.chat(f"{number} {LONG}")).headers["antefix-worker"] == two[1].address
    await two[0].start()
    await door.heard(lambda: door.engine(two[0]).is_up)
    before = len(two[0].requests)
    for number in range(10, 20):
        await door.chat(f"{number} {LONG}")
    assert len(two[0].requests) > before
    assert {record.status for record in door.records} == {Status.STOP}


@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_waits_for_a_worker_that_answers_again(fleet, two, stream):
    door = await fleet(*two)
    for worker in two:
        await worker.stop()
    asked = asyncio.create_task(door.chat("x", stream=stream))
    await until(lambda: not any(each.is_up for each in door.router.engines.engines) and not asked.done())
    await two[1].start()
    assert "w0" in (await asked).text
    assert [(record.status, record.worker) for record in door.records] == [(Status.STOP, two[1].address)]


async def test_only_a_worker_with_the_model_is_waited_for(fleet):
    gone, other = Standin(), Standin(name="another-model")
    door = await fleet(gone, other)
    await gone.stop()
    asked = asyncio.create_task(door.chat("x"))
    await until(lambda: not door.engine(gone).is_up)
    await gone.start()
    assert (await asked).headers["antefix-worker"] == gone.address
    assert not other.requests


@pytest.mark.parametrize("status", [429, 502])
async def test_nobody_waits_for_workers_that_answer_and_fail(fleet, two, status):
    door = await fleet(*two)
    for worker in two:
        worker.status = status
    await door.chat("x", expect=429 if status == 429 else 503)
    assert [len(worker.requests) for worker in two] == [1, 1]


@pytest.mark.parametrize(("fails", "stream"), [("status", False), ("status", True), ("nan", False), ("event", True)])
async def test_a_request_that_workers_cannot_run_is_tried_on_two(fleet, monkeypatch, fails, stream):
    """It may make every worker fail, whether they say so or answer with what is no number."""
    workers = [Standin() for _ in range(4)]
    door = await fleet(*workers)
    for worker in workers:
        if fails == "status":
            worker.status = 500
        elif fails == "event":
            worker.fails_after = 0
        else:
            monkeypatch.setattr("antefix_router.fleet.openai_door.path_of_no_number", lambda answer: "usage.odd")
    await door.chat("x", stream=stream, expect=503)
    assert sorted(len(worker.requests) for worker in workers) == [0, 0, 1, 1]


async def test_with_no_worker_left_the_client_is_told(fleet, two, monkeypatch):
    monkeypatch.setattr("antefix_router.placement.moves.LAST_PATIENCE_S", 0.3)
    door = await fleet(*two)
    for worker in two:
        await worker.stop()
    answer = await door.chat("x", expect=503)
    assert answer.json()["error"]["code"] == "service_unavailable"
    # Nothing was used, and so nothing is billed.
    assert [(record.status, record.output_tokens, record.price) for record in door.records] == [(Status.FAILED, 0, 0)]


async def test_a_refusal_is_the_workers_own_and_tried_once(fleet, two):
    door = await fleet(*two)
    for worker in two:
        worker.status = 422
    answer = await door.chat("x", expect=422)
    assert answer.json()["error"] == {"message": "status 422", "type": "of_the_worker"}
    assert sum(len(worker.requests) for worker in two) == 1
    two[0].status = two[1].status = 200
    assert (await door.chat("x")).status_code == 200


async def test_a_stream_that_breaks_ends_with_an_error_and_a_bill_of_what_was_given(fleet):
    worker = Standin(breaks_after=2)
    door = await fleet(worker)
    answer = await door.chat("hello", stream=True)
    lines = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
    assert lines[-1]["error"]["code"] == "service_unavailable"
    (record,) = door.records
    assert (record.status, record.output_tokens, record.evidence) == (Status.FAILED, 2, Evidence.EXPECTED)


async def test_an_error_inside_a_stream_is_one(fleet, two, monkeypatch):
    # A stream's head, and with it a 200, waits for the first event, however late it is.
    monkeypatch.setattr("antefix_router.gateway.http.HEAD_AFTER_S", 60.0)
    door = await fleet(*two)
    for worker in two:
        worker.fails_after = 1
    answer = await door.chat("hello", stream=True)
    assert '"error"' in answer.text
    assert "out of memory" in answer.text
    (record,) = door.records
    assert (record.status, record.output_tokens) == (Status.FAILED, 1)
    two[0].fails_after = two[1].fails_after = 0
    # No output was sent yet, so the other worker is tried, which fails too.
    await door.chat("hello", stream=True, expect=503)
    assert sum(len(worker.requests) for worker in two) == 3


async def test_a_client_that_leaves_ends_the_workers_work(fleet):
    worker = Standin()
    worker.hold = asyncio.Event()
    door = await fleet(worker)
    asking = asyncio.create_task(door.chat("hello", stream=True))
    await until(lambda: worker.requests)
    asking.cancel()
    await until(lambda: door.records)
    assert door.records[0].status is Status.CANCELLED
    assert all(each.num_requests == 0 for each in door.router.workers.workers)


async def test_what_finds_all_workers_full_is_refused_with_a_hint(fleet):
    worker = Standin()
    worker.hold = asyncio.Event()
    door = await fleet(worker, worker_requests_max=1)
    running = asyncio.create_task(door.chat("one"))
    await until(lambda: worker.requests)
    answer = await door.chat("two", expect=429)
    assert answer.headers["retry-after"] == "1"
    assert door.router.placing.counters.num_full == 1
    worker.hold.set()
    await running


async def test_the_bill_is_the_sum_of_what_the_workers_reported(fleet, two):
    door = await fleet(*two)
    talk = []
    for number in range(8):
        talk.append({"role": "user", "content": f"{number} {LONG}"})
        await door.chat(list(talk), stream=number % 2 == 0)
        talk.append({"role": "assistant", "content": "w0 w1 w2 "})
        await door.heard()
    usages = [usage for worker in two for usage in worker.usages]
    billed, told = door.records, len(usages)
    assert len(billed) == told == 8
    assert sum(record.prompt_tokens for record in billed) == sum(usage["prompt_tokens"] for usage in usages)
    assert sum(record.output_tokens for record in billed) == sum(usage["completion_tokens"] for usage in usages)
    hits = sum(usage["prompt_tokens_details"]["cached_tokens"] for usage in usages)
    assert sum(record.cache_hit_tokens for record in billed) == hits > 0
    assert {record.evidence for record in billed} == {Evidence.REPORTED}
    assert all(not record.last_hit_hash for record in billed)


async def test_lost_hits_become_visible(fleet):
    worker = Standin()
    door = await fleet(worker)
    await door.chat(LONG + "one")
    await door.heard()
    worker.forgets_silently = True
    answer = await door.chat(LONG + "two")
    assert answer.headers["antefix-miss-reason"] == "lost_hit"
    hits = door.engine(worker).hits
    assert hits.lost == hits.expected > 800
    assert hits.reported == 0
    shown = {
        (sample.labels.get("worker"), sample.labels.get("what")): sample.value
        for metric in door.router.metrics()
        for sample in metric.samples
        if sample.name == "antefix_fleet_hit_tokens_total"
    }
    assert shown[worker.address, "lost"] == hits.lost
    assert door.records[-1].expected_hit_tokens == hits.lost


async def test_why_something_missed_is_told_from_the_events(fleet):
    door = await fleet(Standin(capacity=60))

    async def why(text):
        answer = await door.chat(text)
        await door.heard()
        return answer.headers["antefix-miss-reason"]

    assert await why(LONG + "x") == "first_seen"
    assert await why("short") == "below_minimum"
    assert await why(LONG + "x") == "none"
    assert await why("another " + LONG) == "first_seen"
    assert await why(LONG + "x") == "evicted"


async def test_what_another_worker_has_and_this_one_has_not_is_said(fleet, two):
    door = await fleet(*two)
    first = await door.chat(LONG)
    await door.heard()
    # The worker that has the prefix is so busy that computing the prefix elsewhere is faster.
    (holder,) = [each for each in door.router.workers.workers if each.address == first.headers["antefix-worker"]]
    with door.router.workers.load(holder, 1_000_000):
        second = await door.chat(LONG)
    assert second.headers["antefix-worker"] != first.headers["antefix-worker"]
    assert second.headers["antefix-miss-reason"] == "other_worker"


async def test_a_worker_that_tells_no_hits_is_billed_as_missing_and_counted(fleet):
    worker = Standin(tells_hits=False)
    door = await fleet(worker)
    for _ in range(2):
        await door.chat(LONG)
        await door.heard()
    assert [record.cache_hit_tokens for record in door.records] == [0, 0]
    assert door.engine(worker).hits.num_unreported == 2


async def test_a_receipt_says_that_hits_are_reported(fleet, two):
    door = await fleet(*two)
    answer = await door.chat("hello")
    receipt = (await door.client.get(f"/v1/usage/receipts/{answer.headers['x-request-id']}")).json()
    key = bytes.fromhex((await door.client.get("/v1/usage/public_key")).json()["public_key"])
    check = check_receipt(receipt, key)
    assert check.ok
    assert (check.record.evidence, check.record.worker) == (Evidence.REPORTED, answer.headers["antefix-worker"])


async def test_a_streams_last_usage_has_the_details(fleet, two):
    door = await fleet(*two)
    options = {"stream": True, "stream_options": {"include_usage": True}}
    answer = await door.chat("hello", headers={"antefix-usage-details": "true"}, **options)
    usage = events_of(answer)[-1]["usage"]
    assert (usage["completion_tokens"], usage["antefix"]["evidence"]) == (3, "reported")
    assert usage["antefix"]["worker"] == door.records[0].worker


async def test_details_are_given_to_who_asks(fleet, two):
    door = await fleet(*two)
    answer = await door.chat("hello", headers={"antefix-usage-details": "true"})
    details = answer.json()["usage"]["antefix"]
    assert (details["evidence"], details["plan"], details["expected_hit_tokens"]) == ("reported", "foreign", 0)


async def test_a_retry_under_one_id_is_paid_once(fleet, two):
    door = await fleet(*two)
    for _ in range(2):
        await door.chat("hello", headers={"idempotency-key": "mine"})
    assert len(door.records) == 1
    await door.chat("something else", headers={"idempotency-key": "mine"}, expect=400)


async def test_tenants_have_quotas_and_do_not_share_prefixes(fleet, two, tmp_path):
    (tmp_path / "tenants.toml").write_text(KEYS)
    door = await fleet(*two, tenants_file=str(tmp_path / "tenants.toml"))
    await door.chat("x", expect=401)
    alice, bob = ({"authorization": f"Bearer {key}"} for key in ("key-of-alice", "key-of-bob"))
    for _ in range(2):
        await door.chat(LONG, headers=alice)
        await door.heard()
    await door.chat(LONG, headers=bob)
    refused = await door.chat(LONG, headers=bob, expect=429)
    assert refused.json()["error"]["code"] == "rate_limit_exceeded"
    assert refused.headers["x-ratelimit-remaining-tokens"].isdigit()
    hits = [(record.tenant, record.cache_hit_tokens > 0) for record in door.records]
    assert hits == [("alice", False), ("alice", True), ("bob", False)]
    salts = {body["cache_salt"] for worker in two for _, body in worker.requests}
    assert len(salts) == 2
    assert not any("alice" in salt or "bob" in salt for salt in salts)


async def test_tenants_may_share_where_the_settings_say_so(fleet, two, tmp_path):
    (tmp_path / "tenants.toml").write_text(KEYS)
    door = await fleet(*two, tenants_file=str(tmp_path / "tenants.toml"), share_caches=True)
    await door.chat(LONG, headers={"authorization": "Bearer key-of-alice"})
    await door.heard()
    answer = await door.chat(LONG, headers={"authorization": "Bearer key-of-bob"})
    assert int(answer.headers["antefix-hit-tokens"]) > 800


def config(**settings):
    base = {"workers": ("http://127.0.0.1:8000",), "http_address": "127.0.0.1:0", "secret_file": "s"}
    return FleetConfig(**{**base, **settings})


@pytest.mark.parametrize(
    "settings",
    [
        {"workers": ()},
        {"workers": ("127.0.0.1:8000",)},
        {"workers": ("ftp://127.0.0.1",)},
        {"workers": ("http://a:b",)},
        {"workers": ("http://10.0.0.1:8000",)},
        {"workers": ("http://127.0.0.1:1", "http://127.0.0.1:1")},
        {"events": ("tcp://10.0.0.1:5557",)},
        {"events": ("udp://127.0.0.1:5557",)},
        {"events": ("5557", "5558")},
        {"replay": ("5557",)},
        {"ranks": 0},
        {"http_address": ""},
        {"secret_file": ""},
        {"policy": "best"},
        {"events": ("5557",), "events_keys": ("key",)},
    ],
)
def test_settings_that_make_no_sense_are_refused(settings):
    with pytest.raises(ConfigError):
        config(**settings)


def test_places_are_counted_as_vllm_counts_them():
    places = config(
        workers=("http://127.0.0.1:8000/v1/", "https://10.0.0.2"),
        events=("5557",),
        replay=("5657",),
        ranks=2,
        plain_network=True,
    ).places()
    assert [(each.address, each.url, each.events, each.replay) for each in places] == [
        ("127.0.0.1:8000#0", "http://127.0.0.1:8000", "tcp://127.0.0.1:5557", "tcp://127.0.0.1:5657"),
        ("127.0.0.1:8000#1", "http://127.0.0.1:8000", "tcp://127.0.0.1:5558", "tcp://127.0.0.1:5658"),
        ("10.0.0.2#0", "https://10.0.0.2", "tcp://10.0.0.2:5557", "tcp://10.0.0.2:5657"),
        ("10.0.0.2#1", "https://10.0.0.2", "tcp://10.0.0.2:5558", "tcp://10.0.0.2:5658"),
    ]
