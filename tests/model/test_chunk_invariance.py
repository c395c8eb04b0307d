"""On a CPU, how a prompt is cut into calls and what else is in the batch never changes a bit.

The tests compare the logits of every token, the pool's bytes and the window state's bytes, to the bit.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from antefix.layout import KVFormat
from antefix.model import BlockPool, Model, Sequence, WindowState, forward, load_model

Checkpoint = Callable[[str], Path]
Prompt = Callable[..., np.ndarray]
PLANS = ("flash", "pro", "small_ratios", "odd_ratios", "coprime_ratios")
FORMATS = (KVFormat.FP8, KVFormat.FLOAT32)
# Two threads run on one plan only, because on the other plans they would test the same.
THREADS = [
    *((plan, 1) for plan in PLANS),
    (PLANS[0], 2),
    *(pytest.param(plan, 2, marks=pytest.mark.long) for plan in PLANS[1:]),
]
# Examples and tests share models, because no test changes a model.
model_of = functools.cache(load_model)
# Fixtures are immutable (a directory, a function), so that examples may share them.
CONFIG = settings(deadline=None, max_examples=4, suppress_health_check=[HealthCheck.function_scoped_fixture])


class Run:
    """One sequence with its own pool, and all its results."""

    def __init__(self, model: Model, num_tokens: int) -> None:
        self.model = model
        size = model.config.geometry.block_size
        self.pool = BlockPool(model.layout, -(-num_tokens // size))
        self.sequence = Sequence(self.pool.allocate(self.pool.num_blocks), WindowState.zeros(model.layout, 0))
        self.logits: list[torch.Tensor] = []

    def feed(self, tokens: np.ndarray) -> Run:
        self.logits.append(forward(self.model, self.pool, [(self.sequence, tokens)], logits="all"))
        return self

    def outcome(self) -> tuple[torch.Tensor, torch.Tensor, bytes]:
        return torch.cat(self.logits), self.pool.rows, self.sequence.window.to_bytes()


def assert_same_bits(a: Run, b: Run) -> None:
    (logits_a, rows_a, state_a), (logits_b, rows_b, state_b) = a.outcome(), b.outcome()
    assert torch.equal(logits_a, logits_b)
    assert torch.equal(rows_a, rows_b)
    assert state_a == state_b


def cut(tokens: np.ndarray, cuts: set[int]) -> list[np.ndarray]:
    return [piece for piece in np.split(tokens, sorted(c for c in cuts if c < len(tokens))) if len(piece)]


@pytest.mark.slow
@pytest.mark.parametrize("kv_format", FORMATS)
@pytest.mark.parametrize(("plan", "num_threads"), THREADS)
@CONFIG
@given(cuts=st.sets(st.integers(1, 150), max_size=12), length=st.integers(40, 160))
def test_any_cutting_equals_one_go(
    checkpoint: Checkpoint,
    prompt: Prompt,
    plan: str,
    kv_format: KVFormat,
    num_threads: int,
    cuts: set[int],
    length: int,
) -> None:
    model = model_of(checkpoint(plan), kv_format=kv_format)
    tokens = prompt(length)
    torch.set_num_threads(1)
    whole = Run(model, length).feed(tokens)
    torch.set_num_threads(num_threads)
    pieces = Run(model, length)
    for piece in cut(tokens, cuts):
        pieces.feed(piece)
    assert_same_bits(whole, pieces)


@pytest.mark.slow
@pytest.mark.parametrize("kv_format", FORMATS)
@pytest.mark.parametrize("plan", PLANS)
def test_token_by_token_equals_one_go(checkpoint: Checkpoint, prompt: Prompt, plan: str, kv_format: KVFormat) -> None:
    model = model_of(checkpoint(plan), kv_format=kv_format)
    tokens = prompt(140)
    whole, steps = Run(model, 140).feed(tokens), Run(model, 140)
    for token in cut(tokens, set(range(140))):
        steps.feed(token)
    assert_same_bits(whole, steps)


@pytest.mark.slow
@pytest.mark.parametrize(("plan", "num_threads"), THREADS)
@CONFIG
@given(data=st.data())
def test_other_sequences_in_the_batch_change_nothing(
    checkpoint: Checkpoint, prompt: Prompt, plan: str, num_threads: int, data: st.DataObject
) -> None:
    """Sequences of different ages share steps: some prefill, some decode; each must end as if alone."""
    model = model_of(checkpoint(plan))
    torch.set_num_threads(num_threads)
    size = model.config.geometry.block_size
    lengths = data.draw(st.lists(st.integers(1, 90), min_size=2, max_size=5))
    pool = BlockPool(model.layout, sum(-(-length // size) for length in lengths))
    prompts = [prompt(length, salt) for salt, length in enumerate(lengths)]
    sequences = [Sequence(pool.allocate(-(-n // size)), WindowState.zeros(model.layout, 0)) for n in lengths]
    got: list[list[torch.Tensor]] = [[] for _ in lengths]
    while waiting := [i for i in range(len(lengths)) if sequences[i].position < lengths[i]]:
        batch, members = [], []
        for i in data.draw(st.lists(st.sampled_from(waiting), min_size=1, unique=True)):
            left = prompts[i][sequences[i].position :]
            batch.append((sequences[i], left[: data.draw(st.integers(1, len(left)))]))
            members += [i] * len(batch[-1][1])
        for i, row in zip(members, forward(model, pool, batch, logits="all"), strict=True):
            got[i].append(row)
    for i, sequence in enumerate(sequences):
        alone = Run(model, lengths[i]).feed(prompts[i])
        assert torch.equal(torch.stack(got[i]), alone.logits[0])
        assert torch.equal(pool.rows[sequence.block_table], alone.pool.rows)
        assert sequence.window.to_bytes() == alone.sequence.window.to_bytes()


@pytest.mark.slow
def test_scattered_blocks_give_the_bits_of_neighbouring_blocks(checkpoint: Checkpoint, prompt: Prompt) -> None:
    model = model_of(checkpoint("pro"))
    tokens = prompt(150)
    together = Run(model, 150).feed(tokens)
    apart = Run(model, 150)
    apart.sequence.block_table.reverse()
    apart.feed(tokens[:70]).feed(tokens[70:])
    assert torch.equal(torch.cat(apart.logits), together.logits[0])
    assert torch.equal(apart.pool.rows.flip(0), together.pool.rows)


def test_last_logits_are_the_last_rows_of_all(checkpoint: Checkpoint, prompt: Prompt) -> None:
    model = model_of(checkpoint("flash"))
    size = model.config.geometry.block_size
    pool = BlockPool(model.layout, 4)
    tokens = prompt(2 * size)

    def batch() -> list[tuple[Sequence, np.ndarray]]:
        windows = [WindowState.zeros(model.layout, 0) for _ in range(2)]
        return [(Sequence([0, 1], windows[0]), tokens[:150]), (Sequence([2, 3], windows[1]), tokens[:33])]

    every = forward(model, pool, batch(), logits="all")
    assert torch.equal(forward(model, pool, batch()), every[[149, 182]])
