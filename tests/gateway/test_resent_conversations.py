"""Agents resend everything, every turn: over real services, in DeepSeek-V4's format, each turn hits what came before.

The small model calls no tools, so the history has calls as a client would send them back. The model's own answers, even
cut-off ones, are resent as the clients give them.
"""

import asyncio
import itertools
import json

import pytest

from antefix_console.cli import main
from antefix_console.deployment import DeploymentConfig
from tests.gateway.turns import BLOCK, Turn, check_hits
from tests.on_demand import anthropic, openai
from tests.running_deployment import SMALL_POOL, deployed
from tests.small_worker_model import small_text_model

pytestmark = pytest.mark.services


MODEL, NUM_TURNS = "antefix-tiny", 3
SCHEMA = {"type": "object", "properties": {"path": {"type": "string"}}}
TOOL = {"name": "read", "description": "Reads a file.", "parameters": SCHEMA}
SYSTEM = ["You are an agent in a shell. ", "Be brief, and answer in plain text."]


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("resent") / "data"


@pytest.fixture(scope="module")
def url(data_dir):
    """One deployment for all conversations here, because a start is expensive."""
    config = DeploymentConfig(
        model=small_text_model(),
        data_dir=data_dir,
        http_address="127.0.0.1:0",
        chat_format="deepseek-v4",
        extra_flags={"kvstore": ("--budget-bytes", "256M"), "prefill": SMALL_POOL, "decode": SMALL_POOL},
    )
    with deployed(config) as deployment:
        yield "http://" + deployment.one("router").http_address


async def openai_turns(url, name, *, effort, tools):
    """Turns with content in parts, calls and their results in between, and answers as the client dumps them."""
    turns = []
    messages = [{"role": "system", "content": [{"type": "text", "text": text} for text in (name, *SYSTEM)]}]
    settings = {"tools": [{"type": "function", "function": TOOL}]} if tools else {}
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="-", max_retries=0) as client:
        for number in range(NUM_TURNS):
            parts = [f"Question {number}: what is in the file? ", "Look at it. " * 4]
            messages.append({"role": "user", "content": [{"type": "text", "text": text} for text in parts]})
            if tools and number % 2:
                call = {"id": f"c{number}", "type": "function"}
                function = {"name": "read", "arguments": '{"path": "/etc/motd",  "lines": [1, 2]}'}
                messages.append({"role": "assistant", "content": None, "tool_calls": [{**call, "function": function}]})
                messages.append({"role": "tool", "tool_call_id": f"c{number}", "content": f"line {number}\n" * 5})
            answer = await client.chat.completions.create(
                model=MODEL, messages=messages, max_tokens=50, seed=number, reasoning_effort=effort, **settings
            )
            messages.append(answer.choices[0].message.model_dump(exclude_none=True))
            usage = answer.usage
            turns.append(Turn(usage.prompt_tokens, usage.completion_tokens, usage.prompt_cache_hit_tokens))
    return turns


async def anthropic_turns(url, name, *, effort, tools, billing=None):
    turns, messages = [], []
    settings = {"tools": [{"name": "read", "description": "Reads a file.", "input_schema": SCHEMA}]} if tools else {}
    thinks = {"type": "disabled"} if effort == "none" else {"type": "enabled", "budget_tokens": 1024}
    async with anthropic.AsyncAnthropic(base_url=url, api_key="-", max_retries=0) as client:
        for number in range(NUM_TURNS):
            question = [{"type": "text", "text": f"Question {number}: "}, {"type": "text", "text": "what is it? " * 5}]
            if tools and number % 2:
                messages.append({"role": "user", "content": "Look at the file."})
                use = {"type": "tool_use", "id": f"c{number}", "name": "read", "input": {"path": "/etc/motd"}}
                messages.append({"role": "assistant", "content": [{"type": "text", "text": "I look."}, use]})
                result = {"type": "tool_result", "tool_use_id": f"c{number}", "content": f"line {number}\n" * 5}
                question = [result, *question]
            messages.append({"role": "user", "content": question})
            lines = (name, *SYSTEM) if billing is None else (billing(), name, *SYSTEM)
            ids = {"device_id": "d", "account_uuid": "", "session_id": f"{number}"}
            answer = await client.messages.create(
                model=MODEL,
                system=[{"type": "text", "text": text} for text in lines],
                messages=messages,
                max_tokens=50,
                thinking=thinks,
                metadata={"user_id": json.dumps(ids)},
                extra_body={"seed": number},
                **settings,
            )
            messages.append({"role": "assistant", "content": [block.model_dump() for block in answer.content]})
            usage = answer.usage
            prompt = usage.input_tokens + usage.cache_creation_input_tokens + usage.cache_read_input_tokens
            turns.append(Turn(prompt, usage.output_tokens, usage.cache_read_input_tokens))
    return turns


async def responses_turns(url, name, *, effort, tools):
    """Turns of an agent with `store: false`, which resends reasoning items, calls and messages as they came."""
    turns, items = [], []
    settings = {"tools": [{"type": "function", **TOOL}]} if tools else {}
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="-", max_retries=0) as client:
        for number in range(NUM_TURNS):
            parts = [
                {"type": "input_text", "text": f"Question {number}: "},
                {"type": "input_text", "text": "what? " * 8},
            ]
            items.append({"type": "message", "role": "user", "content": parts})
            if tools and number % 2:
                call = {"call_id": f"c{number}", "name": "read", "arguments": '{"path": "/etc/motd"}'}
                items.append({"type": "function_call", **call})
                output = {"call_id": f"c{number}", "output": f"line {number}\n" * 5}
                items.append({"type": "function_call_output", **output})
            answer = await client.responses.create(
                model=MODEL,
                instructions=name + "".join(SYSTEM),
                input=items,
                max_output_tokens=50,
                reasoning={"effort": effort},
                include=["reasoning.encrypted_content"],
                store=False,
                extra_body={"seed": number},
                **settings,
            )
            items += [item.model_dump(exclude_none=True) for item in answer.output]
            usage = answer.usage
            turns.append(Turn(usage.input_tokens, usage.output_tokens, usage.input_tokens_details.cached_tokens))
    return turns


async def claude_code_turns(url, name, *, effort, tools):
    """Turns whose first line changes with every request, and whose `user_id` names other sessions."""
    number = itertools.count()

    def billing():
        return (
            f"x-anthropic-billing-header: cc_version=2.1.197.{next(number):03x}; cc_entrypoint=cli; cch={name[:1]}ab;"
        )

    return await anthropic_turns(url, name, effort=effort, tools=tools, billing=billing)


@pytest.mark.parametrize("turns_of", [openai_turns, anthropic_turns])
async def test_each_turn_hits_to_the_last_full_block_that_the_format_keeps(url, turns_of):
    for effort, tools in (("none", False), ("none", True), ("high", True)):
        check_hits(await turns_of(url, f"{effort} {tools} ", effort=effort, tools=tools), effort, tools)
    # Without tools the format drops the reasoning of earlier turns, so the kept prefix ends before the opening tag.
    turns = await turns_of(url, "dropped ", effort="high", tools=False)
    for before, turn in itertools.pairwise(turns):
        kept = before.prompt - len("think>")
        # The prompt's end has a checkpoint. If the tag crosses a block boundary, the boundary before may have none.
        assert turn.hit <= kept // BLOCK * BLOCK
        if kept // BLOCK == (before.prompt - 1) // BLOCK:
            assert turn.hit == kept // BLOCK * BLOCK, turns


async def test_so_do_reasoning_items_and_requests_whose_first_line_changes(url, data_dir, tmp_path, capsys):
    for turns_of in (responses_turns, claude_code_turns):
        check_hits(await turns_of(url, turns_of.__name__, effort="high", tools=True), turns_of)
    # Another session has another first line, and hits system text and tools. Another account hits nothing.
    hits = []
    async with anthropic.AsyncAnthropic(base_url=url, api_key="-", max_retries=0) as client:
        for session, account in enumerate("aab"):
            line = f"x-anthropic-billing-header: cc_version=2.1.197.{session}; cch=a{session};"
            body = {
                "model": MODEL,
                "max_tokens": 2,
                "extra_body": {"seed": 1},
                "system": [{"type": "text", "text": line}, {"type": "text", "text": "You are careful. " * 40}],
                "tools": [{"name": "read", "description": "Reads a file.", "input_schema": SCHEMA}],
                "messages": [{"role": "user", "content": f"{session} is a number. " * 20}],
                "metadata": {"user_id": json.dumps({"account_uuid": account, "session_id": f"s{session}"})},
            }
            answer = await client.messages.create(**body)
            hits.append(answer.usage.cache_read_input_tokens)
    assert hits[0] == hits[2] == 0 and hits[1] > len("You are careful. " * 40) + 1000, hits

    async def explain(*flags):
        flags = ["explain", "--model", str(small_text_model()), "--data-dir", str(data_dir), "--json", *flags]
        assert await asyncio.to_thread(main, flags) == 0
        return json.loads(capsys.readouterr().out)

    # The last request is explained by its body and by its id, and both give the same prompt.
    (tmp_path / "body.json").write_text(json.dumps(body))
    asked = ("--messages", str(tmp_path / "body.json"), "--api", "anthropic")
    usage = answer.usage
    stored = (await explain(*asked))["stored_tokens"]
    num_tokens = usage.input_tokens + usage.cache_creation_input_tokens + usage.cache_read_input_tokens
    assert stored == num_tokens // BLOCK * BLOCK
    recorded = await explain("--request-id", answer.id, "--against", str(tmp_path / "body.json"), "--api", "anthropic")
    assert recorded["parting"] == {"blocks_min": stored // BLOCK, "blocks_max": stored // BLOCK}
    assert recorded["request"]["user"] == '{"account_uuid":"b"}' and not recorded["request"]["prefix_volatile"]
