"""How a conversation's history is rendered: reasoning, refusals, late system text, pictures and documents."""

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
from tests.gateway.bodies import PIXEL, SCHEMA


async def test_what_others_call_reasoning_is_shown_to_the_model(door):
    tools = [{"type": "function", "function": {"name": "f"}}]
    for fields in (
        {"reasoning_content": "because"},
        {"reasoning": "because"},
        {"reasoning_details": [{"type": "reasoning.text", "text": "beca", "index": 0}, {"type": "x", "text": "use"}]},
        {"reasoning_content": "because", "reasoning": "because", "reasoning_details": [{"text": "because"}]},
    ):
        body = chat(
            user("a"), assistant("b", refusal=None, function_call=None, audio=None, **fields), user("c"), tools=tools
        )
        answer = await door.ok(CHAT_URL, body)
        assert "<think>because</think>b<" in door.prompt.replace("｜end▁of▁sentence｜", "<")
        assert "antefix-ignored" not in answer.headers


async def test_refusals_names_and_old_calls_are_shown(door):
    await door.ok(
        CHAT_URL,
        chat(
            user("a", name="ann"),
            assistant([{"type": "refusal", "refusal": "I will not."}]),
            user("b"),
            assistant(None, refusal="Nor that."),
            user("c"),
            assistant(None, function_call={"name": "f", "arguments": "{}"}),
            {"role": "function", "name": "f", "content": "result"},
            {"role": "tool", "tool_call_id": "x", "content": None},
        ),
    )
    assert "ann: a" in door.prompt and "I will not." in door.prompt and "Nor that." in door.prompt
    assert '<｜DSML｜invoke name="f">' in door.prompt and "<tool_result>result</tool_result>" in door.prompt


async def test_an_answer_that_comes_back_with_a_name_is_still_the_tokens_that_were_generated(door):
    answer = await door.ok(CHAT_URL, chat(user("a"), thinking=False))
    said = {**answer.json()["choices"][0]["message"], "name": "bob"}
    await door.ok(CHAT_URL, chat(user("a"), said, user("b"), thinking=False))
    so_far = door.script.prompts[0] + door.script.generations[0].samples[0].emitted
    assert door.script.prompts[1][: len(so_far)] == so_far and "bob" not in door.prompt


async def test_system_text_in_mid_conversation_stands_where_it_was(door):
    bodies = {
        CHAT_URL: chat(
            {"role": "system", "content": "head"},
            user("a"),
            assistant("b"),
            {"role": "developer", "content": "late"},
            user("c"),
        ),
        RESPONSES_URL: {
            "model": MODEL,
            "instructions": "head",
            "input": [user("a"), assistant("b"), {"role": "developer", "content": "late"}, user("c")],
        },
        MESSAGES_URL: asked(
            user("a"),
            assistant("b"),
            {"role": "system", "content": "late"},
            user("c"),
            system="head",
            thinking={"type": "enabled"},
        ),
    }
    for address, body in bodies.items():
        await door.ok(address, body)
        assert door.prompt == (
            "<｜begin▁of▁sentence｜>head<｜User｜>a<｜Assistant｜></think>b<｜end▁of▁sentence｜>"
            "<｜User｜>late\n\nc<｜Assistant｜><think>"
        )


async def test_item_references_stand_for_items_of_the_same_input(door):
    message = {"type": "message", "id": "msg_1", "role": "assistant", "content": [{"type": "output_text", "text": "b"}]}
    items = [user("a"), message, user("c"), {"type": "item_reference", "id": "msg_1"}, user("d")]
    await door.ok(RESPONSES_URL, {"model": MODEL, "input": items})
    assert door.prompt.count("</think>b<｜end") == 2
    items[3]["id"] = "msg_2"
    refused = await door.refused(RESPONSES_URL, {"model": MODEL, "input": items})
    assert refused == ("input[3].id", "unsupported_value")


async def test_arguments_that_are_no_json_do_not_stop_a_conversation(door):
    broken = '{"path": "a.tx'
    call = {"id": "1", "type": "function", "function": {"name": "read", "arguments": broken}}
    bodies = {
        CHAT_URL: chat(user("a"), assistant(tool_calls=[call]), {"role": "tool", "tool_call_id": "1", "content": "no"}),
        RESPONSES_URL: {
            "model": MODEL,
            "input": [
                user("a"),
                {"type": "function_call", "call_id": "1", "name": "read", "arguments": broken},
                {"type": "function_call_output", "call_id": "1", "output": "no"},
            ],
        },
        MESSAGES_URL: asked(
            user("a"),
            assistant([{"type": "tool_use", "id": "1", "name": "read", "input": broken}]),
            user([{"type": "tool_result", "tool_use_id": "1", "content": "no"}]),
        ),
    }
    for address, body in bodies.items():
        await door.ok(address, body)
        assert f'name="arguments" string="true">{broken}</' in door.prompt


IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": PIXEL}}
PDF = {"type": "document", "source": {"type": "base64", "media_type": "application/pdf", "data": PIXEL}}
IMAGE_URL = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PIXEL}"}}
INPUT_IMAGE = {"type": "input_image", "image_url": "https://example.org/a.png"}
USE = {"type": "tool_use", "id": "1", "name": "read", "input": {}}
CALL = {"id": "1", "type": "function", "function": {"name": "read", "arguments": "{}"}}
HISTORIES = [
    (
        MESSAGES_URL,
        asked(user("a"), assistant([USE]), user([{"type": "tool_result", "tool_use_id": "1", "content": [IMAGE]}])),
        "messages[2].content[0].content[0]",
        "image",
    ),
    (
        MESSAGES_URL,
        asked(
            user("a"),
            assistant([USE]),
            user([{"type": "tool_result", "tool_use_id": "1", "content": [PDF]}, text_part("?")]),
        ),
        "messages[2].content[0].content[0]",
        "document",
    ),
    (MESSAGES_URL, asked(user([text_part("a"), IMAGE]), assistant("b"), user("c")), "messages[0].content[1]", "image"),
    (CHAT_URL, chat(user([text_part("a"), IMAGE_URL]), assistant("b"), user("c")), "messages[0].content[1]", "image"),
    (
        CHAT_URL,
        chat(user("a"), assistant(tool_calls=[CALL]), {"role": "tool", "tool_call_id": "1", "content": [IMAGE_URL]}),
        "messages[2].content[0]",
        "image",
    ),
    # If an API has no place for a tool's picture, clients send the picture after the result.
    (
        CHAT_URL,
        chat(
            user("a"),
            assistant(tool_calls=[CALL]),
            {"role": "tool", "tool_call_id": "1", "content": "see"},
            user([IMAGE_URL]),
        ),
        "messages[3].content[0]",
        "image",
    ),
    (
        CHAT_URL,
        chat(user([{"type": "input_audio", "input_audio": {}}]), assistant("b"), user("c")),
        "messages[0].content[0]",
        "audio",
    ),
    (
        RESPONSES_URL,
        {"model": MODEL, "input": [user([INPUT_IMAGE]), assistant("b"), user("c")]},
        "input[0].content[0]",
        "image",
    ),
    (
        RESPONSES_URL,
        {
            "model": MODEL,
            "input": [
                user("a"),
                {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"},
                {"type": "function_call_output", "call_id": "1", "output": [INPUT_IMAGE]},
            ],
        },
        "input[2].output[0]",
        "image",
    ),
]


@pytest.mark.parametrize(("address", "body", "path", "what"), HISTORIES, ids=range(len(HISTORIES)))
async def test_a_picture_in_the_history_is_a_placeholder(door, address, body, path, what):
    answer = await door.ok(address, body)
    assert f"[{what}: not shown, this model reads text only]" in door.prompt and PIXEL not in door.prompt
    assert answer.headers["antefix-left-out"] == f"{path} ({what})" and "antefix-ignored" not in answer.headers


QUESTIONS = [
    (MESSAGES_URL, asked(user([text_part("a"), IMAGE])), "messages[0].content[1]"),
    (MESSAGES_URL, asked(user("a"), assistant("b"), user([PDF, text_part("c")])), "messages[2].content[0]"),
    (MESSAGES_URL, asked(user([IMAGE]), assistant("It is")), "messages[0].content[0]"),
    (CHAT_URL, chat(user("a"), assistant("b"), user([IMAGE_URL])), "messages[2].content[0]"),
    (RESPONSES_URL, {"model": MODEL, "input": [user([INPUT_IMAGE])]}, "input[0].content[0]"),
]


@pytest.mark.parametrize(("address", "body", "path"), QUESTIONS, ids=range(len(QUESTIONS)))
async def test_a_picture_that_is_to_be_answered_is_refused_and_the_conversation_goes_on(door, address, body, path):
    param, code = await door.refused(address, body)
    assert param == path and code in ("unsupported_value", None)
    key = "input" if address == RESPONSES_URL else "messages"
    await door.ok(address, {**body, key: [*body[key], user("never mind")]})


async def test_documents_that_are_text_are_shown(door):
    plain = {
        "type": "document",
        "title": "T",
        "source": {"type": "text", "media_type": "text/plain", "data": "in words"},
    }
    parts = {"type": "document", "source": {"type": "content", "content": [text_part("in parts")]}}
    found = {"type": "search_result", "source": "s.org", "title": "S", "content": [text_part("as found")]}
    reference = {"type": "tool_reference", "tool_name": "later"}
    result = {"type": "tool_result", "tool_use_id": "1", "content": [reference]}
    await door.ok(MESSAGES_URL, asked(user("a"), assistant([USE]), user([result, plain, parts, found])))
    for text in ("T\nin words", "in parts", "S\ns.org\nas found", "[tool: later]"):
        assert text in door.prompt


async def test_what_other_providers_did_stays_in_the_history_as_a_word(door):
    blocks = [
        {"type": "redacted_thinking", "data": "b3BhcXVl"},
        {"type": "server_tool_use", "id": "s", "name": "web_search", "input": {"query": "q"}},
        {"type": "web_search_tool_result", "tool_use_id": "s", "content": [{"type": "web_search_result", "url": "u"}]},
        text_part("Found."),
    ]
    tools = [{"name": "f", "input_schema": SCHEMA}]
    answer = await door.ok(
        MESSAGES_URL, asked(user("a"), assistant(blocks), user("c"), tools=tools, thinking={"type": "enabled"})
    )
    assert '<think>[thinking redacted]</think>[web_search called with {"query": "q"}]' in door.prompt
    assert "[web_search_tool_result: not shown]Found." in door.prompt
    assert answer.headers["antefix-foreign-thinking"] == "messages[1].content[0]"
    items = [
        user("a"),
        {"type": "web_search_call", "id": "w", "status": "completed", "action": {}},
        assistant("b"),
        user("c"),
    ]
    answer = await door.ok(RESPONSES_URL, {"model": MODEL, "input": items})
    assert answer.headers["antefix-left-out"] == "input[1] (web_search_call)"
    custom = [
        user("a"),
        {"type": "custom_tool_call", "call_id": "1", "name": "apply_patch", "input": "*** Begin"},
        {"type": "custom_tool_call_output", "call_id": "1", "output": "done"},
    ]
    await door.ok(RESPONSES_URL, {"model": MODEL, "input": custom})
    assert 'name="input" string="true">*** Begin</' in door.prompt and "<tool_result>done</tool_result>" in door.prompt
