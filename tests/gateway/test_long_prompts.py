"""A prompt that takes long to encode delays no other request, stays in order, and can be cancelled."""

from __future__ import annotations

import asyncio
import threading

import httpx
import pytest

from antefix_router.encoding import CHARACTERS_MIN, Encoding
from tests.gateway.scripted import Script, make_front, serving
from tests.waiting import AT_MOST_S

MODEL = "antefix-tiny"
LONG = "long " * CHARACTERS_MIN


class HeldTokenizer:
    """The front's tokenizer. Long texts wait until the test lets them continue, as if they were much longer."""

    def __init__(self, inner):
        self._inner = inner
        self.begun = threading.Event()
        self.go = threading.Event()

    def __getattr__(self, name):
        return getattr(self._inner, name)

    def _held(self, text):
        if len(text) >= CHARACTERS_MIN:
            self.begun.set()
            if not self.go.wait(AT_MOST_S):
                raise TimeoutError("nothing else continued while a long prompt was encoded")

    def encode(self, text):
        self._held(text)
        return self._inner.encode(text)

    def encode_plain(self, text):
        self._held(text)
        return self._inner.encode_plain(text)


@pytest.fixture
async def held(tmp_path):
    """(script, tokenizer, client) of a gateway whose long prompts wait in the tokenizer."""
    script = Script()
    front = make_front(script, ledger=tmp_path / "ledger")
    front.tokenizer = HeldTokenizer(front.tokenizer)
    async with serving(front) as url, httpx.AsyncClient(base_url=url, timeout=AT_MOST_S) as client:
        yield script, front.tokenizer, client
        front.tokenizer.go.set()


def chat(text):
    return {"model": MODEL, "messages": [{"role": "user", "content": text}], "max_tokens": 5}


ADDRESSES = {
    "/v1/chat/completions": chat,
    "/v1/messages": chat,
    "/v1/messages/count_tokens": lambda text: {"model": MODEL, "messages": [{"role": "user", "content": text}]},
    "/v1/completions": lambda text: {"model": MODEL, "prompt": text, "max_tokens": 5},
    "/v1/responses": lambda text: {"model": MODEL, "input": text, "max_output_tokens": 5},
}


@pytest.mark.parametrize("address", ADDRESSES)
async def test_others_are_answered_while_a_long_prompt_is_encoded(held, address):
    script, tokenizer, client = held
    body = ADDRESSES[address]
    long = asyncio.create_task(client.post(address, json=body(LONG)))
    assert await asyncio.to_thread(tokenizer.begun.wait, AT_MOST_S)
    answer = await client.post(address, json=body("short"))
    assert answer.status_code == 200 and not long.done()
    tokenizer.go.set()
    assert (await long).status_code == 200
    prompts = ["".join(map(chr, (token for token in prompt if token < 256))) for prompt in script.prompts]
    assert all("short" in prompt or LONG in prompt for prompt in prompts)
    assert len(prompts) == (0 if address.endswith("count_tokens") else 2)


async def test_a_long_conversation_has_the_tokens_it_would_have_on_the_loop(held):
    script, tokenizer, client = held
    tokenizer.go.set()
    turns = [
        {"role": "user", "content": LONG},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "?"},
    ]
    for messages in (turns[:1], turns):
        answer = await client.post(
            "/v1/chat/completions", json={"model": MODEL, "messages": messages, "reasoning_effort": "none"}
        )
        assert answer.json()["choices"][0]["message"]["content"] == "yes"
    # The answer is found by all tokens before it, so the second prompt begins with the first prompt and its answer.
    first, second = script.prompts
    assert second[: len(first) + 3] == first + list(b"yes")


async def test_what_is_cancelled_before_a_thread_takes_it_never_runs():
    encoding, go, ran = Encoding(), threading.Event(), []

    def work(name):
        ran.append(name)
        go.wait(AT_MOST_S)
        return name

    running = [asyncio.create_task(encoding.run(CHARACTERS_MIN, lambda n=n: work(n))) for n in range(4)]
    await asyncio.sleep(0)
    waiting = asyncio.create_task(encoding.run(CHARACTERS_MIN, lambda: work("given up")))
    await asyncio.sleep(0)
    for task in (waiting, running[0]):
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    go.set()
    assert await asyncio.gather(*running[1:]) == [1, 2, 3]
    assert await encoding.run(CHARACTERS_MIN, lambda: work("next")) == "next"
    assert "given up" not in ran


async def test_an_error_in_a_thread_is_the_callers():
    with pytest.raises(ValueError, match="half"):
        await Encoding().run(CHARACTERS_MIN, lambda: (_ for _ in ()).throw(ValueError("half")).__next__())
