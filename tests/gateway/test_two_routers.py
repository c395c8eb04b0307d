"""Two live routers of one deployment have a ledger each, and share one key for receipts and one bill."""

import json
import urllib.request

import pytest

from antefix_billing.ledger_files import ledgers_of, read_settled
from antefix_billing.receipt import check_receipt
from antefix_billing.reconcile import verify_all
from antefix_billing.usage_record import Status
from antefix_console.deployment import Deployment, DeploymentConfig
from tests.gateway.scripted import MODEL as MODEL_DIR
from tests.on_demand import openai

pytestmark = pytest.mark.services


httpx2 = pytest.importorskip("httpx2")

MODEL = "antefix-tiny"
PROMPT = "The same long prefix for everybody. " * 10


def client_of(router):
    return openai.AsyncOpenAI(base_url=f"http://{router.http_address}/v1", api_key="-", max_retries=0)


def request(number, **settings):
    prompt, key = PROMPT + f"Question {number}?", {"Idempotency-Key": f"q{number}"}
    return {"model": MODEL, "prompt": prompt, "max_tokens": 8, "seed": 1, "extra_headers": key, **settings}


async def ask(router, number):
    async with client_of(router) as client:
        return await client.completions.create(**request(number))


def get(router, path):
    with urllib.request.urlopen(f"http://{router.http_address}{path}") as response:
        return json.load(response)


def records(directory):
    return [item.record for item in read_settled(directory)]


async def test_each_router_keeps_its_own_ledger_and_a_new_one_takes_over_a_dead_ones(tmp_path):
    flags = ("--pool-bytes", "64M")
    config = DeploymentConfig(
        model=MODEL_DIR,
        data_dir=tmp_path / "data",
        num_routers=2,
        http_address="127.0.0.1:0",
        extra_flags={"kvstore": ("--budget-bytes", "256M"), "prefill": flags, "decode": flags},
    )
    async with Deployment(config) as deployment:
        first, second = [process for process in deployment.processes if process.role == "router"]
        answers = [await ask(router, number) for number, router in enumerate((first, second, first, second))]
        # A prompt that was computed for one router's client is a hit for the other router's client.
        assert [bool(answer.usage.prompt_tokens_details.cached_tokens) for answer in answers] == [False] + [True] * 3
        # The receipts of both routers are checked with the same published key.
        keys = {get(router, "/v1/usage/public_key")["public_key"] for router in (first, second)}
        assert len(keys) == 1
        receipt = get(second, "/v1/usage/receipts/q1")
        assert check_receipt(receipt, bytes.fromhex(keys.pop())).ok
        # The same idempotency key at the other router is the same request: it is charged once, and both give its
        # receipt.
        again = await ask(second, 0)
        assert again.choices[0].text == answers[0].choices[0].text
        assert get(second, "/v1/usage/receipts/q0")["payload"] == get(first, "/v1/usage/receipts/q0")["payload"]
        assert (
            get(second, f"/v1/usage/receipts/{answers[0].id}")["payload"]
            == get(first, "/v1/usage/receipts/q0")["payload"]
        )
        # The second router dies in the middle of an answer. Its successor takes over its ledger and closes open
        # requests.
        async with client_of(second) as client:
            stream = await client.completions.create(**request(4, max_tokens=1000, stream=True))
            await anext(aiter(stream))
            await deployment.kill(second)
            with pytest.raises((openai.APIError, httpx2.HTTPError)):
                async for _ in stream:
                    pass
        third = await deployment.start_router()
        assert third.ledger_dir == second.ledger_dir != first.ledger_dir
        assert records(third.ledger_dir)[-1].status is Status.CRASHED
        await ask(third, 5)
        ledgers = ledgers_of([config.data_dir])
        assert [len(records(ledger)) for ledger in ledgers] == [2, 4]
        verdict = verify_all(ledgers, store_log=config.usage_log_dir, anchors={})
        assert verdict.ok, verdict.to_json()
