"""The abilities of the committed model with the real cache, which are the reason for having it."""

from __future__ import annotations

import inspect
import textwrap

import numpy as np
import pytest
import torch

from antefix.layout import KVFormat
from models.training import tasks
from models.training.cached import CachedModel, bits
from models.training.corpus import Tokens
from tests.training.conftest import ROOT

pytestmark = pytest.mark.slow


DIRECTORY = ROOT / "models/antefix-tiny"


@pytest.fixture(scope="module")
def model() -> CachedModel:
    torch.set_num_threads(1)
    return CachedModel(DIRECTORY, num_tokens_max=4096)


@pytest.fixture(scope="module")
def source() -> Tokens:
    return tasks.encode(inspect.getsource(textwrap))


def answers(model: CachedModel, tokens: Tokens, spans: list[tuple[int, int]]) -> list[bool]:
    sequence = model.start()
    guesses = model.extend(sequence, tokens).argmax(-1).numpy()
    model.release(sequence)
    return [bool((guesses[start - 1 : end - 1] == tokens[start:end]).all()) for start, end in spans]


def test_values_planted_far_beyond_the_window_come_back(model: CachedModel, source: Tokens) -> None:
    distances = [200, 600, 1200, 2400]
    tokens, spans = tasks.retrieval_sequence(np.random.default_rng(0), source, 3072, distances)
    assert sum(answers(model, tokens, spans)) >= 3


@pytest.mark.slow
def test_another_prefix_gives_another_answer(model: CachedModel, source: Tokens) -> None:
    """The answer depends on the prefix, which makes a wrong hit visible."""
    tokens, spans = tasks.retrieval_sequence(np.random.default_rng(0), source, 3072, [2400])
    start, end = spans[0]
    value = tokens[start:end].tobytes()
    planted = tokens.tobytes().index(value) // 2
    other = tokens.copy()
    other[planted : planted + end - start] = tokens[planted : planted + end - start][::-1]
    assert answers(model, tokens, spans) == [True]
    assert answers(model, other, spans) == [False]


def test_text_takes_few_bits(model: CachedModel, source: Tokens) -> None:
    sequence = model.start()
    tokens = source[:2048]
    loss = bits(model.extend(sequence, tokens[:-1]), tokens[1:]).mean()
    model.release(sequence)
    assert loss < 1.6


def test_the_compact_format_loses_nothing_measurable(source: Tokens) -> None:
    tokens = source[:2049]
    losses = []
    for kv_format in (KVFormat.FP8, KVFormat.FLOAT32):
        model = CachedModel(DIRECTORY, num_tokens_max=2112, kv_format=kv_format)
        losses.append(bits(model.extend(model.start(), tokens[:-1]), tokens[1:]).mean())
    assert abs(losses[0] - losses[1]) < 0.01


def test_exact_replay_changes_no_bit_and_none_at_all_hurts(model: CachedModel, source: Tokens) -> None:
    geometry = model.layout.geometry
    prefix, rest = source[:2048], source[2048:2305]
    cold = model.start()
    model.extend(cold, prefix)
    losses = {}
    for replay in (0, geometry.replay_tokens):
        fork = model.fork(cold, model.replayed_window(cold, prefix, replay))
        losses[replay] = bits(model.extend(fork, rest[:-1]), rest[1:])
        model.release(fork)
    exact = model.fork(cold)
    wanted = bits(model.extend(exact, rest[:-1]), rest[1:])
    assert (losses[geometry.replay_tokens] == wanted).all()
    assert losses[0][: geometry.window].mean() > wanted[: geometry.window].mean() + 0.05
