"""Runs one sequence whole, cut at any position, and in batches with others: its bits must be the same each time.

Hits at block boundaries cut a prompt at few positions only, and a sequence that runs alone always has the first rows of
its batch. Here a prompt is cut at any row, and other sequences, at other positions, come before and after it.
"""

from __future__ import annotations

from collections.abc import Sequence as Many

import numpy as np
import torch

from antefix.clients import Tokens
from antefix.model import BlockPool, Sequence, WindowState, forward
from antefix.model.ops import Ops
from antefix_console.verify.compare import RunOutcome, compare
from antefix_console.verify.paired_runs import WorkerPair
from antefix_console.verify.verdict import Cases

# With up to so many other sequences in a batch, a sequence's place covers more than a whole tile of rows.
_OTHERS_MAX = 19


def check_cuts(
    workers: WorkerPair,
    tokens: Tokens,
    random: np.random.Generator,
    cases: Cases,
    *,
    num_cuts: int,
    num_batches: int,
    bound: float,
) -> None:
    """num_cuts, num_batches: how many ways of cutting, and how many batches, are tried."""
    whole = run_pieces(workers, tokens, ())
    for number in range(num_cuts):
        # The last way ends with single tokens, as decode does.
        tail = range(max(len(tokens) - 5, 1), len(tokens)) if number == num_cuts - 1 else ()
        cuts = sorted({*random.integers(1, len(tokens), int(random.integers(1, 5))).tolist(), *tail})
        found = compare(whole, run_pieces(workers, tokens, cuts))
        problem = "" if found.identical or bound else f"cut at {_few(cuts)}: {found.where}"
        cases.add("cuts", "cut anywhere", len(tokens), found, bound=bound, problem=problem)
    for _ in range(num_batches):
        cuts = sorted({*random.integers(1, len(tokens), 2).tolist(), *range(max(len(tokens) - 4, 1), len(tokens))})
        others = int(random.integers(1, _OTHERS_MAX + 1))
        place = int(random.integers(0, others + 1))
        found = compare(whole, run_pieces(workers, tokens, cuts, others=others, place=place, random=random))
        problem = "" if found.identical or bound else f"sequence {place} of {others + 1} in a batch: {found.where}"
        cases.add("cuts", "in a batch", len(tokens), found, bound=bound, problem=problem)


def run_pieces(
    workers: WorkerPair,
    tokens: Tokens,
    cuts: Many[int],
    *,
    others: int = 0,
    place: int = 0,
    random: np.random.Generator | None = None,
) -> RunOutcome:
    """What a sequence leaves if its tokens are run in pieces that end at `cuts`.

    others: sequences in the same batch, with one to four tokens in each call; this sequence is number `place` among
    them.
    """
    model, layout = workers.subject.model, workers.subject.model.layout
    size = layout.geometry.block_size
    num_blocks = -(-len(tokens) // size)
    ends = [*cuts, len(tokens)]
    per_other = -(-4 * len(ends) // size)
    pool, ops = workers.backend(num_blocks + others * per_other)
    ours = Sequence(pool.allocate(num_blocks), WindowState.zeros(layout, 0, model.device))
    rest = [Sequence(pool.allocate(per_other), WindowState.zeros(layout, 0, model.device)) for _ in range(others)]
    logits = torch.empty(0)
    for stop in ends:
        batch = [(other, _any_tokens(workers, random)) for other in rest]
        batch.insert(place, (ours, tokens[ours.position : stop]))
        logits = _forward(workers, pool, batch, ops)[place]
    return RunOutcome(logits=logits.numpy().copy(), rows=_rows(pool, ours), window=ours.window.clone())


def _forward(workers: WorkerPair, pool: BlockPool, batch: list[tuple[Sequence, Tokens]], ops: Ops) -> torch.Tensor:
    return forward(workers.subject.model, pool, batch, ops=ops).float().cpu()


def _any_tokens(workers: WorkerPair, random: np.random.Generator | None) -> Tokens:
    assert random is not None, "other sequences need tokens"
    return random.integers(0, workers.subject.identity.vocab_size, int(random.integers(1, 5))).astype(np.uint32)


def _rows(pool: BlockPool, sequence: Sequence) -> torch.Tensor:
    return pool.rows[sequence.block_table].clone()


def _few(numbers: Many[int]) -> str:
    text = ", ".join(map(str, numbers[:6]))
    return f"{text} and {len(numbers) - 6} more" if len(numbers) > 6 else text
