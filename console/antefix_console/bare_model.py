"""Generation by the model alone: no store, no services, no restore. Every cached answer must equal this one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from antefix.block import as_tokens
from antefix.clients import Tokens
from antefix.layout import KVFormat
from antefix.model import BlockPool, Model, Sequence, WindowState, forward, load_model
from antefix.tokenizer import load_tokenizer


class Reference:
    """Greedy generation, computed from the first token each time."""

    def __init__(self, model_path: Path, kv_format: KVFormat, *, prefill_chunk: int = 512) -> None:
        # One thread gives the same bits as any number of threads, and never waits for another thread on a busy machine.
        torch.set_num_threads(1)
        self._model: Model = load_model(model_path, device="cpu", dtype=torch.float32, kv_format=kv_format)
        self._eos_ids = load_tokenizer(model_path).eos_ids
        self._prefill_chunk = prefill_chunk

    def generate(self, prompt: Tokens, max_tokens: int, *, progress: Callable[[int], None] | None = None) -> list[int]:
        """Output tokens, without the end token. progress: called with the number of prompt tokens computed so far."""
        block_size = self._model.layout.geometry.block_size
        num_blocks = -(-(len(prompt) + max_tokens) // block_size)
        pool = BlockPool(self._model.layout, num_blocks, "cpu")
        sequence = Sequence(block_table=pool.allocate(num_blocks), window=WindowState.zeros(self._model.layout, 0))
        tokens = as_tokens(prompt)
        for first in range(0, len(tokens), self._prefill_chunk):
            piece = tokens[first : first + self._prefill_chunk]
            logits = forward(self._model, pool, [(sequence, piece)], logits="last")
            if progress:
                progress(first + len(piece))
        output: list[int] = []
        while len(output) < max_tokens:
            token = int(np.argmax(logits[0].float().numpy()))
            if token in self._eos_ids:
                break
            output.append(token)
            logits = forward(self._model, pool, [(sequence, np.array([token], np.uint32))], logits="last")
        return output
