"""Tokens chosen for a whole batch on the logits' device equal those of each sequence's own sampler on the host."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from antefix.sampling import Sampling
from antefix_decode.card_choice import choose_tokens
from antefix_decode.logprobs import token_logprob
from antefix_decode.penalties import Penalties
from antefix_decode.token_choice import Sampler
from tests.no_waiting import Watched

VOCAB = 333
STOPS = (3, 7, 400)
SETTINGS: tuple[dict[str, Any], ...] = (
    {},
    {"num_top_logprobs": 0},
    {"num_top_logprobs": 5},
    {"temperature": 1.0},
    {"temperature": 0.7, "top_p": 0.5, "num_top_logprobs": 20},
    {"temperature": 2.0, "top_k": 3},
    {"temperature": 1.5, "top_k": 1000, "min_p": 0.1, "top_p": 0.9},
    {"temperature": 1.0, "min_p": 1.0},
    {"temperature": 1e-3},
    {"frequency_penalty": 1.5, "presence_penalty": -0.5},
    {"repetition_penalty": 1.7, "temperature": 0.9},
    {"min_tokens": 4},
    {"min_tokens": 4, "stop_token_ids": (11, 5), "logit_bias": ((2, 5.0), (9, -100.0)), "temperature": 1.0},
    {"logit_bias": ((300, 100.0),), "repetition_penalty": 0.8, "frequency_penalty": -1.0, "num_top_logprobs": 2},
)


class Pattern:
    """A grammar that allows every third token."""

    is_over = False

    def __init__(self, first: int) -> None:
        self._first = first

    def mask(self, logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        keep = np.arange(len(logits)) % 3 == self._first
        return np.where(keep, logits, np.float32(-np.inf))

    def allowed(self) -> npt.NDArray[np.int32]:
        bits = np.zeros(-(-VOCAB // 32) * 32, np.bool_)
        bits[self._first : VOCAB : 3] = True
        return np.packbits(bits, bitorder="little").view(np.int32)

    def push(self, token: int) -> None:
        assert token % 3 == self._first


def sampler(settings: dict[str, Any], number: int, constraint: Pattern | None) -> Sampler:
    sampling = Sampling(max_tokens=9, seed=number, **settings)
    return Sampler(sampling, Penalties(sampling, stop_ids=STOPS, prompt=[1, 5, 5, 60]), constraint)


@pytest.mark.parametrize("kind", ["spread", "ties", "sure"])
def test_the_batch_gets_the_tokens_of_each_sampler(kind: str) -> None:
    random = np.random.default_rng(len(kind))
    kinds = [(settings, constraint) for settings in SETTINGS for constraint in (None, Pattern(len(settings) % 3))]
    pairs = [[sampler(settings, n, grammar) for _ in range(2)] for n, (settings, grammar) in enumerate(kinds)]
    tops = [settings.get("num_top_logprobs") for settings, _ in kinds]
    for step in range(5):
        logits = random.normal(size=(len(pairs), VOCAB)).astype(np.float32)
        if kind == "ties":
            logits = np.round(logits)
        elif kind == "sure":
            logits *= 30
        # Tokens 5 and 60 are likely and so repeat, which makes penalties of earlier steps change the choice.
        logits[:, [5, 60]] += 2
        want = [mine.choose(row, step) for (mine, _), row in zip(pairs, logits, strict=True)]
        given = torch.from_numpy(logits)
        wishes = [theirs.wish(step, top) for (_, theirs), top in zip(pairs, tops, strict=True)]
        with Watched(uploads=True):
            choices = choose_tokens(given, wishes)
        assert [choice.token for choice in choices] == want
        assert np.array_equal(given.numpy(), logits)
        for choice, row, top, (_, theirs) in zip(choices, logits, tops, pairs, strict=True):
            assert choice.are_numbers
            assert (choice.logprob is None) == (top is None)
            if top is not None:
                wanted = token_logprob(row, choice.token, top)
                assert choice.logprob is not None
                assert [token for token, _ in choice.logprob.top] == [token for token, _ in wanted.top]
                assert choice.logprob.logprob == pytest.approx(wanted.logprob, abs=1e-6)
            theirs.take(choice.token)


def test_an_end_that_must_not_come_yet_comes_where_nothing_else_is_left() -> None:
    class OnlyTheEnd(Pattern):
        def allowed(self) -> npt.NDArray[np.int32]:
            bits = np.zeros(352, np.bool_)
            bits[7] = True
            return np.packbits(bits, bitorder="little").view(np.int32)

        def push(self, token: int) -> None:
            assert token == 7

    one = sampler({"min_tokens": 4}, 0, OnlyTheEnd(0))
    other = sampler({"min_tokens": 4}, 0, None)
    logits = torch.zeros(2, VOCAB)
    logits[:, 7] = 5
    assert [choice.token for choice in choose_tokens(logits, [one.wish(0), other.wish(0)])] == [7, 0]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_logits_that_are_no_numbers_are_told(value: float) -> None:
    logits = torch.zeros(3, VOCAB)
    logits[1, 200] = value
    wishes = [sampler(settings, 0, None).wish(0) for settings in ({}, {}, {"temperature": 1.0})]
    assert [choice.are_numbers for choice in choose_tokens(logits, wishes)] == [True, False, True]
