"""Decode steps of many sequences at once give the exact bits of each sequence alone, in all their results."""

from __future__ import annotations

from collections.abc import Sequence as Many
from typing import Any

import numpy as np
import pytest
import torch

from antefix.errors import InternalError
from antefix.layout import KVFormat
from antefix.model import BlockPool, Model, ModelConfig, Sequence, WindowState, forward, steps
from antefix.model.ops import TorchOps
from tests.model.random_models import AWKWARD, SMALL, C, H, W, make

LENGTHS = (1, 2, 7, 8, 9, 15, 40, 63, 65, 90)


class OneByOne(TorchOps):
    """Operations that run each sequence alone, in absolutely aligned tiles."""

    steps_together = False


def outcome(
    model: Model,
    ops: TorchOps,
    *,
    cut: int = 0,
    num_steps: int = 18,
    lengths: Many[int] = LENGTHS,
    longer: bool = False,
) -> list[bytes]:
    """Prefill sequences of many lengths alone, then run them together.

    Returns the results of all steps and sequences.
    """
    size = model.config.geometry.block_size
    random = np.random.default_rng(5)

    def draw(num_tokens: int) -> np.ndarray:
        return random.integers(0, model.config.vocab_size, num_tokens).astype("<u4")

    sequences, lengths = [], [*lengths, 70] if longer else list(lengths)
    # Blocks are shuffled, so that a sequence's blocks are not neighbours.
    needed = [-(-(length + cut * size + 2 * num_steps) // size) for length in lengths]
    pool = BlockPool(model.layout, sum(needed) + 1)
    ids = [int(block) for block in random.permutation(pool.allocate(pool.num_blocks))]
    # Free rows hold finite numbers that other sequences left.
    pool.rows.fill_(100)
    pool.note_filled(ids)
    for number, length in enumerate(lengths):
        table = [ids.pop() for _ in range(needed[number])]
        start = cut * size if number % 3 == 1 else 0
        window = WindowState.cut_at(model.layout, start) if start else WindowState.zeros(model.layout, 0)
        if start:
            before = Sequence(table, WindowState.zeros(model.layout, 0))
            forward(model, pool, [(before, draw(start))], ops=ops)
        sequences.append(Sequence(table, window))
        forward(model, pool, [(sequences[-1], draw(length))], ops=ops)
    left = []
    for step in range(num_steps):
        batch = [
            (
                sequence,
                draw(2 if longer and number % 4 == 2 else 1),
            )
            for number, sequence in enumerate(sequences)
        ]
        left.append(forward(model, pool, batch, logits="all" if step % 2 else "last", ops=ops).numpy().tobytes())
    return left + [sequence.window.to_bytes() for sequence in sequences] + [pool.rows.numpy().tobytes()]


def same(model: Model, **how: Any) -> None:
    one_by_one = outcome(model, OneByOne(), **how)
    assert outcome(model, TorchOps(), **how) == one_by_one


@pytest.mark.parametrize("name", ["plain", "odd everywhere"])
def test_two_steps_of_a_few_have_the_bits_of_each_alone(name: str) -> None:
    """A short form of the tests below, in a tenth of the time. One sequence fills a block."""
    same(make(name), num_steps=2, lengths=(1, 15, 40))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "kv_format"), [*((name, KVFormat.FP8) for name in AWKWARD), ("odd everywhere", KVFormat.FLOAT32)]
)
def test_sequences_together_have_the_bits_of_each_alone(name: str, kv_format: KVFormat) -> None:
    same(make(name, kv_format=kv_format))


@pytest.mark.slow
@pytest.mark.parametrize("changes", [
    {"compress_rates": {C: 1, H: 3}, "sliding_window": 1, "index_topk": 3},
    {"compress_rates": {C: 10, H: 3}, "sliding_window": 11, "head_dim": 24, "num_attention_heads": 3, "o_groups": 3},
    {"compress_rates": {C: 2, H: 2}, "sliding_window": 5, "layer_types": [C, H, C], "index_topk": 40},
    {"layer_types": [H, H, W], "compress_rates": {C: 4, H: 1}, "sliding_window": 24},
])  # fmt: skip
def test_any_ratios_and_windows(changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    plain = ModelConfig.from_dict
    monkeypatch.setattr("tests.model.random_models.ModelConfig.from_dict", lambda fields: plain(fields | changes))
    model = make("plain")
    assert model.config.geometry.window == changes.get("sliding_window", SMALL["sliding_window"])
    same(model)


@pytest.mark.slow
def test_after_a_bounded_replay_and_next_to_longer_pieces() -> None:
    same(make("plain"), cut=2, longer=True)


@pytest.mark.slow
def test_long_sequences_are_scored_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("plain")
    together = outcome(model, TorchOps())
    for limit in (1, 192):
        monkeypatch.setattr(steps, "KEYS_TOGETHER_MAX", limit)
        assert outcome(model, TorchOps()) == together


@pytest.mark.slow
def test_in_float64_too() -> None:
    model = make("three heads", kv_format=KVFormat.FLOAT64)
    same(model.double())


def test_a_step_that_fails_can_be_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("plain")
    pool = BlockPool(model.layout, 4)
    sequences = [Sequence(pool.allocate(2), WindowState.zeros(model.layout, 0)) for _ in range(2)]
    tokens = np.arange(13, dtype="<u4")
    forward(model, pool, [(sequence, tokens) for sequence in sequences])
    before = [sequence.window.to_bytes() for sequence in sequences]
    batch = [(sequence, tokens[:1]) for sequence in sequences]
    want = forward(model, pool, [(Sequence(s.block_table, s.window.clone()), tokens[:1]) for s in sequences])
    with monkeypatch.context() as broken:

        def fail(*_: object) -> None:
            raise InternalError("broken")

        broken.setattr(model.model.norm, "forward", fail)
        broken.setattr(steps.Steps, "keep", fail)
        with pytest.raises(InternalError):
            forward(model, pool, batch)
    assert [sequence.window.to_bytes() for sequence in sequences] == before
    assert torch.equal(forward(model, pool, batch), want)
