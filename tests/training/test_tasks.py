"""Training sequences: their lengths and weights, and test sequences that training does not contain."""

from __future__ import annotations

import numpy as np
import pytest

from models.training import tasks
from models.training.corpus import Tokens
from models.training.tasks import ANSWER, NOISE, PAD


def decode(tokens: Tokens) -> str:
    return "".join(chr(token) if token < 256 else "|" for token in tokens)


@pytest.mark.parametrize("task", sorted(tasks.MAKERS))
@pytest.mark.parametrize("length", [257, 2048])
def test_a_sequence_has_the_length_asked_for(task: str, length: int, text: Tokens) -> None:
    rng = np.random.default_rng(0)
    tokens, weights = tasks.make_sequence(rng, text, length, {task: 1.0})
    assert tokens.shape == weights.shape == (length,)
    assert tokens.max() <= PAD
    assert not weights[tokens == PAD].any()


def test_answers_are_values_that_stand_in_the_text_before(text: Tokens) -> None:
    tokens, weights = tasks.make_sequence(np.random.default_rng(1), text, 4096, {"facts": 1.0})
    edges = np.flatnonzero(np.diff(np.concatenate([[0], (weights == ANSWER).astype(np.int8), [0]])))
    spans = list(zip(edges[::2], edges[1::2], strict=True))
    assert len(spans) > 5
    # The last value may be cut off by the end of the sequence.
    for start, end in spans[:-1]:
        assert decode(tokens[start:end]) in decode(tokens[: start - 20])


def test_planted_values_weigh_nothing(text: Tokens) -> None:
    sequence = tasks.empty_sequence()
    fact = tasks.Fact(attribute="access code", key="amber-falcon", value="48213")
    tasks.add_fact(sequence, fact)
    tokens, weights = sequence.cut(sequence.length)
    place = decode(tokens).index("48213")
    assert (weights[place : place + 5] == NOISE).all()


def test_training_never_sees_the_keys_of_tests() -> None:
    rng = np.random.default_rng(2)
    seen = {fact.key for _ in range(50) for fact in tasks.random_facts(rng, 40)}
    tested = {fact.key for _ in range(50) for fact in tasks.random_facts(rng, 40, test=True)}
    assert len(tested) > 100
    assert not seen & tested


def test_retrieval_spans_hold_the_values_at_their_distances(text: Tokens) -> None:
    distances = [128, 700, 2500]
    for seed in range(5):
        tokens, spans = tasks.retrieval_sequence(np.random.default_rng(seed), text, 4096, distances)
        whole = decode(tokens)
        for distance, (start, end) in zip(distances, spans, strict=True):
            value = whole[start:end]
            subject = whole[:start].rpartition("|")[2]
            planted = whole.index(subject + value)
            # A fact that would overlap another is moved on by that fact's length.
            assert abs((start - planted) - distance) < 400
            assert subject.startswith("The ")


def test_distances_that_do_not_fit_are_refused(text: Tokens) -> None:
    with pytest.raises(ValueError, match="does not fit"):
        tasks.retrieval_sequence(np.random.default_rng(0), text, 1024, [1000])
