"""While a prompt waits for its turn, what it will read is loaded: exactly, within bounds, and accounted for as read."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from antefix_prefill import prefetch
from antefix_prefill.prefetch import Prefetcher
from antefix_prefill.run_prompt import run_prompt
from tests.prefill.test_run_prompt import DOCUMENT, OTHER_END, run, same

LONGER = np.concatenate((DOCUMENT, OTHER_END))
BLOCK = 64
NUM_STORED = len(DOCUMENT) // BLOCK


@pytest.fixture
async def waiting(make_engine, make_prompt):
    """A second worker, with nothing in memory; the first one has stored the document."""
    first = make_engine("boundary")
    await run(first, make_prompt(first, DOCUMENT))
    return make_engine("boundary")


async def wait_for_a_turn(engine, prompt, seconds=0.3, **options):
    prefetcher = Prefetcher(engine, **{"after_s": 0.0, **options})
    async with prefetcher.while_waiting(prompt):
        await asyncio.sleep(seconds)
    return prefetcher


async def test_the_stored_prefix_of_a_waiting_prompt_is_in_memory_at_its_turn(waiting, make_prompt, make_engine, store):
    prompt = make_prompt(waiting, LONGER)
    prefetcher = await wait_for_a_turn(waiting, prompt)
    assert waiting.blocks.num_leading(prompt.chain.hashes) == NUM_STORED
    assert prefetcher.counters.num_blocks_prefetched == NUM_STORED
    hit = await run(waiting, prompt)
    store.records.clear()
    fresh = make_engine("boundary")
    assert same(hit, await run(fresh, make_prompt(fresh, LONGER)))


async def test_what_was_prefetched_is_accounted_for_as_read_from_its_tier(waiting, make_prompt):
    prompt = make_prompt(waiting, LONGER)
    await wait_for_a_turn(waiting, prompt)
    computed = await run_prompt(waiting, prompt)
    report = computed.report
    assert (report.hit_memory_tokens, report.hit_store_tokens) == (0, NUM_STORED * BLOCK)
    assert report.hit_tiers == {"disk": NUM_STORED * BLOCK}
    assert report.bytes_read >= NUM_STORED * waiting.layout.block_bytes
    waiting.blocks.release(computed.sequence.block_table)


async def test_what_was_in_memory_before_stays_accounted_for_as_memory(waiting, make_prompt):
    short = make_prompt(waiting, DOCUMENT[:300])
    computed = await run_prompt(waiting, short)
    waiting.blocks.release(computed.sequence.block_table)
    prompt = make_prompt(waiting, LONGER)
    await wait_for_a_turn(waiting, prompt)
    report = (await run_prompt(waiting, prompt)).report
    assert (report.hit_memory_tokens, report.hit_store_tokens) == (4 * BLOCK, (NUM_STORED - 4) * BLOCK)


async def test_a_short_wait_loads_nothing(waiting, make_prompt):
    prompt = make_prompt(waiting, LONGER)
    prefetcher = await wait_for_a_turn(waiting, prompt, seconds=0.0, after_s=30.0)
    assert waiting.blocks.num_resident == 0
    assert prefetcher.counters.num_prefetched == 0


async def test_a_prompt_that_would_fill_the_pool_is_not_prefetched(waiting, make_prompt, monkeypatch):
    monkeypatch.setattr(prefetch, "_POOL_SHARE", 2 / waiting.pool.num_blocks)
    prefetcher = await wait_for_a_turn(waiting, make_prompt(waiting, LONGER))
    assert waiting.blocks.num_resident == 0
    assert prefetcher.counters.num_skipped == 1


async def test_a_broken_store_costs_the_prefetch_and_nothing_else(waiting, make_prompt, store):
    store.broken = {"get_blocks"}
    prompt = make_prompt(waiting, LONGER)
    await wait_for_a_turn(waiting, prompt)
    available = waiting.blocks.num_available
    assert available == waiting.pool.num_blocks
    store.broken = set()
    assert (await run_prompt(waiting, prompt)).report.hit_tokens == NUM_STORED * BLOCK


async def test_a_caller_that_leaves_gives_everything_back(waiting, make_prompt):
    prompt = make_prompt(waiting, LONGER)
    task = asyncio.create_task(wait_for_a_turn(waiting, prompt, seconds=30.0))
    await asyncio.sleep(0.1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert waiting.blocks.num_available == waiting.pool.num_blocks
