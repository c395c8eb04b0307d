"""Unsupported fields that would change the answer are refused by name."""

import pytest

from tests.gateway.agents_door import CHAT_URL, MESSAGES_URL, MODEL, RESPONSES_URL, asked, assistant, chat, user
from tests.gateway.bodies import CHAT, MESSAGES, RESPONSES, SCHEMA

REFUSED = [
    (CHAT_URL, chat({"role": "wizard", "content": "x"}), "messages[0].role", "unsupported_value"),
    (CHAT_URL, chat(user([{"type": "hologram"}])), "messages[0].content[0].type", "unsupported_value"),
    (
        CHAT_URL,
        chat(user("a"), tool_choice={"type": "function", "function": {"name": "f"}}),
        "tool_choice",
        "invalid_value",
    ),
    (
        CHAT_URL,
        chat(user("a"), tools=[{"type": "web_search"}], tool_choice={"type": "web_search"}),
        "tool_choice",
        "invalid_value",
    ),
    (CHAT_URL, chat(user("a"), functions=[{"name": "f"}]), "functions", "unsupported_value"),
    (CHAT_URL, chat(user("a"), top_k=-5), "top_k", "invalid_type"),
    (CHAT_URL, chat(user("a"), bad_words=["a"]), "bad_words", "unsupported_value"),
    (CHAT_URL, chat(user("a"), guided_json={"type": "object"}), "guided_json", "unsupported_value"),
    (CHAT_URL, chat(user("a"), cache_salt="s"), "cache_salt", "unsupported_value"),
    (CHAT_URL, chat(user("a"), modalities=["text", "audio"]), "modalities", "unsupported_value"),
    (
        CHAT_URL,
        chat(
            user("a"),
            tools=[{"type": "function", "function": {"name": "f", "strict": True, "parameters": {"type": "thing"}}}],
        ),
        "tools[0].function.parameters",
        "invalid_value",
    ),
    (RESPONSES_URL, {"model": MODEL, "input": [{"type": "dream"}]}, "input[0].type", "unsupported_value"),
    (
        RESPONSES_URL,
        {"model": MODEL, "input": [{"role": "wizard", "content": "x"}]},
        "input[0].role",
        "unsupported_value",
    ),
    (
        RESPONSES_URL,
        {"model": MODEL, "input": "a", "tool_choice": {"type": "function", "name": "f"}},
        "tool_choice",
        "invalid_value",
    ),
    (
        RESPONSES_URL,
        {"model": MODEL, "input": "a", "previous_response_id": "r"},
        "previous_response_id",
        "unsupported_value",
    ),
    (
        RESPONSES_URL,
        {"model": MODEL, "input": "a", "context_management": [{"type": "compaction"}]},
        "context_management",
        "unsupported_value",
    ),
    (MESSAGES_URL, asked({"role": "wizard", "content": "x"}), "messages[0].role", None),
    (MESSAGES_URL, asked(user([{"type": "hologram"}])), "messages[0].content[0].type", None),
    (MESSAGES_URL, asked(user("a"), assistant([{"type": "hologram"}]), user("b")), "messages[1].content[0].type", None),
    (MESSAGES_URL, asked(user("a"), tool_choice={"type": "tool", "name": "f"}), "tool_choice", None),
    (
        MESSAGES_URL,
        asked(user("a"), context_management={"edits": [{"type": "clear_tool_uses_20250919"}]}),
        "context_management.edits[0].type",
        None,
    ),
    (
        MESSAGES_URL,
        asked(user("a"), context_management={"edits": [{"type": "compact_20260112"}]}),
        "context_management.edits[0].type",
        None,
    ),
    (
        MESSAGES_URL,
        asked(user("a"), output_config={"format": {"type": "json_schema"}}),
        "output_config.format.schema",
        None,
    ),
    (MESSAGES_URL, asked(user("a"), top_k=-5), "top_k", None),
]


@pytest.mark.parametrize(("address", "body", "param", "code"), REFUSED, ids=range(len(REFUSED)))
async def test_what_would_change_the_answer_is_refused_by_name(door, address, body, param, code):
    assert await door.refused(address, body) == (param, code)
    assert door.records == []


# Counting


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"max_tokens": 5, "stream": True, "temperature": 0.5, "top_p": 0.9, "stop_sequences": ["x"]},
        {"context_management": {"edits": []}, "betas": ["x"], "speed": "fast"},
        {"thinking": {"type": "adaptive"}, "output_config": {"effort": "max"}},
        {"tools": [{"type": "bash_20250124", "name": "bash"}, {"name": "f", "input_schema": SCHEMA}]},
    ],
)
async def test_count_tokens_takes_whatever_messages_takes(door, more):
    body = {**MESSAGES, **more}
    counted = await door.ok("/v1/messages/count_tokens", body)
    answer = await door.ok(MESSAGES_URL, {**body, "stream": False})
    assert counted.json() == {"input_tokens": len(door.script.prompts[-1])}
    for name in ("antefix-ignored", "antefix-left-out", "antefix-mode"):
        assert counted.headers.get(name) == answer.headers.get(name)


async def test_the_bodies_keep_the_meaning_of_the_conversation(door):
    for address, body in ((CHAT_URL, CHAT), (RESPONSES_URL, RESPONSES), (MESSAGES_URL, MESSAGES)):
        await door.ok(address, body)
        for text in (
            "Be brief.",
            "Read a.txt",
            "<think>Let me see.</think>",
            ">a.txt<",
            "<tool_result>hello",
            "And now?",
        ):
            assert text in door.prompt, (address, text)
