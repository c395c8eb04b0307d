"""Compares a prompt on a card (GPU) with the same prompt on the CPU. Sums run in another order, so bits may differ
within bounds."""

from __future__ import annotations

import copy

import numpy as np
import torch
from torch import Tensor

from antefix.clients import Tokens
from antefix.model import BlockPool, Model, Sequence, WindowState, forward
from antefix.model.ops import Ops, TorchOps
from antefix_console.verify.compare import Difference
from antefix_console.verify.paired_runs import WorkerPair


def against_cpu(workers: WorkerPair, tokens: Tokens) -> Difference:
    """The largest logit difference of each token, relative to the largest logit; the median over tokens."""
    model = workers.subject.model
    num_blocks = -(-len(tokens) // workers.subject.block_size)
    pool, ops = workers.backend(num_blocks)
    on_card = _logits(model, pool, ops, tokens, workers.prefill_chunk)
    alone = workers.subject.alone
    twin = (copy.deepcopy(model) if alone is None else alone().model).to("cpu")
    on_cpu = _logits(twin, BlockPool(model.layout, num_blocks), TorchOps(), tokens, workers.prefill_chunk)
    return typical_difference(on_cpu, on_card)


def typical_difference(cpu: Tensor, card: Tensor) -> Difference:
    """The same for logits [T, V]. NaN counts as the largest difference."""
    errors = torch.nan_to_num((card - cpu).abs().amax(1) / cpu.abs().max(), nan=float("inf"))
    if not errors.any():
        return Difference(identical=True)
    where = f"median over {len(errors)} tokens; worst token {errors.max():.2g}"
    # If the median is exactly zero but some tokens differ, the outcomes are not identical.
    return Difference(identical=False, error=max(float(errors.median()), 1e-12), where=where)


def _logits(model: Model, pool: BlockPool, ops: Ops, tokens: Tokens, chunk: int) -> Tensor:
    table = pool.allocate(pool.num_blocks)
    sequence = Sequence(table, WindowState.zeros(model.layout, 0, model.device))
    pieces = np.split(tokens, range(chunk, len(tokens), chunk))
    return torch.cat([forward(model, pool, [(sequence, piece)], logits="all", ops=ops).cpu() for piece in pieces])
