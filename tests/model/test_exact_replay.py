"""Exact replay: the window state that later tokens read is exact after the bound's number of tokens, and not after
fewer.

The bound is L * (n_win - 1). If CSA's groups are longer than n_win - 1, their overlap may reach further back
(tests/shared/test_replay_reach.py).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from antefix.layout import KVFormat
from antefix.model import BlockPool, Model, Sequence, WindowState, forward, load_model
from tests.slow_cases import slow_but

Checkpoint = Callable[[str], Path]
Prompt = Callable[..., np.ndarray]
# Plans in which no CSA group is longer than n_win - 1.
NARROW = ("flash", "pro", "small_ratios", "odd_ratios", "coprime_ratios")
PLANS = (*NARROW, "wide_overlap")


def replayed_error(model: Model, tokens: np.ndarray, start: int, end: int) -> float:
    """Relative error of the logits after `end`. Window state is replayed from `start`, with garbage before it."""
    size = model.config.geometry.block_size
    pool = BlockPool(model.layout, -(-len(tokens) // size))
    cold = Sequence(pool.allocate(pool.num_blocks), WindowState.zeros(model.layout, 0))
    forward(model, pool, [(cold, tokens[:end])])
    replayed = Sequence(cold.block_table, WindowState.zeros(model.layout, start))
    # Garbage takes the window's place, because exactness must not depend on zeros.
    replayed.window.window.copy_(torch.randn(replayed.window.window.shape, generator=torch.Generator().manual_seed(0)))
    before = pool.rows.clone()
    forward(model, pool, [(replayed, tokens[start:end])], write_global_kv=False)
    assert torch.equal(pool.rows, before)
    want = forward(model, pool, [(cold, tokens[end:])], logits="all")
    got = forward(model, pool, [(replayed, tokens[end:])], logits="all")
    return float((got - want).abs().max() / want.abs().max())


@pytest.mark.parametrize("plan", slow_but(["pro", "odd_ratios"], NARROW))
def test_the_bound_is_enough_and_sharp(checkpoint: Checkpoint, prompt: Prompt, plan: str) -> None:
    model = load_model(checkpoint(plan), dtype=torch.float64, kv_format=KVFormat.FLOAT64)
    geometry = model.config.geometry
    bound = geometry.num_layers * (geometry.window - 1)
    # The stored state has one more token in the oldest slot of each window, which is never read.
    assert geometry.replay_reach[0] == bound + 1
    start = geometry.block_size
    tokens = prompt(start + bound + 6)
    assert replayed_error(model, tokens, start, start + bound) == 0.0
    assert replayed_error(model, tokens, start, start + bound - 1) > 1e-14


@pytest.mark.parametrize("kv_format", [KVFormat.FP8, KVFormat.FLOAT32])
@pytest.mark.parametrize("plan", slow_but(["pro", "odd_ratios"], PLANS))
def test_replay_of_whole_blocks_gives_the_cold_runs_bits_and_writes_nothing(
    checkpoint: Checkpoint, prompt: Prompt, plan: str, kv_format: KVFormat
) -> None:
    model = load_model(checkpoint(plan), kv_format=kv_format)
    geometry = model.config.geometry
    start, span = geometry.block_size, geometry.replay_tokens
    tokens = prompt(start + span + 5)
    pool = BlockPool(model.layout, -(-len(tokens) // geometry.block_size))
    cold = Sequence(pool.allocate(pool.num_blocks), WindowState.zeros(model.layout, 0))
    forward(model, pool, [(cold, tokens[: start + span])])
    before = pool.rows.clone()
    mirrors = [pool.decoded(part).clone() for part in model.layout.parts]
    replayed = Sequence(cold.block_table, WindowState.zeros(model.layout, start))
    for piece in np.array_split(tokens[start : start + span], 3):
        forward(model, pool, [(replayed, piece)], write_global_kv=False)
    assert torch.equal(pool.rows, before)
    assert all(torch.equal(pool.decoded(p), m) for p, m in zip(model.layout.parts, mirrors, strict=True))
    assert replayed.window.to_bytes() == cold.window.to_bytes()
    other = replayed.window.clone()
    want = forward(model, pool, [(cold, tokens[start + span :])], logits="all")
    got = forward(model, pool, [(Sequence(cold.block_table, other), tokens[start + span :])], logits="all")
    assert torch.equal(got, want)


def test_a_normal_run_over_the_same_span_would_have_written(checkpoint: Checkpoint, prompt: Prompt) -> None:
    """The check above can fail: if the replay writes, an inexact start changes stored bytes."""
    model = load_model(checkpoint("pro"))
    size = model.config.geometry.block_size
    tokens = prompt(4 * size)
    pool = BlockPool(model.layout, 4)
    cold = Sequence(pool.allocate(4), WindowState.zeros(model.layout, 0))
    forward(model, pool, [(cold, tokens)])
    before = pool.rows.clone()
    forward(model, pool, [(Sequence(cold.block_table, WindowState.zeros(model.layout, size)), tokens[size:])])
    assert not torch.equal(pool.rows, before)
