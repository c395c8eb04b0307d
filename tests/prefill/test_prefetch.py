"""While a prompt waits for its turn, its stored prefix is loaded: exactly, within bounds, and counted as read."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from antefix_prefill import prefetch
from antefix_prefill.prefetch import Prefetcher
from antefix_prefill.run_prompt import run_prompt
from tests.prefill.test_run_prompt import DOCUMENT, OTHER_END, run, same
from tests.waiting import AT_MOST_S, until

pytestmark = pytest.mark.slow

LONGER = np.concatenate((DOCUMENT, OTHER_END))
BLOCK = 64
NUM_STORED = len(DOCUMENT) // BLOCK


@pytest.fixture
async def waiting(make_engine, make_prompt):
    """A second worker with empty memory. The first worker has stored the document."""
    first = make_engine("boundary")
    await run(first, make_prompt(first, DOCUMENT))
    return make_engine("boundary")


async def wait_for_a_turn(engine, prompt, seconds=0.0, *, after_s=0.0):
    """Wait until the load for the prompt has begun, which is then waited for.  seconds: wait for so long at least."""
    prefetcher = Prefetcher(engine, after_s=after_s)
    async with prefetcher.while_waiting(prompt):
        await asyncio.sleep(seconds)
        if not after_s:
            await until(lambda: prefetcher._is_loading or prompt.prefetched or prefetcher.counters.num_skipped)
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
    prefetcher = await wait_for_a_turn(waiting, prompt, after_s=AT_MOST_S)
    assert waiting.blocks.num_resident == 0
    assert prefetcher.counters.num_prefetched == 0


async def test_of_a_prompt_that_would_fill_the_pool_the_beginning_is_prefetched(waiting, make_prompt, monkeypatch):
    monkeypatch.setattr(prefetch, "_POOL_SHARE", 2 / waiting.pool.num_blocks)
    prompt = make_prompt(waiting, LONGER)
    prefetcher = await wait_for_a_turn(waiting, prompt)
    assert waiting.blocks.num_leading(prompt.chain.hashes) == 2
    assert (await run_prompt(waiting, prompt)).report.hit_tiers == {"disk": NUM_STORED * BLOCK}
    assert prefetcher.counters.num_prefetched == 1


async def test_a_waiting_prompt_needs_nothing_of_the_store_at_its_turn(waiting, make_prompt, make_engine, store):
    prompt = make_prompt(waiting, DOCUMENT)
    prefetcher = await wait_for_a_turn(waiting, prompt)
    (end,) = prompt.prefetched.checkpoints
    assert end == prompt.prefetched.stop and prefetcher.counters.num_checkpoints_prefetched == 1
    before = prompt.prefetched.report.bytes_read
    store.broken = {"get_blocks", "get"}
    computed = await run_prompt(waiting, prompt)
    report = computed.report
    assert (report.plan, report.hit_tokens, report.store_errors) == ("checkpoint", end * BLOCK, 0)
    assert report.bytes_read == before > end * waiting.layout.block_bytes
    assert prefetcher._checkpoint_bytes == 0
    waiting.blocks.release(computed.sequence.block_table)


async def test_checkpoints_of_waiting_prompts_are_bounded(waiting, make_prompt, monkeypatch):
    monkeypatch.setattr(prefetch, "_CHECKPOINT_BYTES_MAX", waiting.sizes.checkpoint_bytes - 1)
    prompt = make_prompt(waiting, DOCUMENT)
    await wait_for_a_turn(waiting, prompt)
    assert prompt.prefetched.checkpoints == {} and prompt.prefetched.stop


@pytest.mark.slow
async def test_prompts_that_wait_find_nine_tenths_of_their_stored_prefix_in_memory(
    waiting, make_prompt, make_engine, store, monkeypatch
):
    """Four prompts at once, with a store that takes 50 ms per read. Each takes a second, on a busy machine minutes."""
    monkeypatch.setattr(prefetch, "LONG_S", 0.0)
    first = make_engine("boundary")
    documents = [np.concatenate((np.roll(OTHER_END, number), DOCUMENT)) for number in range(4)]
    for each in documents:
        await run(first, make_prompt(first, each))
    reads = store.get_blocks

    async def slow(*args, **options):
        await asyncio.sleep(0.05)
        return await reads(*args, **options)

    monkeypatch.setattr(store, "get_blocks", slow)
    prefetcher = Prefetcher(waiting)

    async def wait(prompt):
        async with prefetcher.while_waiting(prompt):
            await until(lambda: prompt.prefetched is not None)

    await asyncio.gather(*(wait(make_prompt(waiting, each)) for each in documents))
    counters = prefetcher.counters
    assert counters.num_blocks_wanted >= 4 * NUM_STORED
    assert counters.num_blocks_found >= 0.9 * counters.num_blocks_wanted


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
    task = asyncio.create_task(wait_for_a_turn(waiting, prompt, seconds=AT_MOST_S))
    await asyncio.sleep(0.1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert waiting.blocks.num_available == waiting.pool.num_blocks
