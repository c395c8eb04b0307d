"""How long does the model alone take for the tokens after a hit, without services, stores and requests?

Loads the model as a worker does, computes a prefix, and measures the forward pass of a few more tokens behind it. A
forward pass of few tokens takes longer per token than a cold run's chunks, so a floor that counts the tokens at the
cold rate is lower than what any server of this model could reach. Used by benchmarks/ttft.py and where_time_goes.py.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path

import numpy as np
import torch

from antefix.host_limits import usable_cores
from antefix.layout import KVFormat
from antefix.model import Sequence, forward, load_model
from antefix.model.backend import make_backend
from antefix.model.compiled.check import enable
from benchmarks.step import follow

NUM_REPEATS = 9


def seconds_alone(path: Path, lengths: list[int], num_tokens: int) -> dict[int, float]:
    """Median seconds of a forward pass of `num_tokens` tokens, by the number of tokens before them."""
    torch.set_num_threads(usable_cores())
    model = load_model(path, kv_format=KVFormat.FP8)
    model.threads_are_free = True
    enable(model)
    size = model.config.geometry.block_size
    random = np.random.default_rng(1)
    found = {}
    for length in lengths:
        pool, ops = make_backend("auto", model.layout, -(-(length + num_tokens) // size) + 1, model.device)
        (prefix,) = follow(model, pool, ops, length, 1, num_tokens)
        took = []
        for _ in range(NUM_REPEATS + 1):
            sequence = Sequence(list(prefix.block_table), prefix.window.clone())
            tokens = random.integers(0, model.config.vocab_size, num_tokens).astype(np.uint32)
            started = time.perf_counter()
            forward(model, pool, [(sequence, tokens)], ops=ops).float().numpy()
            took.append(time.perf_counter() - started)
        # The first pass is left out, because the processor's caches are cold.
        found[length] = statistics.median(took[1:])
    return found
