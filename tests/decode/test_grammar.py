"""Grammars in a decode worker: compiled in the background, followed, continued, and no burden for other requests."""

import asyncio
import threading

import llguidance
import numpy as np
import pytest

from antefix.errors import InvalidRequest, Overloaded
from antefix.grammar import Vocabulary
from antefix.sampling import Sampling
from antefix.tokenizer import ByteTokenizer, load_tokenizer
from antefix_decode import grammar_state as grammars
from antefix_decode.grammar_state import Grammars
from antefix_decode.token_choice import Sampler
from tests.engines import MODEL
from tests.waiting import AT_MOST_S, until

WORD = 'start: "yes" | "no" | /[a-f]{4}/ "!"\n'


@pytest.fixture(scope="module")
def vocabulary():
    return Vocabulary(load_tokenizer(MODEL), 264)


def allowed(matcher):
    return set(np.flatnonzero(np.isfinite(matcher.mask(np.zeros(264, np.float32)))).tolist())


async def test_only_what_the_grammar_allows_keeps_its_logit(vocabulary):
    matcher = await Grammars(vocabulary).matcher(WORD)
    assert allowed(matcher) == set(b"ynabcdef")
    matcher.push(ord("n"))
    assert allowed(matcher) == {ord("o")} and not matcher.is_over
    matcher.push(ord("o"))
    assert matcher.is_over


async def test_logits_that_may_stay_stay_as_they_are(vocabulary):
    matcher = await Grammars(vocabulary).matcher(WORD)
    logits = np.random.default_rng(0).normal(size=264).astype(np.float32)
    before = logits.copy()
    masked = matcher.mask(logits)
    kept = np.isfinite(masked)
    assert np.array_equal(masked[kept], logits[kept]) and np.array_equal(logits, before)


async def test_a_continued_output_may_go_on_as_the_whole_one(vocabulary):
    ready = Grammars(vocabulary)
    first = await ready.matcher(WORD)
    for token in b"ab":
        first.push(token)
    assert allowed(await ready.matcher(WORD, list(b"ab"))) == allowed(first) == set(b"abcdef")
    with pytest.raises(InvalidRequest):
        await ready.matcher(WORD, list(b"yo"))


async def test_outputs_of_one_grammar_do_not_disturb_each_other(vocabulary, monkeypatch):
    made = []
    monkeypatch.setattr(vocabulary, "matcher", lambda text, make=vocabulary.matcher: made.append(text) or make(text))
    ready = Grammars(vocabulary)
    one, two = await ready.matcher(WORD), await ready.matcher(WORD)
    one.push(ord("y"))
    assert allowed(one) == {ord("e")} and allowed(two) == set(b"ynabcdef") and made == [WORD]


async def test_the_sampler_ends_where_nothing_may_follow(vocabulary):
    matcher = await Grammars(vocabulary).matcher(WORD)
    sampler = Sampler(Sampling(max_tokens=9, temperature=1.0, seed=1), constraint=matcher)
    output = []
    while not sampler.is_over:
        output.append(sampler.choose(np.zeros(264, np.float32), len(output)))
    assert (llguidance and bytes(output) in (b"yes", b"no")) or bytes(output).endswith(b"!")


@pytest.mark.parametrize("wrong", ["", "start: nothing", 'start: %json {"type": "no such"}', "start: /(?=a)b/"])
async def test_what_is_no_grammar_is_refused(vocabulary, wrong):
    with pytest.raises(InvalidRequest, match="cannot be used"):
        await Grammars(vocabulary).matcher(wrong)


async def test_a_grammar_that_takes_too_long_holds_up_nobody(vocabulary, monkeypatch):
    """The event loop continues meanwhile, and the request is refused at the deadline."""
    monkeypatch.setattr(grammars, "READY_S_MAX", 0.2)
    go, ended = threading.Event(), []

    def slow(text):
        go.wait(AT_MOST_S)
        ended.append(text)

    monkeypatch.setattr(vocabulary, "matcher", slow)
    with pytest.raises(InvalidRequest, match="compile"):
        await Grammars(vocabulary).matcher(WORD)
    assert not ended
    go.set()


async def test_grammars_that_never_end_take_their_own_threads_and_no_others(vocabulary, monkeypatch):
    monkeypatch.setattr(grammars, "READY_S_MAX", 0.05)
    go, begun = threading.Event(), []

    def hang(text):
        begun.append(text)
        go.wait(AT_MOST_S)
        raise ValueError("nobody waits for this")

    with monkeypatch.context() as patch:
        patch.setattr(vocabulary, "matcher", hang)
        ready = Grammars(vocabulary)
        for number in range(6):
            refused = InvalidRequest if number < grammars.NUM_AT_ONCE else Overloaded
            with pytest.raises(refused):
                await ready.matcher(f'start: "{number}"')
        await until(lambda: len(begun) >= grammars.NUM_AT_ONCE)
        assert len(begun) == grammars.NUM_AT_ONCE
        assert await asyncio.to_thread(lambda: 7) == 7
        go.set()
        await until(lambda: ready._turns._value >= grammars.NUM_AT_ONCE)
    monkeypatch.setattr(grammars, "READY_S_MAX", 60.0)
    assert await ready.matcher(WORD) is not None


async def test_no_more_are_kept_than_may_be(vocabulary, monkeypatch):
    monkeypatch.setattr(grammars, "NUM_KEPT_MAX", 2)
    ready = Grammars(vocabulary)
    for number in range(5):
        await ready.matcher(f'start: "{number}"')
    assert len(ready._ready) == 2


async def test_a_model_without_an_end_token_still_ends():
    tokenizer = ByteTokenizer({}, ())
    matcher = await Grammars(Vocabulary(tokenizer, 256)).matcher('start: "ab"')
    for token in b"ab":
        assert np.flatnonzero(np.isfinite(matcher.mask(np.zeros(256, np.float32)))).tolist() == [token]
        matcher.push(token)
    assert matcher.is_over


async def test_ids_beyond_the_tokenizers_are_never_chosen(vocabulary):
    matcher = await Grammars(vocabulary).matcher("start: /(?s:.*)/")
    # Tokens 257 and 260 end the text. The model has tokens 262 and 263, but nothing uses them.
    assert {token for token in allowed(matcher) if token >= 256} == {257, 260}
