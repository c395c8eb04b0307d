"""Log probabilities through the real `openai` package: each token of the shown text appears once, streamed or not."""

import pytest

from tests.gateway.scripted import Script, make_front, script_logprob, serving
from tests.on_demand import openai

MODEL = "antefix-tiny"
ASK = [{"role": "user", "content": "How is Bern?"}]
TEXT = "Grüße aus Bern"


@pytest.fixture
async def client(tmp_path):
    script = Script(say=lambda prompt: TEXT)
    async with serving(make_front(script, ledger=tmp_path / "ledger")) as url, client_of(url) as client:
        yield client


def client_of(url):
    return openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="-", max_retries=0)


def bytes_of(entries):
    return b"".join(bytes(entry.bytes) for entry in entries)


async def test_chat_tells_each_token_once_streamed_or_whole(client):
    settings = {"model": MODEL, "messages": ASK, "logprobs": True, "top_logprobs": 2}
    whole = (await client.chat.completions.create(**settings)).choices[0].logprobs.content
    streamed = []
    async for chunk in await client.chat.completions.create(**settings, stream=True):
        found = chunk.choices[0].logprobs
        streamed += found.content if found else []
        # A chunk never has log probabilities of text that is not sent yet.
        assert len(bytes_of(streamed)) <= len(TEXT.encode())
    assert streamed == whole and bytes_of(whole) == TEXT.encode()
    first = script_logprob(ord("G"), 2)
    assert (whole[0].token, whole[0].logprob) == ("G", first.logprob)
    assert [(ord(top.token), top.logprob) for top in whole[0].top_logprobs] == list(first.top)
    # A token of half a character has no text, but it has bytes.
    assert whole[2].token == "�" and whole[2].bytes == ["ü".encode()[0]]


async def test_without_being_asked_for_there_are_none(client):
    answer = await client.chat.completions.create(model=MODEL, messages=ASK, logprobs=False)
    assert answer.choices[0].logprobs is None
    only_chosen = await client.chat.completions.create(model=MODEL, messages=ASK, logprobs=True)
    assert [entry.top_logprobs for entry in only_chosen.choices[0].logprobs.content] == [[]] * len(TEXT.encode())


@pytest.mark.parametrize("stream", [True, False])
async def test_a_stop_text_and_what_follows_it_have_none(client, stream):
    answer = await client.chat.completions.create(
        model=MODEL, messages=ASK, logprobs=True, stop=["us B"], stream=stream
    )
    entries = []
    if stream:
        async for chunk in answer:
            entries += chunk.choices[0].logprobs.content if chunk.choices[0].logprobs else []
    else:
        entries = answer.choices[0].logprobs.content
    assert bytes_of(entries).decode() == "Grüße a"


async def test_reasoning_has_its_own_list(tmp_path):
    script = Script(say=lambda prompt: "Hm.</think>Sunny.")
    front = make_front(script, ledger=tmp_path / "ledger")
    async with serving(front, chat_format="deepseek-v4") as url, client_of(url) as client:
        answer = await client.chat.completions.create(model=MODEL, messages=ASK, logprobs=True)
    logprobs = answer.choices[0].logprobs
    assert bytes_of(logprobs.content) == b"Sunny."
    reasoning = b"".join(bytes(entry["bytes"]) for entry in logprobs.reasoning_content)
    # The tag that ends the reasoning counts as one of its tokens, as in the bill.
    assert reasoning == b"Hm.</think>"
    assert answer.usage.completion_tokens_details.reasoning_tokens == len(reasoning)


async def test_completions_have_tokens_offsets_and_top(client):
    settings = {"model": MODEL, "prompt": "x", "logprobs": 1}
    whole = (await client.completions.create(**settings)).choices[0].logprobs
    assert whole.tokens[:3] == ["G", "r", "bytes:\\xc3"]
    assert whole.text_offset[:5] == [0, 1, 2, 2, 3]
    assert whole.top_logprobs[0] == {"G": script_logprob(ord("G"), 1).logprob}
    tokens, offsets = [], []
    async for chunk in await client.completions.create(**settings, stream=True):
        found = chunk.choices[0].logprobs
        tokens += found.tokens if found else []
        offsets += found.text_offset if found else []
    assert (tokens, offsets) == (whole.tokens, whole.text_offset)
    with pytest.raises(openai.BadRequestError, match="echo"):
        await client.completions.create(**settings, echo=True)
    with pytest.raises(openai.BadRequestError, match="top_logprobs"):
        await client.completions.create(**{**settings, "logprobs": 21})


async def test_responses_include_them_when_asked(client):
    settings = {
        "model": MODEL,
        "input": "How is Bern?",
        "include": ["message.output_text.logprobs"],
        "top_logprobs": 1,
    }
    whole = (await client.responses.create(**settings)).output[0].content[0]
    assert bytes_of(whole.logprobs) == TEXT.encode() == whole.text.encode()
    deltas = []
    async for event in await client.responses.create(**settings, stream=True):
        if event.type == "response.output_text.delta":
            deltas += event.logprobs
        if event.type == "response.content_part.added":
            assert event.part.logprobs == []
        if event.type == "response.completed":
            final = event.response.output[0].content[0]
    assert final.logprobs == whole.logprobs
    assert [delta.logprob for delta in deltas] == [entry.logprob for entry in whole.logprobs]
    with pytest.raises(openai.BadRequestError, match="top_logprobs"):
        await client.responses.create(model=MODEL, input="x", top_logprobs=3)
