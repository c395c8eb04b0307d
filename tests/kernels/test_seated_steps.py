"""Decode steps of many sequences on a card, by seat, against the same steps of each sequence alone."""

from __future__ import annotations

from collections.abc import Sequence as Many

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from antefix.model import Model, Sequence, WindowState, forward, triton_ops
from antefix.model.card_pool import CardPool
from antefix.model.triton_ops import TritonOps
from tests.kernels.test_triton_ops import build

LENGTHS = (1, 5, 8)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    # In the interpreter 256 queries would take their time.
    monkeypatch.setattr(triton_ops, "REPRODUCIBLE_QUERIES_MIN", 16)


def outcome(
    model: Model, ops: TritonOps, *, num_steps: int, lengths: Many[int] = LENGTHS, longer: bool = False
) -> tuple[torch.Tensor, list[bytes], torch.Tensor]:
    """Sequences of several lengths, prefilled alone, then run together: logits, states, and the pool's rows."""
    random = np.random.default_rng(2)
    size = model.config.geometry.block_size
    needed = [-(-(length + 2 * num_steps) // size) for length in lengths]
    pool = CardPool(model.layout, sum(needed), model.device)
    ids = [int(block) for block in random.permutation(pool.allocate(pool.num_blocks))]
    sequences = []
    for length, blocks in zip(lengths, needed, strict=True):
        table = [ids.pop() for _ in range(blocks)]
        sequences.append(Sequence(table, WindowState.zeros(model.layout, 0, model.device)))
        forward(model, pool, [(sequences[-1], random.integers(0, 64, length).astype("<u4"))], ops=ops)
    logits = []
    for step in range(num_steps):
        counts = [2 if longer and step == 1 and i == 1 else 1 for i in range(len(lengths))]
        batch = [(s, random.integers(0, 64, n).astype("<u4")) for s, n in zip(sequences, counts, strict=True)]
        logits.append(forward(model, pool, batch, logits="all", ops=ops).cpu())
    return torch.cat(logits), [sequence.window.to_bytes() for sequence in sequences], pool.rows.cpu()


@pytest.mark.slow
@pytest.mark.parametrize("longer", [False, True])
def test_reproducible_steps_have_the_bits_of_each_sequence_alone(device, longer):
    model = build(device)
    alone = outcome(model, TritonOps(model.layout, reproducible=True), num_steps=4, longer=longer)
    ops = TritonOps(model.layout, reproducible=True, batched=True)
    together = outcome(model, ops, num_steps=4, longer=longer)
    assert torch.equal(alone[0], together[0])
    assert alone[1] == together[1]
    assert torch.equal(alone[2], together[2])
