"""Whole sessions in the shapes of the agents that people run: a tool call, a picture, late system text, a resumed turn.

The requests are synthetic and have the fields that those clients send. Each must be answered, and its prompt must hold
all that the request has. Each prompt must begin with the previous prompt and answer, token for token, so that it hits.
"""

import json

import httpx2
import pytest

from tests.gateway.bodies import PIXEL
from tests.gateway.scripted import Script, make_front, serving
from tests.waiting import AT_MOST_S

SHELL = {"type": "object", "properties": {"command": {"type": "string"}}, "required": ["command"]}
CALL = (
    '\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name="{name}">\n'
    '<｜DSML｜parameter name="command" string="true">ls | head\n</｜DSML｜parameter>\n</｜DSML｜invoke>\n'
    "</｜DSML｜tool_calls>"
)
INPUT = {"command": "ls | head\n"}


class Session:
    """An agent's session: the state that it keeps between requests."""

    def __init__(self, client, script):
        self._client, self._script = client, script

    async def send(self, address, body, **headers):
        answer = await self._client.post(address, json=body, headers=headers)
        assert answer.status_code == 200, answer.text
        prompts, emitted = self._script.prompts, [each.samples[0].emitted for each in self._script.generations]
        if len(prompts) > 1:
            so_far = prompts[-2] + emitted[-2]
            assert prompts[-1][: len(so_far)] == so_far, "the prompt does not continue from the last answer"
        self.prompt = bytes(t for t in prompts[-1] if t < 256).decode(errors="replace")
        self.left_out = answer.headers.get("antefix-left-out", "")
        self.ignored = answer.headers.get("antefix-ignored", "").split(", ")
        return [
            json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")
        ] or answer.json()


@pytest.fixture
async def open_session():
    """open_session(name of the tool that the model calls first)."""
    script, stack = Script(), []

    async def open_session(name):
        call = CALL.format(name=name)
        script.say = lambda prompt: (
            "I see.</think>Done." if "<tool_result>" in prompt else "Let me look.</think>I look." + call
        )
        context = serving(make_front(script, ledger=None), chat_format="deepseek-v4")
        url = await context.__aenter__()
        client = httpx2.AsyncClient(base_url=url, timeout=AT_MOST_S)
        stack.extend((client.aclose, lambda: context.__aexit__(None, None, None)))
        return Session(client, script)

    yield open_session
    for close in stack:
        await close()


def blocks_of(events):
    """The content of an Anthropic stream, put together as clients do."""
    blocks = {}
    for event in events:
        if event["type"] == "content_block_start":
            blocks[event["index"]] = {**event["content_block"], "json": ""}
        if event["type"] == "content_block_delta":
            block, delta = blocks[event["index"]], event["delta"]
            for kind, name in (("thinking", "thinking"), ("text", "text"), ("signature", "signature")):
                block[name] = block.get(name, "") + delta[kind] if kind in delta else block.get(name)
            block["json"] += delta.get("partial_json", "")
    found = []
    for block in blocks.values():
        text = block.pop("json")
        if block["type"] == "tool_use":
            block["input"] = json.loads(text or "{}")
        found.append({name: value for name, value in block.items() if value is not None})
    return found


async def test_claude_code(open_session):
    session = await open_session("Bash")
    ids = {"device_id": "d" * 64, "account_uuid": "", "session_id": "5f2b6e1c-0000-4000-8000-000000000000"}
    image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": PIXEL}}
    mark = {"cache_control": {"type": "ephemeral"}}
    body = {
        "model": "claude-opus-4-8",
        "max_tokens": 32_000,
        "stream": True,
        "system": [
            {"type": "text", "text": "You are an agent in a terminal."},
            {
                "type": "text",
                "text": "Be brief.",
                "cache_control": {"type": "ephemeral", "ttl": "1h", "scope": "global"},
            },
        ],
        "tools": [
            {"name": "Bash", "description": "Runs.", "input_schema": SHELL, "eager_input_streaming": True},
            {"name": "Later", "description": "L.", "input_schema": SHELL, "defer_loading": True},
            {"type": "web_search_20250305", "name": "web_search", "max_uses": 8},
        ],
        "metadata": {"user_id": json.dumps(ids)},
        "thinking": {"type": "adaptive"},
        "output_config": {"effort": "high"},
        "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
    }
    reminder = {"type": "text", "text": "<system-reminder>The date is known.</system-reminder>"}
    messages = [
        {"role": "user", "content": [reminder, {"type": "text", "text": "Look around.", **mark}]},
        {"role": "system", "content": "Mode: default."},
    ]
    betas = {"anthropic-beta": "claude-code-20250219,context-management-2025-06-27"}

    async def send():
        address = "/v1/messages?beta=true"
        return blocks_of(await session.send(address, {**body, "messages": messages}, **betas))

    first = await send()
    assert [block["type"] for block in first] == ["thinking", "text", "tool_use"] and first[2]["input"] == INPUT
    assert session.left_out == "tools[2] (web_search_20250305)" and "Mode: default." in session.prompt
    assert {"anthropic-beta", "tools[0].eager_input_streaming", "system[1].cache_control.scope"} <= {*session.ignored}
    del messages[0]["content"][1]["cache_control"]  # clients move the mark from turn to turn
    result = {"type": "tool_result", "tool_use_id": first[2]["id"], "content": [image], "is_error": False, **mark}
    messages += [{"role": "assistant", "content": first}, {"role": "user", "content": [result]}]
    second = await send()
    assert second[1]["text"] == "Done." and "[image: not shown" in session.prompt
    # The session is resumed later. The picture and all other content are still in the prompt.
    messages += [{"role": "assistant", "content": second}, {"role": "user", "content": "and now?"}]
    await send()
    assert "messages[3].content[0].content[0] (image)" in session.left_out


async def test_codex(open_session):
    session = await open_session("exec_command")
    body = {
        "model": "gpt-5.2-codex",
        "instructions": "You are an agent in a terminal.",
        "tools": [
            {"type": "function", "name": "exec_command", "description": "R.", "strict": False, "parameters": SHELL},
            {
                "type": "custom",
                "name": "apply_patch",
                "format": {"type": "grammar", "syntax": "lark", "definition": "s"},
            },
            {
                "type": "namespace",
                "name": "agents",
                "tools": [{"type": "function", "name": "spawn", "parameters": SHELL}],
            },
            {"type": "web_search", "external_web_access": False},
        ],
        "tool_choice": "auto",
        "parallel_tool_calls": True,
        "reasoning": {"effort": "medium", "summary": "auto"},
        "store": False,
        "stream": True,
        "include": ["reasoning.encrypted_content"],
        "prompt_cache_key": "019a",
        "text": {"verbosity": "low"},
        "client_metadata": {"x-codex-installation-id": "i"},
    }
    items = [
        {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "Sandbox: read-only."}]},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Look around."}]},
    ]

    async def send():
        return (await session.send("/v1/responses", {**body, "input": items}))[-1]["response"]["output"]

    reasoning, message, call = await send()
    assert {"client_metadata", "text.verbosity"} <= {*session.ignored}
    assert json.loads(call["arguments"]) == INPUT and session.left_out == "tools[1] (custom), tools[3] (web_search)"
    picture = [{"type": "input_image", "image_url": f"data:image/png;base64,{PIXEL}"}]
    items += [
        # The client keeps no ids and no states, and only the sealed part of reasoning.
        {"type": "reasoning", "summary": [], "encrypted_content": reasoning["encrypted_content"]},
        {
            "type": "message",
            "role": "assistant",
            "content": [{"type": "output_text", "text": message["content"][0]["text"]}],
        },
        {"type": "function_call", "name": call["name"], "arguments": call["arguments"], "call_id": call["call_id"]},
        {"type": "function_call_output", "call_id": call["call_id"], "output": picture},
    ]
    reasoning, message = await send()
    items += [
        {"type": "reasoning", "summary": [], "encrypted_content": reasoning["encrypted_content"]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Done."}]},
        # The session is resumed in another sandbox.
        {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "Sandbox: none."}]},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "And now?"}]},
    ]
    await send()
    assert "Sandbox: none.\n\nAnd now?" in session.prompt and "[image: not shown" in session.prompt


async def test_opencode(open_session):
    session = await open_session("bash")
    mark = {"cache_control": {"type": "ephemeral"}}
    body = {
        "model": "claude-sonnet-4-5",
        "max_tokens": 32_000,
        "stream": True,
        "stream_options": {"include_usage": True},
        "tool_choice": "auto",
        "tools": [{"type": "function", "function": {"name": "bash", "description": "R.", "parameters": SHELL}}],
    }
    messages = [
        {"role": "system", "content": "You are an agent in a terminal.", **mark},
        {"role": "user", "content": "Look around.", **mark},
    ]

    async def send():
        events = await session.send("/v1/chat/completions", {**body, "messages": messages})
        said = {"role": "assistant", "content": "", "reasoning_content": ""}
        calls = {}
        for delta in (choice["delta"] for event in events for choice in event["choices"]):
            said["content"] += delta.get("content") or ""
            said["reasoning_content"] += delta.get("reasoning_content") or ""
            for piece in delta.get("tool_calls", []):
                call = calls.setdefault(piece["index"], {"type": "function", "function": {"name": "", "arguments": ""}})
                call["id"] = piece.get("id", call.get("id"))
                for name, value in piece["function"].items():
                    call["function"][name] += value
        return {**said, **({"tool_calls": [*calls.values()]} if calls else {})}

    first = await send()
    assert (
        session._script.requests[0].breakpoints and json.loads(first["tool_calls"][0]["function"]["arguments"]) == INPUT
    )
    messages += [
        first,
        {"role": "tool", "tool_call_id": first["tool_calls"][0]["id"], "content": "a picture"},
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PIXEL}"}}]},
    ]
    messages += [await send(), {"role": "user", "content": "and now?", **mark}]
    await send()
    assert "[image: not shown" in session.prompt


async def test_a_sdk_that_speaks_anthropic(open_session):
    """The SDK keeps thinking only if it has a signature, and sends its own fields with tools."""
    session = await open_session("bash")
    body = {
        "model": "antefix-tiny",
        "max_tokens": 4096,
        "stream": True,
        "thinking": {"type": "enabled", "budget_tokens": 2000},
        "tools": [{"name": "bash", "input_schema": SHELL, "eager_input_streaming": True}],
        "tool_choice": {"type": "auto"},
    }
    messages = [{"role": "user", "content": [{"type": "text", "text": "Look around."}]}]
    first = blocks_of(await session.send("/v1/messages", {**body, "messages": messages}))
    kept = [block for block in first if block["type"] != "thinking" or block.get("signature")]
    assert [block["type"] for block in kept] == ["thinking", "text", "tool_use"]
    result = {"type": "tool_result", "tool_use_id": kept[2]["id"], "content": [{"type": "text", "text": "a.txt"}]}
    messages += [{"role": "assistant", "content": kept}, {"role": "user", "content": [result]}]
    await session.send("/v1/messages", {**body, "messages": messages})
