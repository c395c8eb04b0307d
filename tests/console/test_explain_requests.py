"""`antefix explain` of requests: rendered by the door's code, read from the ledger, and compared with each other."""

import asyncio
import json
from argparse import Namespace

import httpx2
import numpy as np
import pytest

from antefix.block import CPU_FLOAT32, chain_of
from antefix.errors import ConfigError
from antefix.layout import KVFormat
from antefix.model_dir import identify
from antefix.prompt_marks import marks_of
from antefix.secret import Keyring, create_secret_file
from antefix.tokenizer import load_tokenizer
from antefix_billing.ledger import Ledger
from antefix_console.cli import main
from antefix_console.commands.explain_requests import _door
from antefix_console.deployment import DOOR_FILE
from antefix_kvstore.kvstore_config import KvStoreConfig
from antefix_kvstore.storage_engine import StorageEngine
from antefix_router.gateway.dry_run import dry_run
from antefix_router.gateway.gateway_config import GatewayConfig
from antefix_router.gateway.user_names import split_user
from tests.billing.usage_records import NOW_US, record
from tests.gateway.bodies import CHAT, MESSAGES, RESPONSES
from tests.gateway.scripted import MODEL, Script, make_front, serving
from tests.gateway.test_user_names import ONE, claude
from tests.waiting import AT_MOST_S

SIZE = 64
HI = {"role": "user", "content": "hi"}
APIS = {
    "chat": ("/v1/chat/completions", CHAT),
    "responses": ("/v1/responses", RESPONSES),
    "anthropic": ("/v1/messages", MESSAGES),
}
IDENTITY = identify(MODEL)


@pytest.fixture
def data_dir(tmp_path):
    """The directory that `antefix up` leaves: an empty store, a secret, and the door's settings."""
    create_secret_file(tmp_path / "secret")
    (tmp_path / DOOR_FILE).write_text(json.dumps({"chat_format": "deepseek-v4", "prefix_rules": ""}))
    StorageEngine(KvStoreConfig(dir=str(tmp_path / "store"), budget_bytes=64 << 20)).close()
    return tmp_path


@pytest.fixture
def explain(data_dir, capsys):
    def explain(*flags, code=0):
        assert main(["explain", "--data-dir", str(data_dir), "--json", *map(str, flags)]) == code
        out = capsys.readouterr()
        return json.loads(out.out) if code == 0 else out.err

    return explain


def dry(body, api, **settings):
    keyring = Keyring(b"0" * 16)
    config = GatewayConfig(chat_format="deepseek-v4", **settings)
    return asyncio.run(
        dry_run(body, api, identity=IDENTITY, tokenizer=load_tokenizer(MODEL), keyring=keyring, config=config)
    )


@pytest.mark.parametrize("api", APIS)
def test_the_dry_run_is_the_prompt_that_the_door_runs(api):
    address, body = APIS[api]
    billing = {"role": "system", "content": "x-anthropic-billing-header: cc_version=1; cch=ab;\nBe brief."}
    bodies = [body, {**body, "user": claude(ONE), "metadata": {"user_id": claude(ONE)}}]
    if api == "chat":
        bodies.append({**body, "messages": [billing, *body["messages"]]})
    script = Script()

    async def send():
        async with (
            serving(make_front(script, ledger=None), chat_format="deepseek-v4") as url,
            httpx2.AsyncClient(base_url=url, timeout=AT_MOST_S) as client,
        ):
            return [(await client.post(address, json=each)).status_code for each in bodies]

    assert set(asyncio.run(send())) == {200}
    for request, each in zip(script.requests, bodies, strict=True):
        prompt = dry(each, api)
        assert prompt.tokens.tolist() == request.tokens.tolist()
        assert (prompt.user, prompt.session) == (request.caller.user, request.caller.session)
        # The spans cover the whole prompt in order, so each token is explained by its own span.
        assert [span.start for span in prompt.spans] == [0, *(span.end for span in prompt.spans)][:-1]
        assert prompt.spans[-1].end == len(prompt.tokens)


def written(tmp_path, name, body):
    (tmp_path / name).write_text(json.dumps(body))
    return tmp_path / name


PARTINGS = {
    # (path that is changed in the second request, its new value, path where the explanation must say that they differ)
    "system text": (("messages", 0, "content", 0, "text"), "Be brief!", "messages[0].content[0].text"),
    "a tool": (("tools", 0, "function", "description"), "Reads a lot.", "tools[0].function.description"),
    "a question": (("messages", 1, "content", 0, "text"), "Read b.txt", "messages[1].content[0].text"),
    "thinking": (
        ("messages", 2, "reasoning_details", 0, "text"),
        "Let me think.",
        "messages[2].reasoning_details[0].text",
    ),
    "an answer": (("messages", 2, "content"), "I looked.", "messages[2].content"),
    "arguments": (
        ("messages", 2, "tool_calls", 0, "function", "arguments"),
        '{"path": "b.txt"}',
        "messages[2].tool_calls[0].function.arguments",
    ),
    "a result": (("messages", 3, "content", 0, "text"), "hell\nno", "messages[3].content[0].text"),
    "the last": (("messages", 4, "content"), "And new?", "messages[4].content"),
}


def changed(body, path, value):
    body = json.loads(json.dumps(body))
    holder = body
    for name in path[:-1]:
        holder = holder[name]
    holder[path[-1]] = value
    return body


@pytest.mark.parametrize("name", PARTINGS)
def test_two_requests_part_at_the_field_that_did_it(name, tmp_path, explain):
    path, value, where = PARTINGS[name]
    other = changed(CHAT, path, value)
    files = written(tmp_path, "one.json", CHAT), written(tmp_path, "other.json", other)
    answer = explain("--messages", files[0], "--against", files[1])
    first, second = (dry(body, "chat").tokens for body in (CHAT, other))
    size = min(len(first), len(second))
    token = int(np.flatnonzero(first[:size] != second[:size])[0])
    assert answer["tokens_alike"] == token and answer["blocks_alike"] == token // SIZE
    assert answer["first"]["path"] == answer["second"]["path"] == where
    assert answer["first"]["token"] == token and "«" in answer["first"]["shown"]


def test_the_line_is_counted_and_shown(tmp_path, explain, capsys, data_dir):
    bodies = [
        {
            "messages": [
                {"role": "system", "content": f"Be brief.\nToday is {day}.\nBe kind."},
                {"role": "user", "content": "hi"},
            ]
        }
        for day in ("Monday", "Tuesday")
    ]
    files = [written(tmp_path, f"{number}.json", body) for number, body in enumerate(bodies)]
    answer = explain("--messages", files[0], "--against", files[1])
    assert (answer["first"]["line"], answer["first"]["shown"]) == (2, "Today is «Monday.")
    assert answer["second"]["shown"] == "Today is «Tuesday."
    assert main(["explain", "--data-dir", str(data_dir), "--messages", str(files[0]), "--against", str(files[1])]) == 0
    out = capsys.readouterr().out
    assert "messages[0].content, line 2" in out and "Today is «Tuesday." in out and "in block 0" in out
    same = explain("--messages", files[0], "--against", files[0])
    assert same["parts"] is False
    longer = written(tmp_path, "longer.json", [*bodies[0]["messages"], {"role": "assistant", "content": "x"}, HI])
    answer = explain("--messages", files[0], "--against", longer)
    # The format writes the same opening in both prompts. They differ only where the answer's own text begins.
    assert answer["first"] is None or answer["first"]["path"] == ""


def test_a_request_is_explained_like_its_prompt(tmp_path, explain):
    body = {**MESSAGES, "metadata": {"user_id": claude(ONE)}}
    answer = explain("--messages", written(tmp_path, "m.json", body), "--api", "anthropic")
    assert answer["prompt_tokens"] == len(dry(body, "anthropic").tokens) and answer["miss_reason"] == "first_seen"
    assert answer["user"] == split_user(claude(ONE)).user and answer["session"] == ONE
    assert answer["format"] == "deepseek-v4"
    plain = explain("--messages", written(tmp_path, "p.json", [HI]), "--chat-format", "plain")
    assert plain["format"] == "plain" and plain["prompt_tokens"] == len("<|hi|>")


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("{", "not JSON"),
        ('{"messages": []}', "messages is empty"),
        ('{"messages": [{"role": "x"}]}', "messages[0].role"),
    ],
)
def test_what_the_door_refuses_is_refused_in_its_words(tmp_path, explain, content, why):
    (tmp_path / "x.json").write_text(content)
    assert why in explain("--messages", tmp_path / "x.json", code=2)


@pytest.fixture
def ledger(data_dir):
    """A ledger with three turns of ann, one of ben, and one from a version without block hashes."""
    keyring = Keyring.from_file(data_dir / "secret")
    digest = IDENTITY.fingerprint(KVFormat.FP8, namespace="default", exactness="exact", arithmetic=CPU_FLOAT32).digest
    question = {"role": "user", "content": "What is in the file? " * 40}

    def made(request_id, number, messages, user="ann", **changes):
        prompt = dry(messages, "chat")
        chain = chain_of(prompt.tokens, fingerprint_digest=digest, key=keyring.key(f"acme\x1f{user}"), block_size=SIZE)
        hit = changes.pop("hit", 0)
        return record(
            request_id, hit=hit, miss=len(prompt.tokens) - hit, user=user, fingerprint=digest.hex(),
            started_us=NOW_US + number, finished_us=NOW_US + 10 + number, prompt_marks=marks_of(chain.hashes),
            **changes,
        )  # fmt: skip

    system = {"role": "system", "content": "You are careful. " * 60}
    other = {"role": "system", "content": "You are careful. " * 30 + "You are brief. " * 30}
    ledger = Ledger(data_dir / "ledger")
    ledger.append(
        [
            made("one", 1, [system, question]),
            made("bens", 2, [system, question], user="ben"),
            made("two", 3, [other, question], prefix_volatile=True),
            record("old", started_us=NOW_US, user="ann", fingerprint=digest.hex()),
            made("three", 4, [system, question, {"role": "assistant", "content": "x"}, question], hit=17 * SIZE),
        ]
    )
    ledger.close()
    return {"one": [system, question], "two": [other, question]}


def test_a_request_of_the_ledger_says_what_it_hit_and_where_it_parts(ledger, explain, capsys, data_dir):
    answer = explain("--request-id", "chatcmpl-three")
    assert answer["request"]["hit_blocks"] == 17 and answer["request"]["miss_reason"] == "first_seen"
    assert answer["nearest"]["request"]["request_id"] == "one"
    shared = len(dry(ledger["one"], "chat").tokens) // SIZE
    assert answer["nearest"]["parting"]["blocks_min"] <= shared <= answer["nearest"]["parting"]["blocks_max"]
    assert main(["explain", "--data-dir", str(data_dir), "--request-id", "two"]) == 0
    out = capsys.readouterr().out
    assert "request two and request one begin with the same" in out and "begin with something that changes" in out
    assert explain("--request-id", "one")["nearest"] is None
    assert "no record of request" in explain("--request-id", "nobody's", code=2)


def test_requests_are_compared_without_their_text(ledger, explain, tmp_path):
    # The first 510 characters of the system text are equal, and so is the format's text before them.
    first, second = (dry(ledger[name], "chat").tokens for name in ("one", "two"))
    token = int(np.flatnonzero(first[: len(second)] != second[: len(first)])[0])
    by_id = explain("--request-id", "one", "--against", "two")["parting"]
    body = written(tmp_path, "two.json", ledger["two"])
    with_file = explain("--request-id", "one", "--against", body)
    from_file = explain("--messages", body, "--against", "one")
    assert by_id == with_file["parting"] == from_file["parting"]
    assert by_id["blocks_min"] <= token // SIZE <= by_id["blocks_max"]
    assert {spot["path"] for spot in from_file["spots"]} == {"[0].content"}
    assert "they differ in user" in explain("--request-id", "one", "--against", "bens", code=2)
    assert "kept no block hashes" in explain("--request-id", "one", "--against", "old", code=2)


def test_files_and_requests_need_a_place_to_look(tmp_path, capsys):
    assert main(["explain", "--request-id", "x"]) == 2
    assert "--ledger" in capsys.readouterr().err


DAMAGED = {
    "empty": b"",
    "truncated": b'{"chat_format": "deeps',
    "NUL bytes": bytes(64),
    "not UTF-8": b'{"chat_format": "\xff"}',
    "a list": b'["chat_format"]',
    "a string with a setting's name": b'"chat_format"',
    "null": b"null",
    "a number for a format": b'{"chat_format": 7}',
    "a list of aliases": b'{"model_aliases": ["a=b"]}',
    "an unknown format": b'{"chat_format": "none such"}',
    "nested for ever": b"[" * 100_000,
    "huge": b" " * (1 << 20) + b"{}",
    "a directory": None,
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged_settings_of_the_door_are_named_and_can_be_given_instead(damage, tmp_path):
    path, data = tmp_path / DOOR_FILE, DAMAGED[damage]
    path.mkdir() if data is None else path.write_bytes(data)
    nothing = {"chat_format": None, "model_aliases": None, "prefix_rules": None}
    with pytest.raises(ConfigError, match=f"(?s){DOOR_FILE}.*remove it"):
        _door(Namespace(data_dir=tmp_path, **nothing))
    given = {"chat_format": "plain", "model_aliases": "", "prefix_rules": ""}
    assert _door(Namespace(data_dir=tmp_path, **given)).chat_format == "plain"


def test_without_settings_of_the_door_the_defaults_hold(tmp_path):
    nothing = {"chat_format": None, "model_aliases": None, "prefix_rules": None}
    assert _door(Namespace(data_dir=tmp_path, **nothing)) == _door(Namespace(data_dir=None, **nothing))
