"""Window state and the unfinished block can be saved and restored at any position without changing a result."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from antefix.errors import BlockCorrupt, InternalError
from antefix.layout import KVFormat
from antefix.model import BlockPool, Model, Sequence, WindowState, forward, load_model, state_bytes

Checkpoint = Callable[[str], Path]
Prompt = Callable[..., np.ndarray]
PLANS = ("flash", "pro", "small_ratios", "odd_ratios", "coprime_ratios")
CONFIG = settings(deadline=None, max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])


def start(model: Model, num_blocks: int) -> tuple[BlockPool, Sequence]:
    pool = BlockPool(model.layout, num_blocks)
    return pool, Sequence(pool.allocate(num_blocks), WindowState.zeros(model.layout, 0))


def moved(model: Model, pool: BlockPool, sequence: Sequence) -> tuple[BlockPool, Sequence]:
    """The sequence moved through bytes only to other rows of a new pool."""
    rows = [bytes(pool.payloads([block])[0]) for block in sequence.block_table]
    state = sequence.window.to_bytes()
    other = BlockPool(model.layout, 2 * len(rows) + 1)
    other.allocate(1)
    table = other.allocate(len(rows))[::-1]
    for block, row in zip(table, rows, strict=True):
        other.payloads([block])[0][:] = row
    other.note_filled(table)
    return other, Sequence(table, WindowState.from_bytes(model.layout, sequence.position, state))


@pytest.mark.slow
@pytest.mark.parametrize("kv_format", [KVFormat.FP8, KVFormat.FLOAT32])
@pytest.mark.parametrize("plan", PLANS)
@CONFIG
@given(data=st.data())
def test_generation_goes_on_after_taking_out_and_putting_back_anywhere(
    checkpoint: Checkpoint, prompt: Prompt, plan: str, kv_format: KVFormat, data: st.DataObject
) -> None:
    model = load_model(checkpoint(plan), kv_format=kv_format)
    size = model.config.geometry.block_size
    length = data.draw(st.integers(2, 3 * size if size < 100 else 140))
    at = data.draw(st.integers(1, length - 1))
    tokens = prompt(length)
    pool, sequence = start(model, -(-length // size))
    forward(model, pool, [(sequence, tokens[:at])])
    other_pool, other = moved(model, pool, sequence)
    want = forward(model, pool, [(sequence, tokens[at:])], logits="all")
    got = forward(model, other_pool, [(other, tokens[at:])], logits="all")
    assert torch.equal(got, want)
    assert other.window.to_bytes() == sequence.window.to_bytes()
    for mine, theirs in zip(sequence.block_table, other.block_table, strict=True):
        assert bytes(pool.payloads([mine])[0]) == bytes(other_pool.payloads([theirs])[0])


@pytest.mark.slow
@pytest.mark.parametrize("kv_format", list(KVFormat))
@pytest.mark.parametrize("plan", PLANS)
def test_bytes_at_a_boundary_are_exactly_a_checkpoint(
    checkpoint: Checkpoint, prompt: Prompt, plan: str, kv_format: KVFormat
) -> None:
    dtype = torch.float64 if kv_format is KVFormat.FLOAT64 else torch.float32
    model = load_model(checkpoint(plan), kv_format=kv_format, dtype=dtype)
    size = model.config.geometry.block_size
    pool, sequence = start(model, 3)
    # Around group and block boundaries, and a few positions in between.
    stops = sorted({1, 2, 3, 4, 5, 6, 7, 17, size - 1, size, size + 1, size + 5, 2 * size - 1, 2 * size, 2 * size + 1})
    for position in stops:
        forward(model, pool, [(sequence, prompt(3 * size)[sequence.position : position])])
        data = sequence.window.to_bytes()
        assert len(data) == state_bytes(model.layout, position)
        assert WindowState.from_bytes(model.layout, position, data).to_bytes() == data
        if position % size == 0:
            assert len(data) == model.layout.checkpoint_bytes


def test_a_clone_goes_its_own_way(checkpoint: Checkpoint, prompt: Prompt) -> None:
    model = load_model(checkpoint("pro"))
    size = model.config.geometry.block_size
    pool, sequence = start(model, 4)
    forward(model, pool, [(sequence, prompt(2 * size))])
    fork = Sequence([*sequence.block_table[:2], sequence.block_table[3]], sequence.window.clone())
    before = sequence.window.to_bytes()
    first = forward(model, pool, [(fork, prompt(7, 1))], logits="all")
    assert sequence.window.to_bytes() == before
    assert sequence.position == 2 * size
    forward(model, pool, [(sequence, prompt(9, 2))])
    alone_pool, alone = start(model, 3)
    forward(model, alone_pool, [(alone, prompt(2 * size))])
    assert torch.equal(forward(model, alone_pool, [(alone, prompt(7, 1))], logits="all"), first)


def test_a_fresh_state_round_trips_before_any_group_closed(checkpoint: Checkpoint) -> None:
    layout = load_model(checkpoint("flash")).layout
    data = WindowState.zeros(layout, 0).to_bytes()
    assert WindowState.from_bytes(layout, 0, data).to_bytes() == data
    assert len(data) == layout.checkpoint_bytes


@pytest.mark.parametrize("change", [-1, 1])
def test_bytes_of_another_size_are_refused(checkpoint: Checkpoint, change: int) -> None:
    layout = load_model(checkpoint("flash")).layout
    with pytest.raises(BlockCorrupt, match=r"has .* bytes, not"):
        WindowState.from_bytes(layout, 7, bytes(state_bytes(layout, 7) + change))


def test_a_negative_position_is_refused(checkpoint: Checkpoint) -> None:
    with pytest.raises(InternalError, match="negative"):
        WindowState.zeros(load_model(checkpoint("flash")).layout, -1)
