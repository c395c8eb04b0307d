"""Tests reproducible mode on a simulated machine whose results depend on the shapes of calls.

The processors that we know do not need reproducible mode, so without the simulation the mode would never be tested
where it matters.
"""

from __future__ import annotations

from torch import Tensor

from antefix.clients import Tokens
from antefix.layout import BlockLayout
from antefix.model.ops import TorchOps
from antefix.store.api import Store
from antefix.window import PlanKind, Sizes
from antefix_console.verify.compare import compare
from antefix_console.verify.paired_runs import FixedPlanner, WorkerPair, run
from antefix_console.verify.stores import MemoryStore, PrefixView
from antefix_console.verify.verdict import Cases
from antefix_prefill.worker.engine import Engine


async def check_aligned(workers: WorkerPair, history: Tokens, turn: Tokens, cases: Cases) -> None:
    """Check that a hit resumes where a cold run starts a chunk, and makes the same calls as a cold run."""
    size = workers.subject.block_size
    chunk = 2 * size

    def worker(store: Store, kind: PlanKind) -> Engine:
        return _shaped_worker(workers, store, len(turn), chunk, kind)

    cold = (await run(worker(MemoryStore(), PlanKind.COLD), turn)).outcome
    store = MemoryStore()
    # First run the shorter prompt. Its last chunk is not a chunk of the longer prompt.
    for tokens in (history, turn):
        await run(worker(store, PlanKind.REPLAY), tokens)
    last = len(turn) // chunk * 2
    for kind in (PlanKind.CHECKPOINT, PlanKind.REPLAY):
        for num_blocks in (last - 1, last):
            restored = await run(worker(PrefixView(store, num_blocks), kind), turn)
            found = compare(cold, restored.outcome)
            problem = "" if found.identical else f"not the calls of a cold run: {found.where}"
            if restored.hit_tokens % chunk or not restored.hit_tokens:
                problem = f"a hit resumed at {restored.hit_tokens} tokens, chunks have {chunk}"
            cases.add("reproducible", restored.plan, len(turn), found, hit_tokens=restored.hit_tokens, problem=problem)


def _shaped_worker(workers: WorkerPair, store: Store, num_tokens: int, chunk: int, kind: PlanKind) -> Engine:
    engine = workers.new(store, num_tokens, strategy="full", kind=kind)
    engine.ops = _ShapedOps()
    engine.prefill_chunk = engine.align_tokens = chunk
    engine.planner = FixedPlanner(Sizes.of(engine.layout), kind, align_tokens=chunk)
    return engine


class _ShapedOps(TorchOps):
    """Window entries depend on the number of rows in the call, by far more than rounding."""

    def window_pack(self, entries_TC: Tensor, layout: BlockLayout) -> Tensor:
        return super().window_pack(entries_TC * (1 + len(entries_TC) / 256), layout)
