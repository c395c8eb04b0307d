"""What only copies, or only ends, does not wait for a step of other sequences."""

import asyncio
import contextlib
import dataclasses
import threading
from types import SimpleNamespace

import numpy as np
import pytest

from antefix.window import Mark, Reason, Tier
from antefix_decode.adopt import adopt, take_handoff
from antefix_decode.scheduler import Scheduler
from antefix_decode.store_output import store_token
from antefix_prefill.leave_checkpoints import leave_checkpoint
from antefix_prefill.leave_handoff import leave_handoff
from antefix_prefill.record_writer import RecordWriter
from antefix_prefill.run_prompt import run_prompt
from tests.decode.test_scheduler import start
from tests.waiting import until

# The work takes milliseconds.
ENDS_S = 30.0
TOKENS = np.random.default_rng(5).integers(0, 256, 192)


@contextlib.contextmanager
def busy(compute):
    """The compute thread runs something that does not end."""
    let_go = threading.Event()
    compute._executor.submit(let_go.wait)
    try:
        yield
    finally:
        let_go.set()


async def left_checkpoint(engine, computed, writer):
    size = engine.block_size
    mark = Mark(block=2, reason=Reason.CLIENT, tier=Tier.DISK, ttl_s=60.0, saved_tokens=size)
    await leave_checkpoint(engine, computed.prompt, computed.sequence.window, mark, writer)
    await writer.flush()


async def stored_block(engine, computed, writer):
    running = SimpleNamespace(
        prompt=computed.prompt,
        sequence=computed.sequence,
        writer=writer,
        prompt_tokens=computed.prompt.num_tokens - 1,
        boundary_window=None,
    )
    # The output's first token is the last one of these, so it completes the block.
    computed.prompt.chain = engine.chain("")
    computed.prompt.chain.extend(np.asarray(TOKENS[:-1], np.uint32))
    await store_token(engine, running, int(TOKENS[-1]))
    await writer.flush()


async def left_handoff(engine, computed, writer):
    assert await leave_handoff(engine, computed)


@pytest.mark.parametrize("copies", [left_checkpoint, stored_block, left_handoff])
async def test_a_copy_does_not_wait_for_running_work(make_engine, make_prompt, store, copies):
    engine = make_engine()
    computed = await run_prompt(engine, make_prompt(engine, TOKENS))
    store.records.clear()
    with busy(engine.compute):
        # Not `asyncio.timeout`: the work must not be cut short.
        copying = asyncio.create_task(copies(engine, computed, RecordWriter(engine.store, engine.counters)))
        done, _ = await asyncio.wait({copying}, timeout=ENDS_S)
    await copying
    assert done
    assert store.records


async def test_on_a_gpu_a_copy_waits_for_running_work(make_engine, monkeypatch):
    engine = make_engine()
    monkeypatch.setattr(type(engine), "device", SimpleNamespace(type="cuda"))
    with busy(engine.compute):
        copying = asyncio.create_task(engine.copied(lambda: 7))
        done, _ = await asyncio.wait({copying}, timeout=0.2)
        assert not done
    assert await copying == 7


async def test_a_sequence_that_ends_waits_only_for_a_step_that_it_takes_part_in(make_engine, make_prompt, monkeypatch):
    engine = make_engine()
    scheduler, steps, let_go = Scheduler(engine, 8), [], asyncio.Event()

    async def step(batch):
        steps.append(batch)
        await let_go.wait()
        for running in batch:
            running.done = True

    monkeypatch.setattr(scheduler, "_step", step)
    in_step, ended = [(await start(engine, make_prompt(engine, TOKENS[:size]), 5))[0] for size in (70, 90)]
    scheduler.join(in_step)
    await until(lambda: bool(steps), "a step")
    scheduler.join(ended)
    leaving, waiting = [asyncio.create_task(scheduler.leave(running)) for running in (ended, in_step)]
    done, _ = await asyncio.wait({leaving}, timeout=ENDS_S)
    still_waits = not waiting.done()
    let_go.set()
    await asyncio.gather(leaving, waiting)
    assert done and still_waits
    assert steps == [[in_step]]
    assert engine.blocks.num_available == engine.pool.num_blocks
    await scheduler.close()


async def test_a_handoff_waits_for_one_running_step_only(make_engine, make_prompt, store):
    """Its finished blocks are read, and its unfinished one is copied, while the step runs."""
    prefill, decode = make_engine(), make_engine()
    computed = await run_prompt(prefill, make_prompt(prefill, TOKENS[:150]))
    prompt = make_prompt(decode, TOKENS[:150])
    handoff = await take_handoff(decode, prompt, await leave_handoff(prefill, computed))
    with busy(decode.compute):
        adopting = asyncio.create_task(adopt(decode, prompt, handoff))
        await until(lambda: len(decode.compute._small) == 2, "both jobs of the handoff")
    adopted = await adopting
    assert adopted.sequence.window.to_bytes() == computed.sequence.window.to_bytes()
    rows = [
        [bytes(each) for each in engine.pool.payloads(table)]
        for engine, table in ((decode, adopted.sequence.block_table), (prefill, computed.sequence.block_table))
    ]
    assert rows[0] == rows[1]


@pytest.mark.parametrize("lost", ["block", "row", "window"])
async def test_a_handoff_that_cannot_be_used_gives_all_blocks_back(make_engine, make_prompt, store, lost):
    prefill, decode = make_engine(), make_engine()
    computed = await run_prompt(prefill, make_prompt(prefill, TOKENS[:150]))
    prompt = make_prompt(decode, TOKENS[:150])
    handoff = await take_handoff(decode, prompt, await leave_handoff(prefill, computed))
    if lost == "block":
        store.records.clear()
    else:
        handoff = dataclasses.replace(handoff, **{"partial_row" if lost == "row" else "window": b"short"})
    assert await adopt(decode, prompt, handoff) is None
    assert decode.blocks.num_available == decode.pool.num_blocks


async def test_a_handoffs_unfinished_block_evicts_none_of_its_other_blocks(make_engine, make_prompt, store):
    prefill, decode = make_engine(), make_engine()
    computed = await run_prompt(prefill, make_prompt(prefill, TOKENS[:150]))
    prompt = make_prompt(decode, TOKENS[:150])
    handoff = await take_handoff(decode, prompt, await leave_handoff(prefill, computed))
    # No block is free, and the prompt's own blocks would be evicted first.
    first, other = (
        await adopt(decode, prompt, handoff),
        await run_prompt(decode, make_prompt(decode, TOKENS[::-1][:70])),
    )
    for used in (first, other):
        decode.blocks.release(used.sequence.block_table)
    decode.blocks.allocate(decode.pool.num_free)
    adopted = await adopt(decode, prompt, handoff)
    assert adopted.report.hit_memory_tokens == 150 // decode.block_size * decode.block_size
