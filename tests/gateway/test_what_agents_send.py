"""What the door ignores, maps, renders, leaves out and refuses: each kind with the value that is right."""

import copy
import json
import logging
from urllib.parse import quote

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from antefix_billing.ledger_files import read_settled
from antefix_router.gateway.notes import HEADER_BYTES_MAX, IgnoredFields, Notes
from tests.gateway.bodies import BODIES, CHAT, MESSAGES, PIXEL, RESPONSES, SCHEMA, json_path, objects_of
from tests.gateway.scripted import Script, make_front, serving

httpx2 = pytest.importorskip("httpx2")

MODEL = "antefix-tiny"
CHAT_URL, RESPONSES_URL, MESSAGES_URL = "/v1/chat/completions", "/v1/responses", "/v1/messages"


class Door:
    """A gateway with scripted workers, and what they were asked."""

    def __init__(self, client, script, ledger):
        self.client, self.script, self._ledger = client, script, ledger

    async def post(self, address, body, **headers):
        return await self.client.post(address, content=json.dumps(body).encode(), headers=headers)

    async def ok(self, address, body, **headers):
        answer = await self.post(address, body, **headers)
        assert answer.status_code == 200, answer.text
        return answer

    async def refused(self, address, body):
        """(param, code) as OpenAI's shape has them; Anthropic's has param only."""
        answer = await self.post(address, body)
        assert answer.status_code == 400, answer.text
        error = answer.json()["error"]
        assert error["type"] == "invalid_request_error"
        return error["param"], error.get("code")

    @property
    def prompt(self):
        """The last one, as text."""
        return bytes(t for t in self.script.prompts[-1] if t < 256).decode(errors="replace")

    @property
    def records(self):
        return [item.record for item in read_settled(self._ledger)]


@pytest.fixture
async def door(tmp_path):
    script = Script(say=lambda prompt: "why</think>yes" if prompt.endswith("<think>") else "yes")
    ledger = tmp_path / "ledger"
    async with (
        serving(make_front(script, ledger=ledger), chat_format="deepseek-v4") as url,
        httpx2.AsyncClient(base_url=url) as client,
    ):
        yield Door(client, script, ledger)


def with_key(body, path, key, value):
    body = copy.deepcopy(body)
    holder = body
    for name in path:
        holder = holder[name]
    holder[key] = value
    return body


def chat(*messages, **fields):
    return {"model": MODEL, "messages": [*messages], **fields}


def user(content, **more):
    return {"role": "user", "content": content, **more}


def assistant(content="", **more):
    return {"role": "assistant", "content": content, **more}


def asked(*messages, **fields):
    return {"model": MODEL, "max_tokens": 50, "messages": [*messages], **fields}


# Ignored


@pytest.mark.parametrize("address", BODIES)
async def test_an_invented_key_at_any_level_is_answered_and_named(door, address):
    for path in objects_of(BODIES[address]):
        answer = await door.ok(address, with_key(BODIES[address], path, "colour", {"deep": [1]}))
        assert json_path(path, "colour") in answer.headers["antefix-ignored"].split(", ")


@pytest.mark.parametrize("address", BODIES)
@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
async def test_any_invented_key_is_named_in_a_header_that_is_one(door, address, data):
    body = BODIES[address]
    path = data.draw(st.sampled_from(sorted(objects_of(body), key=str)))
    key = "x_" + data.draw(st.text(st.characters(exclude_categories=["Cs"]), max_size=30))
    value = data.draw(st.none() | st.booleans() | st.text(max_size=3) | st.lists(st.integers(), max_size=2))
    answer = await door.ok(address, with_key(body, path, key, value))
    named = answer.headers["antefix-ignored"]
    assert named.isascii() and named.isprintable() and len(named) <= HEADER_BYTES_MAX + 20
    whole = quote(json_path(path, key), safe="[]().*_-:/@$+!~' ")
    assert (whole.rstrip(" ") if len(whole) <= 128 else whole[:125].rstrip(" ")) in named


@pytest.mark.parametrize("address", [CHAT_URL, RESPONSES_URL, MESSAGES_URL, "/v1/completions"])
async def test_streams_name_what_was_ignored_too(door, address):
    answer = await door.ok(address, {**BODIES[address], "stream": True, "colour": 1})
    assert "colour" in answer.headers["antefix-ignored"]
    assert answer.headers["content-type"].startswith("text/event-stream")


HINTS = [
    (RESPONSES_URL, {"client_metadata": {"a": "b"}}, "client_metadata"),
    (RESPONSES_URL, {"truncation": "auto"}, "truncation"),
    (RESPONSES_URL, {"text": {"verbosity": "low"}}, "text.verbosity"),
    (RESPONSES_URL, {"stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation"),
    (RESPONSES_URL, {"service_tier": "flex"}, "service_tier"),
    (RESPONSES_URL, {"include": ["file_search_call.results"]}, "include[0]"),
    (RESPONSES_URL, {"context_management": []}, None),
    (RESPONSES_URL, {"max_tool_calls": 3}, "max_tool_calls"),
    (CHAT_URL, {"verbosity": "low"}, "verbosity"),
    (CHAT_URL, {"service_tier": "priority"}, "service_tier"),
    (CHAT_URL, {"stream_options": {"continuous_usage_stats": True}}, "stream_options.continuous_usage_stats"),
    (CHAT_URL, {"prediction": {"type": "content", "content": "x"}}, "prediction"),
    (CHAT_URL, {"metadata": {"a": "b"}, "store": True, "safety_identifier": "s"}, "safety_identifier"),
    (CHAT_URL, {"prompt_cache_retention": "for ever"}, "prompt_cache_retention"),
    (MESSAGES_URL, {"betas": ["x"]}, "betas"),
    (MESSAGES_URL, {"speed": "standard"}, "speed"),
    (MESSAGES_URL, {"service_tier": "auto"}, "service_tier"),
    (MESSAGES_URL, {"mcp_servers": []}, None),
    (MESSAGES_URL, {"container": None}, "container"),
    (MESSAGES_URL, {"cache_control": {"type": "ephemeral", "scope": "global"}}, "cache_control.scope"),
    (MESSAGES_URL, {"cache_control": {"type": "ephemeral", "ttl": "9m"}}, "cache_control.ttl"),
    (MESSAGES_URL, {"cache_control": {"type": "everlasting"}}, "cache_control.type"),
    (MESSAGES_URL, {"context_management": {"edits": []}}, None),
    (
        MESSAGES_URL,
        {"context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": {"type": "thinking_turns"}}]}},
        "context_management.edits[0]",
    ),
    (
        MESSAGES_URL,
        {"tools": [{"name": "f", "input_schema": SCHEMA, "eager_input_streaming": True}]},
        "tools[0].eager_input_streaming",
    ),
    (
        MESSAGES_URL,
        {"tools": [{"name": "f", "input_schema": SCHEMA, "defer_loading": True}]},
        "tools[0].defer_loading",
    ),
]


@pytest.mark.parametrize(("address", "hint", "name"), HINTS, ids=lambda value: json.dumps(value)[:40])
async def test_known_hints_change_nothing(door, address, hint, name):
    base = {"model": MODEL, "input": "hi"} if address == RESPONSES_URL else asked(user("hi"))
    plain = {key: value for key, value in hint.items() if key == "tools"}
    for tool in plain.get("tools", []):
        plain = {"tools": [{key: tool[key] for key in ("name", "input_schema")}]}
    await door.ok(address, {**base, **plain})
    answer = await door.ok(address, {**base, **hint})
    assert door.script.prompts[0] == door.script.prompts[1]
    assert name is None or name in answer.headers["antefix-ignored"].split(", ")


async def test_beta_headers_are_named(door):
    answer = await door.ok(MESSAGES_URL, asked(user("hi")), **{"anthropic-beta": "a-1,b-2"})
    assert answer.headers["antefix-ignored"] == "anthropic-beta"


async def test_nothing_is_named_where_nothing_was_ignored(door):
    answer = await door.ok(CHAT_URL, chat(user("hi"), max_tokens=5, function_call=None))
    assert "antefix-ignored" not in answer.headers and "antefix-left-out" not in answer.headers


def test_ignored_fields_are_counted_and_logged_once_within_bounds(caplog):
    counter = IgnoredFields()
    with caplog.at_level(logging.INFO, "antefix.gateway"):
        for _ in range(3):
            notes = Notes(counter)
            for index in range(500):
                notes.ignore(f"messages[{index}].colour")
            notes.close()
    # Told of once a request, whichever message has it, and logged once for all.
    assert notes.headers() == {"antefix-ignored": "messages[0].colour"}
    assert counter.counts == {"messages[].colour": 3} and counter.num_requests == 3
    assert len(caplog.records) == 1
    for number in range(2000):
        notes = Notes(counter)
        notes.ignore(f"x{number}")
        notes.close()
    assert len(counter.counts) == IgnoredFields.NUM_NAMES_MAX + 1 and counter.counts[IgnoredFields.OTHERS] == 1001
    notes = Notes(counter)
    notes.ignore("what the prompt\r\nsaid")  # no field's name: counted, and not told
    notes.close()
    assert counter.counts[IgnoredFields.OTHERS] == 1002 and not any("prompt" in name for name in counter.counts)
    assert all("\n" not in record.getMessage() for record in caplog.records)
    notes = Notes()
    for number in range(500):
        notes.ignore(f"field_{number}")
    header = notes.headers()["antefix-ignored"]
    assert len(header) < HEADER_BYTES_MAX + 20 and header.endswith(f"+{500 - header.count('field_')} more")


# Mapped

OFF, HIGH, MAX = "off", "high", "max"
MODES = [
    ({}, HIGH),
    ({"thinking": {"type": "enabled"}}, HIGH),
    ({"thinking": {"type": "adaptive"}}, HIGH),
    ({"thinking": {"type": "disabled"}}, OFF),
    ({"thinking": {"type": "enabled", "budget_tokens": 31_999}}, HIGH),
    ({"thinking": {"type": "enabled", "budget_tokens": 0}}, OFF),
    ({"thinking": {"budget_tokens": 1024}}, HIGH),
    ({"thinking": True}, HIGH),
    ({"thinking": False}, OFF),
    ({"reasoning_effort": "none"}, OFF),
    ({"reasoning_effort": "minimal"}, HIGH),
    ({"reasoning_effort": "low"}, HIGH),
    ({"reasoning_effort": "medium"}, HIGH),
    ({"reasoning_effort": "max"}, MAX),
    ({"reasoning_effort": "auto"}, HIGH),
    ({"reasoning": {"effort": "max"}}, MAX),
    ({"reasoning": {"effort": "none", "summary": "auto"}}, OFF),
    ({"reasoning": {"enabled": False}}, OFF),
    ({"reasoning": {"max_tokens": 2000, "exclude": True}}, HIGH),
    ({"enable_thinking": False}, OFF),
    ({"enable_thinking": True, "thinking_budget": 100}, HIGH),
    ({"thinking_budget": 0}, OFF),
    ({"chat_template_kwargs": {"thinking": False}}, OFF),
    ({"chat_template_kwargs": {"enable_thinking": True, "reasoning_effort": "max"}}, MAX),
    ({"thinking": {"type": "disabled"}, "reasoning_effort": "max"}, OFF),
    ({"thinking": {"type": "enabled"}, "reasoning_effort": "max"}, MAX),
]


@pytest.mark.parametrize(("wish", "mode"), MODES, ids=lambda value: json.dumps(value)[:60])
async def test_every_way_to_ask_for_thinking_is_off_high_or_max(door, wish, mode):
    anthropic_mode = mode if wish and wish != {"reasoning_effort": "auto"} else OFF  # off until it is asked for
    for address, body, right in (
        (CHAT_URL, chat(user("hi"), **wish), mode),
        (RESPONSES_URL, {"model": MODEL, "input": "hi", **wish}, mode),
        (MESSAGES_URL, asked(user("hi"), **wish), anthropic_mode),
    ):
        answer = await door.ok(address, body)
        assert answer.headers["antefix-mode"] == right == door.records[-1].mode
        begins = "Reasoning Effort: Absolute maximum" in door.prompt
        assert door.prompt.endswith("</think>" if right == OFF else "<think>") and begins == (right == MAX)


@pytest.mark.parametrize("effort", ["low", "high", "max"])
async def test_anthropics_effort_is_a_mode(door, effort):
    answer = await door.ok(
        MESSAGES_URL, asked(user("hi"), thinking={"type": "adaptive"}, output_config={"effort": effort})
    )
    assert answer.headers["antefix-mode"] == (MAX if effort == "max" else HIGH)


async def test_a_model_that_cannot_think_answers_without():
    script = Script()
    async with serving(make_front(script, ledger=None)) as url, httpx2.AsyncClient(base_url=url) as client:
        answer = await client.post(CHAT_URL, json=chat(user("hi"), reasoning_effort="high"))
    assert answer.status_code == 200 and answer.headers["antefix-mode"] == OFF
    assert answer.headers["antefix-ignored"] == "reasoning_effort"


@pytest.mark.parametrize(
    ("address", "wish", "param"),
    [
        (CHAT_URL, {"thinking": {"type": "sometimes"}}, "thinking.type"),
        (CHAT_URL, {"reasoning_effort": "heroic"}, "reasoning_effort"),
        (CHAT_URL, {"enable_thinking": "yes"}, "enable_thinking"),
        (RESPONSES_URL, {"reasoning": {"effort": "heroic"}}, "reasoning.effort"),
        (MESSAGES_URL, {"output_config": {"effort": 5}}, "output_config.effort"),
    ],
)
async def test_a_mode_that_nobody_knows_is_refused_by_name(door, address, wish, param):
    base = {"model": MODEL, "input": "hi"} if address == RESPONSES_URL else asked(user("hi"))
    assert (await door.refused(address, {**base, **wish}))[0] == param


# Breakpoints

MARK = {"cache_control": {"type": "ephemeral", "ttl": "1h"}}


def text_part(text, **more):
    return {"type": "text", "text": text, **more}


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


# Rendered


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
    # Where an API has no place for a tool's picture, clients send it behind the result.
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


# Left out or flattened

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
    # What was said comes back token for token, so the next prompt goes on from it.
    so_far = door.script.prompts[0] + list(door.script.say("").encode())
    assert door.script.prompts[1][: len(so_far)] == so_far


def events_of(answer):
    return [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]


# Refused

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
