"""With a million tokens of context, memory grows only with the blocks, and a hit is still exact."""

from __future__ import annotations

import resource
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from antefix.model import BlockPool, Sequence, WindowState, forward, load_model


@pytest.mark.long
def test_a_chunk_after_a_million_tokens_needs_little_memory_and_keeps_its_bits(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    source = checkpoint("flash")
    for file in source.iterdir():
        text = file.read_bytes()
        if file.name == "config.json":
            text = text.replace(b'"max_position_embeddings": 4096', b'"max_position_embeddings": 1048576')
        (tmp_path / file.name).write_bytes(text)
    model = load_model(tmp_path)
    size = model.config.geometry.block_size
    num_blocks = 1_000_000 // size
    # Real records are repeated. Their contents do not matter, but all of them must be read.
    pool = BlockPool(model.layout, num_blocks + 4)
    seed = Sequence(pool.allocate(64), WindowState.zeros(model.layout, 0))
    rng = np.random.default_rng(0)
    forward(model, pool, [(seed, rng.integers(0, 61, 64 * size).astype("<u4"))])
    for start in range(64, num_blocks + 4, 64):
        stop = min(start + 64, num_blocks + 4)
        pool.rows[start:stop] = pool.rows[: stop - start]
    pool.note_filled(range(num_blocks + 4))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tokens = rng.integers(0, 61, 40).astype("<u4")
    table = list(range(num_blocks + 4))
    outcomes = []
    for cuts in ([], [1, 2, 3, 30]):
        sequence = Sequence(table, WindowState.zeros(model.layout, num_blocks * size))
        logits = [forward(model, pool, [(sequence, piece)], logits="all") for piece in np.split(tokens, cuts)]
        outcomes.append((torch.cat(logits), sequence.window.to_bytes()))
    assert torch.equal(outcomes[0][0], outcomes[1][0])
    assert outcomes[0][1] == outcomes[1][1]
    grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown_kib < 512 * 1024
