"""Clients, Prometheus and the ledger count the same tokens, exactly, whatever fails."""

import asyncio
import collections
import json
import random
import urllib.request
from decimal import Decimal

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from antefix.errors import Overloaded, Unavailable
from antefix.miss_reason import MissReason
from antefix.restore_report import RestoreReport
from antefix.telemetry import MetricsServer, Registry
from antefix_billing.ledger_files import read_settled
from antefix_billing.ratecard import load_cards
from antefix_router.generation import OutputPiece
from antefix_router.metrics import accounts_metrics
from tests.billing.test_ratecard import DEPLOY
from tests.gateway.scripted import make_front, serving
from tests.waiting import AT_MOST_S, until

httpx2 = pytest.importorskip("httpx2")

NUM_AT_ONCE = 100
REASONS = (MissReason.FIRST_SEEN, MissReason.EVICTED, MissReason.WINDOW_MISSING, MissReason.BELOW_MINIMUM)
KINDS = ("whole", "stream", "retried", "refused", "broken")


class Workers:
    """Scripted workers. A prompt's first bytes say how to answer it: `kind:memory hit:store hit:written:output:`."""

    async def run(self, generation, timeout_s):
        request, sample = generation.request, generation.samples[0]
        kind, *rest = bytes(request.tokens.tolist()).decode().split(":", 5)
        memory, store, written, num_output = (int(value) for value in rest[:4])
        await asyncio.sleep(0)
        if kind == "refused":
            raise Unavailable("no worker is left to try")
        hit = memory + store
        generation.restore = RestoreReport(
            plan="checkpoint" if store else "replay" if hit else "cold",
            hit_tokens=hit,
            miss_tokens=len(request.tokens) - hit,
            hit_memory_tokens=memory,
            hit_store_tokens=store,
            replayed_tokens=hit // 2 if hit and not store else 0,
            written_tokens=written,
            miss_reason=REASONS[len(request.tokens) % len(REASONS)],
            last_hit_hash=b"\xab" * 32 if hit else b"",
        )
        for number in range(num_output):
            sample.emitted.append(65 + number % 26)
            yield OutputPiece(0, np.array([65 + number % 26], np.uint32))
            await asyncio.sleep(0)
        if kind == "broken":
            raise Overloaded("the pool has no room")
        generation.output_written_tokens = written
        sample.finish_reason = "stop"


def prompt_of(chance, number):
    kind = KINDS[number % len(KINDS)]
    length = chance.randint(230, 400)
    memory, store = (64 * chance.randint(0, 1), 64 * chance.randint(0, 2)) if chance.random() < 0.7 else (0, 0)
    head = f"{kind}:{memory}:{store}:{64 * chance.randint(0, 1)}:{chance.randint(1, 5)}:{number}:"
    return kind, head + "x" * (length - len(head))


async def ask(client, kind, prompt, number):
    """Send one request. Returns the client's counts, from what it sent and what it received."""
    body = {"model": "antefix-tiny", "prompt": prompt, "max_tokens": 50, "temperature": 0}
    headers = {"antefix-usage-details": "true"}
    if kind == "retried":
        headers["idempotency-key"] = f"key-{number}"
        # The second request joins the first one, or gets the first one's answer, so it costs nothing.
        await client.post("/v1/completions", json=body, headers=headers)
    if kind in ("stream", "broken"):
        return await stream(client, body, headers, is_broken=kind == "broken")
    answer = await client.post("/v1/completions", json=body, headers=headers)
    assert answer.headers["x-request-id"]
    if kind == "refused":
        assert answer.status_code == 503
        # The request failed before prefill answered. Its prompt is recorded and costs nothing.
        return collections.Counter(failed=1, prompt=len(prompt))
    assert answer.status_code == 200, answer.text
    return counts_of(answer.json()["usage"])


async def stream(client, body, headers, *, is_broken):
    body = {**body, "stream": True, "stream_options": {"include_usage": True}}
    given, usage, error = 0, None, None
    async with client.stream("POST", "/v1/completions", json=body, headers=headers) as answer:
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                event = json.loads(line.removeprefix("data: "))
                error, usage = error or event.get("error"), usage or event.get("usage")
                given += sum(len(choice["text"]) for choice in event.get("choices", ()))
    if is_broken:
        assert error is not None and usage is None
        # The answer had begun, so the prompt counts. Each received letter is one token.
        return collections.Counter(failed=1, prompt=len(body["prompt"]), output=given)
    assert given == usage["completion_tokens"]
    return counts_of(usage)


def counts_of(usage):
    details = usage["antefix"]
    return collections.Counter(
        done=1,
        prompt=usage["prompt_tokens"],
        output=usage["completion_tokens"],
        hit=usage["prompt_cache_hit_tokens"],
        memory=details["hit_memory_tokens"],
        store=details["hit_store_tokens"],
        replayed=details["replayed_tokens"],
        written=details["written_tokens"],
        **{f"miss {details['miss_reason']}": usage["prompt_cache_miss_tokens"]},
    )


def ledgers(records):
    total = collections.Counter()
    for record in records:
        is_failed = record.status == "failed"
        total["failed" if is_failed else "done"] += 1
        total["prompt"] += record.prompt_tokens
        total["output"] += record.output_tokens
        if is_failed:
            continue
        total["hit"] += record.cache_hit_tokens
        total["memory"] += record.hit_memory_tokens
        total["store"] += record.hit_store_tokens
        total["replayed"] += record.replayed_tokens
        total["written"] += record.cache_write_tokens + record.output_write_tokens
        total[f"miss {record.miss_reason.value}"] += record.cache_miss_tokens
    return total


def scrape(address):
    with urllib.request.urlopen(f"http://{address}/metrics") as answer:
        families = list(text_string_to_metric_families(answer.read().decode()))
    found = collections.Counter()
    for sample in (sample for family in families for sample in family.samples):
        found[sample.name, *sorted(sample.labels.items())] += sample.value
    return found


def shown(found, name, **labels):
    """The metric's value, summed over all labels that are not given."""
    return sum(value for key, value in found.items() if key[0] == name and set(labels.items()) <= set(key[1:]))


@pytest.mark.parametrize(
    "num_requests", [50, pytest.param(300, marks=pytest.mark.slow), pytest.param(1_000, marks=pytest.mark.long)]
)
async def test_clients_metrics_and_ledger_agree_after_many_requests(tmp_path, num_requests):
    front = make_front(Workers(), ledger=tmp_path / "ledger", cards=load_cards([DEPLOY / "example.toml"]))
    registry = Registry("router")
    registry.add_in_loop(lambda: accounts_metrics(front.accounts))
    server, chance = MetricsServer(registry, "127.0.0.1", 0), random.Random(7)
    clients, turn = collections.Counter(), asyncio.Semaphore(NUM_AT_ONCE)

    async def one(client, number):
        kind, prompt = prompt_of(chance, number)
        async with turn:
            counted = await ask(client, kind, prompt, number)
        clients.update(counted)

    try:
        async with serving(front) as url, httpx2.AsyncClient(base_url=url, timeout=AT_MOST_S) as client:
            await asyncio.gather(*(one(client, number) for number in range(num_requests)))
            await until(lambda: not front.accounts.num_running)
            found = await asyncio.to_thread(scrape, server.address)
    finally:
        server.close()
    records = [item.record for item in read_settled(tmp_path / "ledger")]

    # 1. Each request has one record, and its client counted it too.
    assert len(records) == num_requests == clients["done"] + clients["failed"]
    assert clients["failed"] == num_requests * 2 // len(KINDS)
    # 2. The ledger agrees with the clients' counts.
    of_clients = {name: number for name, number in clients.items() if number}
    assert of_clients == {name: number for name, number in ledgers(records).items() if number}
    # 3. The metrics for Prometheus agree with the ledger, including failed requests.
    total = collections.Counter()
    for record in records:
        for name, number in record.to_dict().items():
            total[name] += number if isinstance(number, int) else 0
    for name, number in {
        "antefix_ledger_records_total": num_requests,
        "antefix_prompt_tokens_total": total["prompt_tokens"],
        "antefix_hit_tokens_total": total["cache_hit_tokens"],
        "antefix_miss_tokens_total": total["cache_miss_tokens"],
        "antefix_replayed_tokens_total": total["replayed_tokens"],
        "antefix_written_tokens_total": total["cache_write_tokens"] + total["output_write_tokens"],
        "antefix_output_tokens_total": total["output_tokens"],
        "antefix_failed_requests_total": clients["failed"],
        "antefix_ledger_entries_total": 2 * num_requests,
        "antefix_router_retries_total": num_requests // len(KINDS),
    }.items():
        assert shown(found, name) == number, name
    assert shown(found, "antefix_hit_tokens_total", tier="memory") == total["hit_memory_tokens"]
    assert shown(found, "antefix_hit_tokens_total", tier="store") == total["hit_store_tokens"]
    assert shown(found, "antefix_failed_requests_total", error="Overloaded") == num_requests // len(KINDS)
    for reason in REASONS:
        in_ledger = sum(record.cache_miss_tokens for record in records if record.miss_reason.value == reason)
        assert shown(found, "antefix_miss_tokens_total", reason=reason) == in_ledger
    charged = sum((record.price for record in records), Decimal(0))
    assert charged > 0 and shown(found, "antefix_charged_money_total") == pytest.approx(float(charged), rel=1e-12)
    assert shown(found, "antefix_saved_money_total") == pytest.approx(float(sum(r.saved for r in records)), rel=1e-12)
    assert shown(found, "antefix_tenant_tokens_total", part="output") == total["output_tokens"]
