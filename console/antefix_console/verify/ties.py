"""Checks the indexer's rule for entries with equal scores, which must be the same on every device."""

from __future__ import annotations

import torch

from antefix.clients import Tokens
from antefix.layout import PartKind
from antefix.model import Sequence, WindowState, forward
from antefix.model.ops import Entries
from antefix_console.verify.paired_runs import WorkerPair
from antefix_console.verify.verdict import Cases


def check_ties(workers: WorkerPair, tokens: Tokens, cases: Cases) -> None:
    """Check that among entries of equal score the lowest indices are selected, whatever else is scored. If all queries
    are zeros, all entries have equal scores.
    """
    model, layout = workers.subject.model, workers.subject.model.layout
    part = next((part for part in layout.parts if part.kind is PartKind.INDEXER_KEYS), None)
    if part is None:
        return
    num_blocks = -(-len(tokens) // layout.geometry.block_size)
    pool, ops = workers.backend(num_blocks)
    sequence = Sequence(pool.allocate(num_blocks), WindowState.zeros(layout, 0, model.device))
    forward(model, pool, [(sequence, tokens)], ops=ops)
    topk, heads = model.config.index_topk, model.config.index_num_heads
    num_entries = len(tokens) // layout.geometry.csa_ratio
    visible = torch.arange(num_entries + 1, device=model.device)
    queries = torch.zeros(num_entries + 1, heads, layout.geometry.indexer_dim, device=model.device)
    weights = torch.ones(num_entries + 1, heads, device=model.device)
    block_ids = torch.tensor(sequence.block_table, device=model.device)
    with torch.inference_mode():
        picked = ops.indexer_topk(queries, weights, Entries(pool=pool, part=part, block_ids=block_ids), visible, topk)
    lowest = torch.arange(topk, device=model.device)
    wanted = torch.where(lowest < visible.unsqueeze(1), lowest, -1)
    problem = "" if torch.equal(picked.long(), wanted) else f"indexer, layer {part.layer}: ties go to a higher index"
    cases.add("ties", "lowest index", len(tokens), problem=problem)
