"""A string that is not valid text (half of a surrogate pair) is refused with its field's name, in every field."""

import copy
import json

import httpx2
import numpy as np
import pytest

from antefix.clients import RouterClient
from antefix.errors import InvalidRequest
from antefix.generation_request import Caller, GenerationRequest
from antefix.sampling import Sampling
from antefix_router.chat.messages import ToolCall
from antefix_router.gateway.anthropic_messages import call_input
from antefix_router.gateway.text_check import path_of_no_text
from tests.gateway.bodies import BODIES, json_path
from tests.gateway.scripted import Script, make_front, serving
from tests.slow_cases import slow_but
from tests.waiting import AT_MOST_S

WRONG = "a\ud83db"


def strings_of(value, path=()):
    """Paths of all strings of a body."""
    if isinstance(value, dict):
        for name, item in value.items():
            yield from strings_of(item, (*path, name))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from strings_of(item, (*path, index))
    elif isinstance(value, str):
        yield path


def changed(body, path, text):
    body = copy.deepcopy(body)
    holder = body
    for name in path[:-1]:
        holder = holder[name]
    holder[path[-1]] = text
    return body


ENCODINGS = {
    "escaped": lambda body: json.dumps(body).encode(),
    "raw": lambda body: json.dumps(body, ensure_ascii=False).encode("utf-8", "surrogatepass"),
    "utf-16": lambda body: json.dumps(body, ensure_ascii=False).encode("utf-16-le", "surrogatepass"),
}


@pytest.mark.parametrize("encode", slow_but([ENCODINGS["raw"]], ENCODINGS.values()), ids=ENCODINGS)
async def test_every_string_of_every_api_is_named(encode):
    async with (
        serving(make_front(Script(), ledger=None), chat_format="deepseek-v4") as url,
        httpx2.AsyncClient(base_url=url, timeout=AT_MOST_S) as client,
    ):
        for api, body in BODIES.items():
            body = {**body, "user": "ann", "prompt_cache_key": "s", "stop": ["x"]}
            for path in strings_of(body):
                answer = await client.post(api, content=encode(changed(body, path, WRONG)))
                name = json_path(path[:-1], path[-1])
                assert answer.status_code == 400 and answer.json()["error"]["param"] == name, (api, path, answer.text)
                assert name in answer.json()["error"]["message"]
            answer = await client.post(api, content=encode({**body, WRONG: 1}))
            assert answer.status_code == 400 and "name of a field" in answer.text
            # A complete surrogate pair is a character.
            whole = await client.post(api, content=json.dumps({**body, "user": "\U0001f600"}).encode())
            assert whole.status_code == 200, whole.text


async def test_text_inside_text_is_no_reason_to_fail():
    """Arguments of an earlier call are JSON in a string. An escape inside them is plain text, and must not fail."""
    messages = [
        {"role": "user", "content": "hi"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a": "\\ud800"}'}},
            ],
        },
        {"role": "tool", "tool_call_id": "c", "content": "done"},
    ]
    script = Script()
    async with (
        serving(make_front(script, ledger=None), chat_format="deepseek-v4") as url,
        httpx2.AsyncClient(base_url=url, timeout=AT_MOST_S) as client,
    ):
        answer = await client.post("/v1/chat/completions", json={"model": "m", "messages": messages})
        assert answer.status_code == 200, answer.text
    assert b'{"a": "\\ud800"}' in bytes(t for t in script.prompts[0] if t < 256)
    assert call_input(ToolCall(id="c", name="f", arguments='{"a": ["\\ud800"]}')) == {"a": ["\ufffd"]}


@pytest.mark.parametrize("name", ["tenant", "user", "session", "request_id"])
async def test_names_are_refused_behind_every_door(name):
    front = make_front(Script(), ledger=None)
    with pytest.raises(InvalidRequest, match=f"^{name} is not text"):
        tokens, caller = np.array([1], np.uint32), Caller(**{name: WRONG})
        await front.admit(GenerationRequest(tokens=tokens, sampling=Sampling(max_tokens=1), caller=caller))


@pytest.mark.parametrize("names", [{"tenant": WRONG}, {"session": WRONG}, {"request_id": WRONG}, {}], ids=str)
async def test_the_client_refuses_them_before_they_are_sent(names):
    async with RouterClient("127.0.0.1:1") as client:
        with pytest.raises(InvalidRequest, match=f"^{next(iter(names), 'prompt')} is not text"):
            async for _ in client.generate("hi" if names else WRONG, Sampling(max_tokens=1), **names):
                pass


def test_the_first_wrong_string_is_named():
    assert path_of_no_text({"a": ["x", {"b": WRONG}], "c": WRONG}) == "a[1].b"
    assert path_of_no_text(WRONG) == "" and path_of_no_text({"a": [1, None, "x"]}) is None
