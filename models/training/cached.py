"""A model behind its real cache: prefill in chunks, stop anywhere, continue from there as often as wanted.

The model uses the serving path (block pool, window state, rounding as stored), so what is measured with it holds for
serving.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from antefix.layout import KVFormat
from antefix.model import BlockPool, Sequence, WindowState, forward, load_model
from models.training.corpus import Tokens

CHUNK = 512


class CachedModel:
    """One model, one pool of `num_tokens_max` tokens, any number of continuations of a prefix."""

    def __init__(self, directory: Path, *, num_tokens_max: int, kv_format: KVFormat = KVFormat.FP8) -> None:
        self.model = load_model(directory, kv_format=kv_format)
        self.layout = self.model.layout
        self.block_size = self.layout.geometry.block_size
        self.pool = BlockPool(self.layout, -(-num_tokens_max // self.block_size))
        self._num_forks: Counter[int] = Counter()

    def start(self) -> Sequence:
        return Sequence([], WindowState.zeros(self.layout, 0))

    def extend(self, sequence: Sequence, tokens: Tokens, *, write_global_kv: bool = True) -> Tensor:
        """Run tokens in chunks; logits of each [T, vocab]."""
        parts = []
        for begin in range(0, len(tokens), CHUNK):
            piece = tokens[begin : begin + CHUNK].astype(np.uint32)
            blocks = -(-(sequence.position + len(piece)) // self.block_size) - len(sequence.block_table)
            last = sequence.block_table[-1] if sequence.block_table else None
            sequence.block_table += self.pool.allocate(max(blocks, 0), after=last)
            batch = [(sequence, piece)]
            parts.append(forward(self.model, self.pool, batch, logits="all", write_global_kv=write_global_kv))
        return torch.cat(parts)

    def fork(self, sequence: Sequence, window: WindowState | None = None) -> Sequence:
        """A continuation of a sequence at a block boundary, with its own window state or a given one."""
        full = sequence.position // self.block_size
        assert sequence.position == full * self.block_size, "forks share whole blocks only"
        shared = sequence.block_table[:full]
        self._num_forks.update(shared)
        return Sequence(list(shared), window or sequence.window.clone())

    def release(self, sequence: Sequence) -> None:
        # A block goes with the last of those who share it.
        self.pool.release([block for block in sequence.block_table if not self._num_forks[block]])
        self._num_forks.subtract(block for block in sequence.block_table if self._num_forks[block])
        sequence.block_table = []

    def replayed_window(self, sequence: Sequence, tokens: Tokens, num_tokens: int) -> WindowState:
        """Window state at the sequence's end, rebuilt from its last `num_tokens` tokens and its stored global KV.

        The window before the start of the replay counts as empty. From `layout.geometry.replay_tokens` tokens on, the
        rebuilt state is exact.
        """
        begin = max(sequence.position - num_tokens, 0)
        replay = Sequence(list(sequence.block_table), WindowState.zeros(self.layout, begin))
        if num_tokens:
            self.extend(replay, tokens[begin : sequence.position], write_global_kv=False)
        return replay.window


def bits(logits: Tensor, targets: Tokens) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Bits [T] of each target under logits [T, vocab]."""
    losses = F.cross_entropy(logits.float(), torch.from_numpy(targets.astype(np.int64)), reduction="none")
    return np.asarray(losses.double().numpy() / np.log(2.0))
