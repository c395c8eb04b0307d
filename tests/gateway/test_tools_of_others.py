"""Tools that only their provider runs are left out and named in a header. Grouped functions keep their own names."""

import json

import pytest

from tests.gateway.agents_door import (
    CHAT_URL,
    MESSAGES_URL,
    MODEL,
    RESPONSES_URL,
    asked,
    chat,
    user,
)
from tests.gateway.bodies import SCHEMA

OTHERS_TOOLS = [
    (MESSAGES_URL, {"type": "web_search_20250305", "name": "web_search", "max_uses": 8}, "web_search_20250305"),
    (MESSAGES_URL, {"type": "bash_20250124", "name": "bash"}, "bash_20250124"),
    (MESSAGES_URL, {"type": "mcp_toolset", "mcp_server_name": "x"}, "mcp_toolset"),
    (CHAT_URL, {"type": "custom", "custom": {"name": "g", "format": {"type": "grammar"}}}, "custom"),
    (CHAT_URL, {"type": "web_search"}, "web_search"),
    (RESPONSES_URL, {"type": "web_search", "external_web_access": False}, "web_search"),
    (
        RESPONSES_URL,
        {"type": "custom", "name": "apply_patch", "format": {"type": "grammar", "syntax": "lark"}},
        "custom",
    ),
    (RESPONSES_URL, {"type": "local_shell"}, "local_shell"),
]


@pytest.mark.parametrize(("address", "tool", "kind"), OTHERS_TOOLS, ids=lambda value: str(value)[:30])
async def test_tools_that_nobody_here_runs_are_left_out_and_named(door, address, tool, kind):
    base = {"model": MODEL, "input": "hi"} if address == RESPONSES_URL else asked(user("hi"))
    answer = await door.ok(address, {**base, "tools": [tool]})
    assert answer.headers["antefix-left-out"] == f"tools[0] ({kind})" and "antefix-ignored" not in answer.headers
    assert "## Tools" not in door.prompt


async def test_servers_of_tools_are_left_out_and_named(door):
    answer = await door.ok(MESSAGES_URL, asked(user("hi"), mcp_servers=[{"type": "url", "url": "https://x.org"}]))
    assert answer.headers["antefix-left-out"] == "mcp_servers (1 servers)"
    answer = await door.ok(CHAT_URL, chat(user("hi"), web_search_options={}))
    assert "antefix-left-out" not in answer.headers or "web_search" in answer.headers["antefix-left-out"]


NAMESPACE = {
    "type": "namespace",
    "name": "agents",
    "description": "Others.",
    "tools": [{"type": "function", "name": "spawn", "parameters": SCHEMA}, {"type": "web_search"}],
}


@pytest.mark.parametrize("stream", [False, True])
async def test_groups_of_functions_are_flattened_and_called_by_their_own_names(door, stream):
    door.script.say = lambda prompt: (
        '</think>\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name="agents__spawn">\n</｜DSML｜invoke>\n'
        "</｜DSML｜tool_calls>"
    )
    answer = await door.ok(RESPONSES_URL, {"model": MODEL, "input": "hi", "tools": [NAMESPACE], "stream": stream})
    assert answer.headers["antefix-flattened"] == "tools[0] (namespace agents)"
    assert answer.headers["antefix-left-out"] == "tools[0].tools[1] (web_search)"
    assert '{"name": "agents__spawn", ' in door.prompt
    output = answer.json()["output"] if not stream else events_of(answer)[-1]["response"]["output"]
    (call,) = [item for item in output if item["type"] == "function_call"]
    assert (call["name"], call["namespace"], call["arguments"]) == ("spawn", "agents", "{}")
    back = {"type": "function_call_output", "call_id": call["call_id"], "output": "ok"}
    await door.ok(RESPONSES_URL, {"model": MODEL, "input": [user("hi"), *output, back], "tools": [NAMESPACE]})
    # The answer comes back token for token, so the next prompt continues from it.
    so_far = door.script.prompts[0] + list(door.script.say("").encode())
    assert door.script.prompts[1][: len(so_far)] == so_far


def events_of(answer):
    return [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
