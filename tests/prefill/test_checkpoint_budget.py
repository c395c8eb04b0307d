"""The strategy's budget counts the store's checkpoints, and those that this worker left since it asked the store."""

import asyncio

import numpy as np

from antefix.errors import Unavailable
from antefix.record import RecordKind
from antefix.store.store_stats import KindTotals, StoreTotals
from antefix.window import Reason, StoredPrefix
from antefix_prefill.leave_checkpoints import marks_for_prompt
from antefix_prefill.restore import Restored
from antefix_prefill.worker import checkpoint_budget as budget_module
from antefix_prefill.worker.checkpoint_budget import CheckpointBudget

LONG = np.random.default_rng(51).integers(0, 256, 8 * 1024)


def totals(checkpoint_bytes, *, used_bytes=0, bytes_written=0):
    kinds = {RecordKind.CHECKPOINT: KindTotals(stored_bytes=checkpoint_bytes)}
    return StoreTotals(
        kinds=kinds, budget_bytes=1000, used_bytes=used_bytes, hits=0, misses=0, bytes_read=0,
        bytes_written=bytes_written, evictions=0, corrupt=0,
    )  # fmt: skip


async def settled():
    for _ in range(5):
        await asyncio.sleep(0)


async def test_the_stores_count_replaces_our_own():
    counts = iter([1000, 5000])

    async def count():
        return totals(next(counts))

    budget = CheckpointBudget(count)
    budget.refresh_soon()
    await settled()
    assert budget.state.used_bytes == 1000
    budget.add(300)
    budget.refresh_soon()  # too soon to ask again
    await settled()
    assert budget.state.used_bytes == 1300


async def test_a_full_stores_turnover_reaches_the_strategy(monkeypatch):
    monkeypatch.setattr(budget_module, "REFRESH_S", 0.0)
    answers = iter([totals(0, used_bytes=1000), totals(0, used_bytes=1000, bytes_written=10**9)])

    async def count():
        return next(answers)

    budget = CheckpointBudget(count)
    assert budget.state.turnover_s is None
    for _ in range(2):
        budget.refresh_soon()
        await settled()
    assert 0 < budget.state.turnover_s < 60


async def test_a_store_that_does_not_answer_leaves_the_old_number(monkeypatch):
    monkeypatch.setattr(budget_module, "REFRESH_S", 0.0)

    async def count():
        raise Unavailable("down")

    budget = CheckpointBudget(count)
    budget.add(70)
    for _ in range(2):
        budget.refresh_soon()
        await settled()
    assert budget.state.used_bytes == 70
    await budget.close()


def test_a_full_budget_ends_sparse_checkpoints(make_engine, make_prompt):
    """On 8,192 tokens of new ground `auto` leaves sparse checkpoints, unless the store's count is at the limit."""
    limit = 1 << 40
    marks = {}
    for used_bytes in (0, limit - 1, limit):
        engine = make_engine(f"auto(budget={limit})", num_blocks=1)
        engine.budget.add(used_bytes)
        decision = engine.planner.plan(StoredPrefix(num_tokens=len(LONG), num_blocks=0))
        nothing_stored = Restored(
            sequence=None, plan=decision.plan, plans=(), num_stored_blocks=0, checkpoints=(), report=None
        )
        marks[used_bytes] = [
            mark.reason for mark in marks_for_prompt(engine, make_prompt(engine, LONG), nothing_stored)
        ]
    assert Reason.SPARSE in marks[0] and Reason.PROMPT_END in marks[0]
    assert Reason.SPARSE not in marks[limit - 1]
    assert Reason.SPARSE not in marks[limit]
