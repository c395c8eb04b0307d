"""Any JSON body is answered or clearly refused. No body causes an internal error or a request that never ends."""

import copy
import json

import httpx2
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from antefix.errors import ConfigError, InvalidRequest
from antefix_billing.tenants import load_tenants
from antefix_router.front import cache_tenant
from tests.gateway import bodies
from tests.gateway.scripted import Script, make_front, serving
from tests.waiting import AT_MOST_S

pytestmark = pytest.mark.slow

TOOL = {"name": "f", "description": "d", "parameters": {"type": "object"}}
BODIES = {
    "/v1/chat/completions": {
        "model": "antefix-tiny",
        "messages": [
            {"role": "system", "content": "s"},
            {
                "role": "user",
                "content": [{"type": "text", "text": "u", "cache_control": {"type": "ephemeral", "ttl": "5m"}}],
            },
            {
                "role": "assistant",
                "content": "a",
                "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
            },
            {"role": "tool", "tool_call_id": "1", "content": "r"},
        ],
        "tools": [{"type": "function", "function": TOOL}],
        "thinking": {"type": "enabled"},
        "stream_options": {"include_usage": True},
        "stop": ["x"],
        "temperature": 1,
    },
    "/v1/completions": {
        "model": "antefix-tiny",
        "prompt": [1, 2],
        "echo": True,
        "max_tokens": 3,
        "stop": "x",
        "seed": 1,
    },
    "/v1/responses": {
        "model": "antefix-tiny",
        "instructions": "i",
        "input": [
            {"role": "user", "content": [{"type": "input_text", "text": "u"}]},
            {"type": "reasoning", "id": "r", "summary": [], "content": [{"type": "reasoning_text", "text": "t"}]},
            {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "1", "output": "r"},
        ],
        "tools": [{"type": "function", **TOOL}],
        "include": ["reasoning.encrypted_content"],
        "reasoning": {"effort": "high"},
        "text": {"format": {"type": "text"}},
    },
    "/v1/messages": {
        "model": "antefix-tiny",
        "max_tokens": 3,
        "system": [{"type": "text", "text": "s"}],
        "messages": [
            {"role": "user", "content": "u"},
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "t", "signature": ""},
                    {"type": "tool_use", "id": "1", "name": "f", "input": {"a": 1}},
                ],
            },
            {
                "role": "user",
                "content": [{"type": "tool_result", "tool_use_id": "1", "content": "r", "is_error": True}],
            },
        ],
        "tools": [{"name": "f", "input_schema": {"type": "object"}}],
        "tool_choice": {"type": "auto"},
        "thinking": {"type": "enabled", "budget_tokens": 1024},
        "metadata": {"user_id": "u"},
    },
}
JUNK = st.sampled_from(
    [
        None,
        True,
        -1,
        0,
        10**30,
        10**400,
        float("nan"),
        1e308,
        "",
        "x",
        "\ud800",
        "\x1f",
        [],
        [1],
        [None],
        [{}],
        {},
        {"type": "x"},
        {"a": [1]},
    ]
)


def places(value, path=()):
    """Every place in a JSON value that could hold something else."""
    if path:
        yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, item in items:
        yield from places(item, (*path, name))


def changed(body, path, junk):
    body = copy.deepcopy(body)
    holder = body
    for name in path[:-1]:
        holder = holder[name]
    holder[path[-1]] = junk
    return body


@pytest.mark.parametrize("address", BODIES)
async def test_the_bodies_are_good_as_they_are(address):
    front = make_front(Script(), ledger=None)
    async with serving(front, chat_format="deepseek-v4") as url, httpx2.AsyncClient(timeout=AT_MOST_S) as client:
        answer = await client.post(url + address, json=BODIES[address])
    assert answer.status_code == 200, answer.text


@pytest.fixture
async def front():
    return make_front(Script(), ledger=None)


@pytest.fixture
async def client(front):
    """One server for all examples of a test, because starting a server takes longer than a request."""
    async with (
        serving(front, chat_format="deepseek-v4") as url,
        httpx2.AsyncClient(base_url=url, timeout=AT_MOST_S) as client,
    ):
        yield client


@pytest.mark.slow
@pytest.mark.parametrize("address", bodies.BODIES)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
async def test_no_body_is_an_internal_error(front, client, address, data):
    body = data.draw(st.sampled_from([known[address] for known in (BODIES, bodies.BODIES) if address in known]))
    for _ in range(data.draw(st.integers(0, 2))):
        path = data.draw(st.sampled_from(sorted(places(body), key=str)))
        body = changed(body, path, data.draw(JUNK))
    if data.draw(st.booleans()):
        body = {**body, "stream": True}
    answer = await client.post(address, content=json.dumps(body).encode())
    assert answer.status_code in (200, 400, 404), answer.text
    assert not front.accounts._running


@pytest.mark.parametrize("address", BODIES)
async def test_a_number_that_json_does_not_have_is_refused_wherever_it_stands(client, front, address):
    """Python's parser reads NaN, Infinity and 1e400. An answer that repeats such a value could not be written."""
    for path in places(BODIES[address]):
        name = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")
        for number in ("NaN", "-Infinity", "1e400"):
            body = json.dumps(changed(BODIES[address], path, "@")).replace('"@"', number)
            answer = await client.post(address, content=body.encode())
            assert answer.status_code == 400 and f"{name} must be a finite number" in answer.text, answer.text
    assert not front.accounts._running


@pytest.mark.parametrize(
    "field", ["temperature", "top_p", "max_tokens", "seed", "top_k", "presence_penalty", "logit_bias"]
)
async def test_numbers_that_nothing_holds_are_refused_by_name(field):
    front = make_front(Script(), ledger=None)
    async with serving(front) as url, httpx2.AsyncClient(timeout=AT_MOST_S) as client:
        numbers = ("1" + "0" * 400, "-1" + "0" * 400, "1e400", "NaN", "18446744073709551616")
        # A bias of any size is limited to the range from -100 to 100.
        for number in numbers[: 4 if field == "logit_bias" else 5]:
            number = f'{{"1":{number}}}' if field == "logit_bias" else number
            body = f'{{"model":"antefix-tiny","prompt":"x","{field}":{number}}}'
            answer = await client.post(url + "/v1/completions", content=body)
            assert answer.status_code == 400 and field in answer.text, (number, answer.text)
    assert not front.accounts._running


async def test_what_is_no_json_is_refused():
    front = make_front(Script(), ledger=None)
    async with serving(front) as url, httpx2.AsyncClient(timeout=AT_MOST_S) as client:
        for content in (b"", b"{", b"[]", b'"x"', b"\xff", b"[" * 100_000):
            answer = await client.post(url + "/v1/chat/completions", content=content)
            assert answer.status_code == 400 and answer.json()["error"]["message"]


@pytest.mark.parametrize("depth", [20, 150, 250, 400, 900])
async def test_what_is_nested_deeply_is_answered_or_refused(depth):
    deep = '{"a":' * depth + "1" + "}" * depth
    documents = '{"type":"document","source":{"type":"content","content":[' * depth + '"x"' + "]}}" * depth
    user = '{"role":"user","content":"x"}'
    tool_use = f'{{"role":"assistant","content":[{{"type":"tool_use","id":"1","name":"f","input":{deep}}}]}}'
    call = f'{{"id":"1","function":{{"name":"f","arguments":{json.dumps(deep)}}}}}'
    bodies = [
        ("/v1/messages", f'"messages":[{{"role":"user","content":[{documents}]}}]'),
        ("/v1/messages", f'"messages":[{user},{tool_use},{user}]'),
        (
            "/v1/messages",
            f'"messages":[{user}],"tools":[{{"name":"f","strict":true,"input_schema":{{"enum":[{deep}]}}}}]',
        ),
        ("/v1/messages", f'"messages":[{user}],"tools":[{{"name":"f","input_schema":{deep}}}]'),
        ("/v1/chat/completions", f'"messages":[{user},{{"role":"assistant","tool_calls":[{call}]}},{user}]'),
        ("/v1/chat/completions", f'"messages":[{user}],"colour":{deep},"metadata":{deep}'),
        ("/v1/chat/completions", f'"messages":[{{"role":"user","content":{"[" * depth + "]" * depth}}}]'),
        ("/v1/responses", f'"input":[{{"type":"local_shell_call","action":{deep}}},{user}]'),
    ]
    front = make_front(Script(), ledger=None)
    async with serving(front, chat_format="deepseek-v4") as url, httpx2.AsyncClient(timeout=AT_MOST_S) as client:
        for address, body in bodies:
            content = f'{{"model":"antefix-tiny","max_tokens":3,{body}}}'
            answer = await client.post(url + address, content=content.encode())
            assert answer.status_code in (200, 400), (address, answer.text[:300])
    assert not front.accounts._running


@pytest.mark.slow
async def test_many_keys_are_counted_and_not_each_named():
    front = make_front(Script(), ledger=None)
    body = {"model": "antefix-tiny", "prompt": "x", **{f"k{number}": 1 for number in range(200_000)}}
    async with serving(front) as url, httpx2.AsyncClient(timeout=AT_MOST_S) as client:
        answer = await client.post(url + "/v1/completions", content=json.dumps(body).encode(), timeout=AT_MOST_S)
        long_name = await client.post(url + "/v1/completions", json={"model": "m" * 257, "prompt": "x"})
    named = answer.headers["antefix-ignored"].split(", ")
    assert answer.status_code == 200 and named[-1] == f"+{200_000 - len(named) + 1} more"
    assert long_name.status_code == 400 and long_name.json()["error"]["param"] == "model"


@pytest.mark.parametrize("name", ["a\x1b[2J", "a\nb", "a\x1fb", "a\x7f", "a\x9b2J"])
def test_names_that_a_terminal_would_obey_are_refused(name, tmp_path):
    for tenant, user in ((name, ""), ("acme", name)):
        with pytest.raises(InvalidRequest, match="control characters"):
            cache_tenant(tenant, user)
    path = tmp_path / "tenants.toml"
    path.write_text(f"[[tenant]]\nname = {json.dumps(name)}\n")
    with pytest.raises(ConfigError, match="control characters"):
        load_tenants(path)
    assert cache_tenant("Zürich 東", "é") == "Zürich 東\x1fé"
