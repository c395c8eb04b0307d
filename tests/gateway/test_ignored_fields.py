"""Requests with unknown fields, hints and beta headers are answered.

A header names these fields, and they are counted.
"""

import json
import logging
from urllib.parse import quote

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from antefix_router.gateway.notes import HEADER_BYTES_MAX, IgnoredFields, Notes
from tests.gateway.agents_door import (
    CHAT_URL,
    MESSAGES_URL,
    MODEL,
    RESPONSES_URL,
    asked,
    chat,
    user,
    with_key,
)
from tests.gateway.bodies import BODIES, SCHEMA, json_path, objects_of


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
    # Each request's header names the field once, for all its messages. The log names it once for all requests.
    assert notes.headers() == {"antefix-ignored": "messages[0].colour"}
    assert counter.counts == {"messages[].colour": 3} and counter.num_requests == 3
    assert len(caplog.records) == 1
    for number in range(2000):
        notes = Notes(counter)
        notes.ignore(f"x{number}")
        notes.close()
    assert len(counter.counts) == IgnoredFields.NUM_NAMES_MAX + 1 and counter.counts[IgnoredFields.OTHERS] == 1001
    notes = Notes(counter)
    notes.ignore("what the prompt\r\nsaid")  # this is not a field's name, so it is counted but not shown
    notes.close()
    assert counter.counts[IgnoredFields.OTHERS] == 1002 and not any("prompt" in name for name in counter.counts)
    assert all("\n" not in record.getMessage() for record in caplog.records)
    notes = Notes()
    for number in range(500):
        notes.ignore(f"field_{number}")
    header = notes.headers()["antefix-ignored"]
    assert len(header) < HEADER_BYTES_MAX + 20 and header.endswith(f"+{500 - header.count('field_')} more")
