"""`cache_control` sets a breakpoint in every place where clients may write it."""

import pytest

from tests.gateway.agents_door import (
    CHAT_URL,
    MESSAGES_URL,
    MODEL,
    RESPONSES_URL,
    asked,
    assistant,
    chat,
    text_part,
    user,
)
from tests.gateway.bodies import SCHEMA

MARK = {"cache_control": {"type": "ephemeral", "ttl": "1h"}}


BREAKPOINTS = [
    (CHAT_URL, chat(user("hi", **MARK)), "hi"),
    (CHAT_URL, chat(user([text_part("one", **MARK), text_part("two")])), "one"),
    (CHAT_URL, chat({"role": "system", "content": "sys", **MARK}, user("hi")), "sys"),
    (CHAT_URL, chat(user("hi"), **MARK), "hi"),
    (CHAT_URL, chat(user("a"), assistant("old", **MARK), user("hi")), "old"),
    (
        CHAT_URL,
        chat(
            user("a"),
            assistant(tool_calls=[{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]),
            {"role": "tool", "tool_call_id": "1", "content": "result", **MARK},
        ),
        "<tool_result>result</tool_result>",
    ),
    (CHAT_URL, chat(user("hi"), tools=[{"type": "function", "function": {"name": "f"}, **MARK}]), "tool calls.\n"),
    (CHAT_URL, chat(user("hi"), tools=[{"type": "function", "function": {"name": "f", **MARK}}]), "tool calls.\n"),
    (
        RESPONSES_URL,
        {
            "model": MODEL,
            "input": [user([{"type": "input_text", "text": "hi", **MARK}, {"type": "input_text", "text": "you"}])],
        },
        "hi",
    ),
    (RESPONSES_URL, {"model": MODEL, "input": [user("hi", **MARK), user("you")]}, "hi"),
    (
        RESPONSES_URL,
        {"model": MODEL, "input": "hi", "tools": [{"type": "function", "name": "f", **MARK}]},
        "tool calls.\n",
    ),
    (RESPONSES_URL, {"model": MODEL, "input": "hi", **MARK}, "hi"),
    (
        RESPONSES_URL,
        {
            "model": MODEL,
            "input": [
                user("a"),
                {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"},
                {"type": "function_call_output", "call_id": "1", "output": "result", **MARK},
            ],
        },
        "<tool_result>result</tool_result>",
    ),
    (MESSAGES_URL, asked(user("hi"), system=[text_part("sys", **MARK)]), "sys"),
    (MESSAGES_URL, asked(user("hi", **MARK)), "hi"),
    (MESSAGES_URL, asked(user("hi"), **MARK), "hi"),
    (MESSAGES_URL, asked(user("hi"), tools=[{"name": "f", "input_schema": SCHEMA, **MARK}]), "tool calls.\n"),
    (
        MESSAGES_URL,
        asked(
            user("a"),
            assistant([{"type": "tool_use", "id": "1", "name": "f", "input": {}, **MARK}]),
            user([{"type": "tool_result", "tool_use_id": "1", "content": "result"}]),
        ),
        "</｜DSML｜tool_calls>",
    ),
    (
        MESSAGES_URL,
        asked(
            user("a"),
            assistant([{"type": "tool_use", "id": "1", "name": "f", "input": {}}]),
            user(
                [
                    {
                        "type": "tool_result",
                        "tool_use_id": "1",
                        "content": [text_part("res", **MARK), text_part("ult")],
                        "is_error": True,
                    }
                ]
            ),
        ),
        "<tool_result>Error: res",
    ),
    (
        MESSAGES_URL,
        asked(
            user("a"),
            assistant([{"type": "tool_use", "id": "1", "name": "f", "input": {}}]),
            user([{"type": "tool_result", "tool_use_id": "1", "content": "result", **MARK}]),
        ),
        "<tool_result>result</tool_result>",
    ),
]


@pytest.mark.parametrize(("address", "body", "before"), BREAKPOINTS, ids=range(len(BREAKPOINTS)))
async def test_cache_control_is_a_breakpoint_wherever_it_stands(door, address, body, before):
    await door.ok(address, body)
    ((num_tokens, ttl_s),) = door.script.requests[-1].breakpoints
    text = bytes(t for t in door.script.prompts[-1][:num_tokens] if t < 256).decode()
    assert ttl_s == 3600.0 and text.endswith(before)


@pytest.mark.parametrize("address", [CHAT_URL, MESSAGES_URL])
async def test_of_more_than_four_breakpoints_the_last_four_count(door, address):
    parts = [text_part(f"part {number}. ", **MARK) for number in range(7)]
    await door.ok(address, asked(user(parts)))
    breakpoints = door.script.requests[-1].breakpoints
    texts = [bytes(t for t in door.script.prompts[-1][:at] if t < 256).decode() for at, _ in breakpoints]
    assert [text[-3:] for text in texts] == ["3. ", "4. ", "5. ", "6. "]
