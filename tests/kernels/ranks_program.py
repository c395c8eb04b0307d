"""One rank of a small model over several ranks, with the kernels in Triton's interpreter. The program runs the same
calls in every way and prints a digest of each way's logits, states and pool.

    python -m tests.kernels.ranks_program RANK SIZE DIRECTORY

Each rank is a separate process, because the interpreter has one state per process.
"""

from __future__ import annotations

import datetime
import hashlib
import sys
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from antefix.layout import KVFormat
from antefix.model import (
    Model,
    ModelConfig,
    Sequence,
    WindowState,
    forward,
    init_weights,
    seated_chunks,
    step_runner,
    triton_ops,
)
from antefix.model.card_pool import CardPool
from antefix.model.ranks import Ranks, take_share
from antefix.model.step_runner import StepRunner
from antefix.model.triton_ops import TritonOps
from tests.kernels.quick_interpreter import quicken
from tests.kernels.recorded import captured
from tests.kernels.test_triton_ops import CONFIG

WIDER = {"num_attention_heads": 4, "o_groups": 4, "n_routed_experts": 4}
WAYS: dict[str, dict[str, bool]] = {
    "alone": {},
    "together": {"batched": True, "chunks": True},
    "graphs-over-ranks": {"batched": True, "chunks": True, "graphs": True, "over_ranks": True},
}
# The number of new tokens of each sequence, by call.
CALLS = ((4, 0), (0, 3), (1, 1), (3, 1))


def build(ranks: Ranks) -> Model:
    """Draw the same weights on every rank, then keep the rank's share."""
    model = init_weights(Model(ModelConfig.from_dict(CONFIG | WIDER), kv_format=KVFormat.FP8), seed=3)
    for name, weight in model.named_parameters():
        if "norm" not in name:
            weight.data.mul_(8)
    model.requires_grad_(False)
    take_share(model, ranks)
    return model


def run(model: Model, ops: TritonOps) -> str:
    random = np.random.default_rng(4)
    pool = CardPool(model.layout, 6, model.device)
    ids = pool.allocate(6)
    sequences = [Sequence(ids[at : at + 3], WindowState.zeros(model.layout, 0)) for at in (0, 3)]
    found = hashlib.blake2b(digest_size=8)
    for counts in CALLS:
        tokens = [random.integers(0, 64, count).astype("<u4") for count in counts]
        batch = [(s, given) for s, given in zip(sequences, tokens, strict=True) if len(given)]
        found.update(forward(model, pool, batch, logits="all", ops=ops).numpy().tobytes())
    for sequence in sequences:
        found.update(sequence.window.to_bytes())
    found.update(pool.rows.numpy().tobytes())
    return found.hexdigest()


def main() -> None:
    rank, size, directory = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    torch.set_num_threads(1)
    quicken()
    store = dist.FileStore(f"{directory}/ranks", size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=datetime.timedelta(seconds=600))
    changed: Any = triton_ops
    changed.REPRODUCIBLE_QUERIES_MIN = 16
    for module in (seated_chunks, step_runner):
        changed = module
        changed.TOKENS_MAX = 16
        changed.SEQUENCES_MAX = 4
    changed = step_runner
    changed._BLOCKS_MIN = changed._ROWS_MIN = 4
    changed = StepRunner
    changed._captured = captured
    if size > 1:
        changed._may_record = lambda runner, model: runner._wants_graphs and runner._over_ranks
    model = build(Ranks.of_group())
    for way, settings in WAYS.items():
        ops = TritonOps(model.layout, reproducible=True, **settings)
        digest = run(model, ops)
        counters = None if ops.step_runner is None else ops.step_runner.counters
        print(way, digest, 0 if counters is None else counters.steps_replayed, flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
