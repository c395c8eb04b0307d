"""Which names clients may use for the one model, and how a name selects a thinking mode."""

from pathlib import Path

import httpx2
import pytest

from antefix.errors import ConfigError
from antefix_router.gateway.model_names import load_aliases
from tests.gateway.scripted import Script, make_front, serving
from tests.waiting import AT_MOST_S

SHIPPED = Path(__file__).parents[2] / "deploy" / "model_aliases.toml"
ASK = {"max_tokens": 5, "messages": [{"role": "user", "content": "hi"}]}


async def ask(client, name, **fields):
    return await client.post("/v1/chat/completions", json={"model": name, **ASK, **fields})


@pytest.fixture
async def client(request, tmp_path):
    settings = {"chat_format": "deepseek-v4", "model_names": ("ours",), **getattr(request, "param", {})}
    front = make_front(Script(), ledger=tmp_path / "ledger")
    async with serving(front, **settings) as url, httpx2.AsyncClient(base_url=url, timeout=AT_MOST_S) as client:
        yield client


async def test_an_unknown_name_is_served_by_the_only_model_and_a_header_says_so(client):
    for name in ("gpt-5.2", "claude-opus-4-8", "deepseek-chat", "Käse\r\n"):
        answer = await ask(client, name)
        assert answer.status_code == 200 and answer.headers["antefix-model"] == "antefix-tiny"
        assert answer.json()["model"] == name and answer.headers["antefix-mode"] == "high"
    for name in ("antefix-tiny", "ours"):
        assert "antefix-model" not in (await ask(client, name)).headers
    listed = (await client.get("/v1/models")).json()["data"]
    assert [model["id"] for model in listed] == ["antefix-tiny", "ours"]
    unlisted = await client.get("/v1/models/claude-opus-4-8")
    assert unlisted.status_code == 200 and unlisted.headers["antefix-model"] == "antefix-tiny"


async def test_every_api_says_which_model_served(client):
    for address, body in (
        ("/v1/messages", ASK),
        ("/v1/messages/count_tokens", ASK),
        ("/v1/responses", {"input": "hi"}),
        ("/v1/completions", {"prompt": "hi"}),
        ("/v1/messages", {**ASK, "stream": True}),
    ):
        answer = await client.post(address, json={"model": "other", **body})
        assert answer.status_code == 200 and answer.headers["antefix-model"] == "antefix-tiny"


@pytest.mark.parametrize("client", [{"unknown_models": "refuse", "model_aliases": str(SHIPPED)}], indirect=True)
async def test_the_shipped_aliases_name_modes(client):
    for name, mode in (
        ("claude-opus-4-8", "high"),
        ("gpt-5.2-codex", "high"),
        ("deepseek-chat", "off"),
        ("deepseek-reasoner", "high"),
        ("ours", "high"),
    ):
        answer = await ask(client, name)
        assert (answer.status_code, answer.headers["antefix-mode"]) == (200, mode), name
    # A mode in the request itself overrides the name's mode.
    assert (await ask(client, "deepseek-chat", reasoning_effort="max")).headers["antefix-mode"] == "max"
    assert (await ask(client, "deepseek-reasoner", thinking={"type": "disabled"})).headers["antefix-mode"] == "off"
    unknown = await ask(client, "llama")
    assert unknown.status_code == 404 and unknown.json()["error"]["code"] == "model_not_found"
    listed = (await client.get("/v1/models")).json()["data"]
    assert [model["id"] for model in listed] == ["antefix-tiny", "ours", "deepseek-chat", "deepseek-reasoner"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[[alias]]\nname = 5", "name must be a string"),
        ("[[alias]]\nname = 'a'\nmode = 'deep'", "mode must be one of"),
        ("[[alias]]\nname = 'a'\ncolour = 'red'", "unknown names: colour"),
        ("[other]", "unknown names: other"),
        ("not toml", "model aliases"),
    ],
)
def test_a_file_of_another_form_is_refused_by_name(tmp_path, text, says):
    (tmp_path / "a.toml").write_text(text)
    with pytest.raises(ConfigError, match=says):
        load_aliases(str(tmp_path / "a.toml"))
