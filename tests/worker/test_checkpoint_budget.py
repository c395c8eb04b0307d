"""The strategy's budget: what the store counts, and what this worker left since it was asked."""

import asyncio

import numpy as np

from antefix.errors import Unavailable
from antefix.store.api import RecordKind
from antefix.worker import budget as budget_module
from antefix.worker.budget import CheckpointBudget, counter_of
from antefix.worker.prompt import run_prompt

LONG = np.random.default_rng(51).integers(0, 256, 8 * 1024)


async def settled():
    for _ in range(5):
        await asyncio.sleep(0)


async def test_the_stores_count_replaces_our_own():
    counts = iter([1000, 5000])

    async def count():
        return next(counts)

    budget = CheckpointBudget(count)
    budget.refresh_soon()
    await settled()
    assert budget.state.used_bytes == 1000
    budget.add(300)
    budget.refresh_soon()  # too soon to ask again
    await settled()
    assert budget.state.used_bytes == 1300


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


def test_a_store_without_numbers_is_not_asked(store):
    assert counter_of(store) is None


async def test_a_full_budget_ends_sparse_checkpoints_and_keeps_ends(make_engine, make_prompt, store):
    """8,192 tokens of new ground: `auto` leaves sparse checkpoints there, unless the budget is used up."""
    left = {}
    for used_bytes in (0, 1 << 40):
        store.records.clear()
        store.puts.clear()
        engine = make_engine(f"auto(budget={1 << 40})", num_blocks=140, prefill_chunk=1024)
        engine.budget.add(used_bytes)
        computed = await run_prompt(engine, make_prompt(engine, LONG))
        engine.blocks.release(computed.sequence.block_table)
        left[used_bytes] = [position for kind, position in store.puts if kind is RecordKind.CHECKPOINT]
    assert len(left[0]) > 1
    assert left[1 << 40] == left[0][-1:]
    assert left[0][-1] > 8000
