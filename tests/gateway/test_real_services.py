"""Real processes and real clients: conversations hit, the store's log supports the bill, and a router is killed."""

import asyncio
import dataclasses
import json
import sys
import urllib.request

import grpc
import pytest

from antefix import rpc
from antefix.clients import RouterClient
from antefix.sampling import Sampling
from antefix.v1 import usage_pb2, usage_pb2_grpc
from antefix_billing.ledger_files import read_settled
from antefix_billing.pricing import priced
from antefix_billing.ratecard import load_cards
from antefix_billing.receipt import check_receipt
from antefix_billing.reconcile import verify
from antefix_billing.usage_record import Status
from antefix_console.commands import usage as cli
from antefix_console.deployment import Deployment, DeploymentConfig
from tests.billing.test_ratecard import DEPLOY
from tests.gateway.turns import BLOCK, Turn, check_hits
from tests.on_demand import anthropic, openai
from tests.small_worker_model import small_text_model
from tests.waiting import AT_MOST_S, until

httpx2 = pytest.importorskip("httpx2")

MODEL = "antefix-tiny"
SMALL_POOL = ("--pool-bytes", "64M")


@pytest.fixture
def config(tmp_path):
    return DeploymentConfig(
        model=small_text_model(),
        data_dir=tmp_path / "data",
        http_address="127.0.0.1:0",
        ratecards=(str(DEPLOY / "example.toml"),),
        extra_flags={"kvstore": ("--budget-bytes", "256M"), "prefill": SMALL_POOL, "decode": SMALL_POOL},
    )


@pytest.fixture
def deploy(config):
    return Deployment(config)


def url_of(deployment):
    return "http://" + deployment.one("router").http_address


def settled(deployment):
    return list(read_settled(deployment.config.ledger_dir))


async def verified(deployment):
    """The verdict on the ledger, once it is right: readers on this host report their reads to the store later."""

    def verdict():
        found = verify(deployment.config.ledger_dir, store_log=deployment.config.usage_log_dir)
        assert found.ok, found.to_json()
        return found

    return await until(verdict, "the ledger is right", despite=AssertionError)


async def openai_turns(deployment, num_turns, about=""):
    """(prompt, answer, hit) of each turn. Each turn resends the whole conversation.

    about: a text that makes it unique.
    """
    turns = []
    async with openai.AsyncOpenAI(base_url=url_of(deployment) + "/v1", api_key="-", max_retries=0) as client:
        messages = [{"role": "system", "content": f"{about} You are brief. " * 20}]
        for number in range(num_turns):
            messages.append({"role": "user", "content": f"Question {number}: what comes next? <|end|>"})
            answer = await client.chat.completions.create(
                model=MODEL, messages=messages, max_tokens=80, temperature=1.0, seed=number
            )
            messages.append(answer.choices[0].message.model_dump(exclude_none=True))
            usage = answer.usage
            turns.append((usage.prompt_tokens, usage.completion_tokens, usage.prompt_tokens_details.cached_tokens))
    return turns


async def anthropic_turns(deployment, num_turns, about=""):
    turns = []
    async with anthropic.AsyncAnthropic(base_url=url_of(deployment), api_key="-", max_retries=0) as client:
        messages, system = [], f"{about} Be brief. " * 20
        for number in range(num_turns):
            messages.append({"role": "user", "content": f"Another question, {number}. " * 6})
            async with client.messages.stream(
                model=MODEL,
                messages=messages,
                system=system,
                max_tokens=80,
                extra_body={"temperature": 1.0, "seed": number},
            ) as stream:
                answer = await stream.get_final_message()
            messages.append({"role": "assistant", "content": [block.model_dump() for block in answer.content]})
            usage = answer.usage
            prompt = usage.input_tokens + usage.cache_creation_input_tokens + usage.cache_read_input_tokens
            turns.append((prompt, usage.output_tokens, usage.cache_read_input_tokens))
    return turns


@pytest.mark.parametrize("turns_of", [openai_turns, anthropic_turns])
async def test_a_resent_conversation_hits_to_the_last_full_block(running, turns_of):
    turns = await turns_of(running, 4, "resent")
    check_hits([Turn(*each) for each in turns], turns_of.__name__)
    await verified(running)
    assert [item.record.cache_hit_tokens for item in running.settled()] == [hit for _, _, hit in turns]


async def test_log_probabilities_of_a_hit_are_those_of_the_cold_run(running):
    """They are equal through all services, to the last digit, and callers over gRPC get the same numbers."""
    prompt = "Twelve drummers drumming, eleven pipers piping. " * 8 + "What comes next?"
    settings = {"model": MODEL, "prompt": prompt, "max_tokens": 24, "temperature": 0.7, "seed": 3, "logprobs": 5}
    async with openai.AsyncOpenAI(base_url=running.url + "/v1", api_key="-", max_retries=0) as client:
        cold, hit = [await client.completions.create(**settings) for _ in range(2)]
    client = RouterClient(running.one("router").address)
    sampling = Sampling(max_tokens=24, temperature=0.7, seed=3, num_top_logprobs=5)
    over_grpc = [each async for message in client.generate(prompt, sampling) for each in message.logprobs]
    assert (cold.usage.prompt_cache_hit_tokens, hit.usage.prompt_cache_hit_tokens) == (0, len(prompt) // BLOCK * BLOCK)
    assert hit.choices[0].logprobs == cold.choices[0].logprobs and len(cold.choices[0].logprobs.tokens) == 24
    assert [each.logprob for each in over_grpc] == cold.choices[0].logprobs.token_logprobs


async def test_billed_hits_are_supported_by_the_stores_log_across_restarts(deploy, capsys):
    async with deploy as deployment:
        await openai_turns(deployment, 2)
        # Workers restart and lose their memory, so the next hits are read from the store.
        for role in ("prefill", "decode"):
            await deployment.kill(deployment.one(role))
            await deployment.start_worker(role)
        await deployment.kill(deployment.one("router"))
        await deployment.start_router()
        await openai_turns(deployment, 2)
        verdict = await verified(deployment)
        assert verdict.unsupported_hits == 0, verdict.to_json()
        records = [item.record for item in settled(deployment)]
        assert records[2].hit_store_tokens > 0
        ledger, log = deployment.config.ledger_dir, deployment.config.usage_log_dir
    command = ("usage", "verify", "--ledger", str(ledger), "--store-log", str(log))
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "antefix_console", *command), stdout=asyncio.subprocess.PIPE
    )
    out, _ = await process.communicate()
    assert process.returncode == 0 and json.loads(out)["unsupported_hits"] == 0
    # A billed hit that the store's log does not have is reported.
    for path in log.iterdir():
        path.unlink()
    assert not verify(ledger, store_log=log).ok


async def test_a_killed_router_bills_what_its_client_was_given_and_a_retry_the_rest(deploy):
    settings = {"model": MODEL, "prompt": "abc " * 50, "max_tokens": 400, "temperature": 1.0, "seed": 2}
    headers = {"Idempotency-Key": "once"}

    async def ask(deployment, num_chunks=None):
        """The text of a stream. With `num_chunks`, only of that many chunks, after which the router is killed."""
        text = ""
        async with openai.AsyncOpenAI(base_url=url_of(deployment) + "/v1", api_key="-", max_retries=0) as client:
            stream = await client.completions.create(**settings, extra_headers=headers, stream=True)
            chunks = aiter(stream)
            while (chunk := await anext(chunks, None)) is not None:
                text += chunk.choices[0].text
                if num_chunks is not None and (num_chunks := num_chunks - 1) == 0:
                    await deployment.kill(deployment.one("router"))
        return text

    async with deploy as deployment:
        with pytest.raises((openai.APIError, httpx2.HTTPError)):
            await ask(deployment, 10)
        await deployment.start_router()
        (crashed,) = [item.record for item in settled(deployment)]
        assert crashed.status is Status.CRASHED and crashed.price > 0
        assert crashed.prompt_tokens == 200 and 10 <= crashed.output_tokens < 400
        await ask(deployment)
        whole = settled(deployment)[-1].record
        assert whole.status in (Status.STOP, Status.LENGTH) and whole.output_tokens >= crashed.output_tokens
        assert (whole.attempt, whole.paid_before) == (2, crashed.price) and whole.price < whole.paid
        # The prompt was stored before the kill. It was paid for as a miss, and now it is a hit.
        full = priced(dataclasses.replace(whole, paid_before=0), load_cards([DEPLOY / "example.toml"])).price
        assert whole.paid == max(crashed.price, full)
        verdict = await verified(deployment)
        assert verdict.open_requests == 0, verdict.to_json()


async def test_a_cache_breakpoint_leaves_a_checkpoint_where_the_strategy_would_not(running):
    """The client marks the end of its long system text.

    A new question after that text resumes there without a replay.
    """
    system = [{"type": "text", "text": "The rules are these. " * 30, "cache_control": {"type": "ephemeral"}}]
    marked = len("<" + system[0]["text"]) // BLOCK * BLOCK

    async def ask(client, question, blocks):
        text = question * 40
        answer = await client.messages.create(
            model=MODEL,
            system=blocks,
            max_tokens=2,
            messages=[{"role": "user", "content": text}],
            extra_body={"seed": 1},
        )
        return answer.usage.cache_read_input_tokens

    async with anthropic.AsyncAnthropic(base_url=running.url, api_key="-", max_retries=0) as client:
        plain = [{"type": "text", "text": "Other rules hold now. " * 30}]
        hits = [await ask(client, f"{number} apples? ", system) for number in range(2)]
        unmarked = [await ask(client, f"{number} pears? ", plain) for number in range(2)]
    records = [item.record for item in running.settled()]
    assert hits == [0, marked] and records[1].restore_plan == "checkpoint"
    # Without the mark the prefix's blocks are stored but no window state, so the prefix is replayed or computed again.
    assert unmarked[0] == 0 and records[3].restore_plan != "checkpoint"


@pytest.mark.services
async def test_a_decode_worker_that_dies_in_mid_answer_leaves_one_record(config):
    """Another worker continues the answer. The client's usage and charge are those of the tokens that it received."""
    async with Deployment(dataclasses.replace(config, num_decode=2)) as deployment:
        async with openai.AsyncOpenAI(base_url=url_of(deployment) + "/v1", api_key="-", max_retries=0) as client:
            settings = {"prompt": "def f(x):\n" * 30, "max_tokens": 120, "temperature": 1.0, "seed": 5}
            whole = await client.completions.create(model=MODEL, **settings)
            stream = await client.completions.create(
                model=MODEL, **settings, stream=True, stream_options={"include_usage": True}
            )
            text, usage, num_chunks = "", None, 0
            async for chunk in stream:
                text += "".join(choice.text for choice in chunk.choices)
                usage = chunk.usage or usage
                num_chunks += 1
                if num_chunks == 20:
                    # The router places the request on the worker that has the prompt in memory, which served the first
                    # request.
                    await deployment.kill(deployment.one("decode"))
        first, second = [item.record for item in settled(deployment)]
    assert text == whole.choices[0].text
    assert (usage.prompt_tokens, usage.completion_tokens) == (second.prompt_tokens, second.output_tokens)
    assert (first.output_tokens, first.status) == (second.output_tokens, second.status)


async def test_a_receipt_is_fetched_and_checked_with_the_published_key(running):
    await openai_turns(running, 2, "receipt")
    request_id = running.settled()[1].record.request_id

    def get(path):
        with urllib.request.urlopen(running.url + path) as response:
            return json.load(response)

    receipt = await asyncio.to_thread(get, f"/v1/usage/receipts/{request_id}")
    key = bytes.fromhex((await asyncio.to_thread(get, "/v1/usage/public_key"))["public_key"])
    checked = check_receipt(receipt, key, load_cards([DEPLOY / "example.toml"]))
    assert checked.ok and checked.record.cache_hit_tokens > 0 and checked.record.price > 0


async def test_usage_is_exported_over_grpc_from_a_cursor(running):
    await openai_turns(running, 3, "export")
    async with rpc.channel(running.one("router").address) as channel:
        stub = usage_pb2_grpc.UsageServiceStub(channel)

        async def export(cursor):
            found = []
            async for message in stub.Export(usage_pb2.ExportRequest(cursor=cursor), timeout=AT_MOST_S):
                found += message.records
            return found

        everything = await export(running.cursor)
        assert [r.record.request_id for r in everything] == [i.record.request_id for i in running.settled()]
        assert [r.record.price for r in await export(everything[0].sequence)] == [
            r.record.price for r in everything[1:]
        ]
        everyones = await export(0)
        assert [r.record.request_id for r in everyones[-3:]] == [r.record.request_id for r in everything]
        with pytest.raises(grpc.aio.AioRpcError):
            await stub.GetReceipt(usage_pb2.GetReceiptRequest(request_id="nobody's"), timeout=AT_MOST_S)


async def test_curl_speaks_to_it(running):
    ask = [{"role": "user", "content": "hi"}]
    body = json.dumps({"model": MODEL, "messages": ask, "max_tokens": 3, "stream": True, "seed": 1})
    command = ("curl", "-sN", running.url + "/v1/chat/completions", "-H", "content-type: application/json")
    process = await asyncio.create_subprocess_exec(*command, "-d", body, stdout=asyncio.subprocess.PIPE)
    out, _ = await process.communicate()
    lines = [line for line in out.decode().splitlines() if line]
    assert lines[-1] == "data: [DONE]" and all(line.startswith("data: ") for line in lines)


def test_the_usage_commands_have_help(capsys):
    from argparse import ArgumentParser

    parser = ArgumentParser()
    cli.add_parser(parser.add_subparsers())
    with pytest.raises(SystemExit):
        parser.parse_args(["usage", "verify", "--help"])
    assert "--store-log" in capsys.readouterr().out
