"""Continuous batching: what others do never changes an output, and nobody waits for a slow reader."""

import asyncio

import numpy as np
import pytest

from antefix.errors import AntefixError, Overloaded
from antefix.record import RecordKind
from antefix.wire import Sampling
from antefix_decode.logprobs import Logprobs
from antefix_decode.sampling import Sampler
from antefix_decode.scheduler import Running, Scheduler
from antefix_decode.stopping import Stopper
from antefix_prefill.record_writer import RecordWriter
from antefix_prefill.run_prompt import run_prompt

RNG = np.random.default_rng(3)
PROMPTS = [RNG.integers(0, 256, size) for size in (90, 130, 200)]
NUM_UNREAD = 20


async def start(engine, prompt, max_tokens, num_top_logprobs=None):
    sampling = Sampling(max_tokens=max_tokens, ignore_eos=True)
    computed = await run_prompt(engine, prompt)
    sampler, stopper = Sampler(sampling), Stopper(sampling, frozenset())
    first = sampler.choose(computed.logits, prompt.num_tokens)
    shown = stopper.push(first)
    running = Running(
        prompt=prompt,
        sequence=computed.sequence,
        sampler=sampler,
        stopper=stopper,
        writer=RecordWriter(engine.store, engine.counters),
        next_token=first,
        prompt_tokens=prompt.num_tokens,
        logprobs=Logprobs(num_top_logprobs),
    )
    return running, shown


async def finish(scheduler, running, shown):
    try:
        async for piece in scheduler.tokens(running):
            shown += piece.tokens
        await scheduler.store_end(running)
    finally:
        await scheduler.leave(running)
    return shown


async def generate(engine, scheduler, prompt, max_tokens):
    running, shown = await start(engine, prompt, max_tokens)
    scheduler.join(running)
    return await finish(scheduler, running, shown)


@pytest.mark.slow
async def test_a_batch_gives_what_each_gives_alone(make_engine, make_prompt):
    engine = make_engine()
    scheduler = Scheduler(engine, 8)
    alone = [await generate(engine, scheduler, make_prompt(engine, p), 10) for p in PROMPTS]
    together = await asyncio.gather(*(generate(engine, scheduler, make_prompt(engine, p), 10) for p in PROMPTS))
    assert together == alone
    assert scheduler.num_running == 0
    assert engine.blocks.num_available == engine.pool.num_blocks
    await scheduler.close()


@pytest.mark.slow
async def test_the_next_turn_hits_the_models_own_answer(make_engine, make_prompt, store):
    engine = make_engine("boundary")
    scheduler = Scheduler(engine, 8)
    output = await generate(engine, scheduler, make_prompt(engine, PROMPTS[2]), 100)
    turn = np.concatenate((PROMPTS[2], output, PROMPTS[0][:20]))
    other = make_engine("boundary")
    hit = await run_prompt(other, make_prompt(other, turn))
    # 200 prompt + 99 output tokens were run (the last one was only chosen): four full blocks of 64.
    assert (hit.report.plan, hit.report.hit_tokens) == ("checkpoint", 256)
    store.records.clear()
    fresh = make_engine("boundary")
    cold = await run_prompt(fresh, make_prompt(fresh, turn))
    assert np.array_equal(hit.logits, cold.logits)
    await scheduler.close()


@pytest.mark.slow
async def test_log_probabilities_of_a_hit_are_those_of_a_cold_run(make_engine, make_prompt, store):
    async def logprobs_of(engine, tokens):
        scheduler = Scheduler(engine, 8)
        running, _ = await start(engine, make_prompt(engine, tokens), 30, num_top_logprobs=5)
        scheduler.join(running)
        found = []
        async for piece in scheduler.tokens(running):
            assert len(piece.logprobs) == len(piece.tokens)
            found += zip(piece.tokens, piece.logprobs, strict=True)
        await scheduler.leave(running)
        await scheduler.close()
        return found

    first, other = make_engine("zero"), make_engine("zero")
    cold = await logprobs_of(first, PROMPTS[2])
    assert (await run_prompt(other, make_prompt(other, PROMPTS[2]))).report.hit_tokens == 192
    assert await logprobs_of(other, PROMPTS[2]) == cold
    assert len(cold) == 29 and all(logprob.top[0] == (token, logprob.logprob) for token, logprob in cold)


async def test_a_reader_that_stops_reading_stops_only_itself(make_engine, make_prompt, monkeypatch):
    # As the real bound, in fewer steps.
    monkeypatch.setattr("antefix_decode.scheduler.NUM_UNREAD_MAX", NUM_UNREAD)
    engine = make_engine()
    scheduler = Scheduler(engine, 8)
    slow, shown = await start(engine, make_prompt(engine, PROMPTS[0]), NUM_UNREAD + 10)
    scheduler.join(slow)
    quick = await generate(engine, scheduler, make_prompt(engine, PROMPTS[1]), NUM_UNREAD + 20)
    assert len(quick) == NUM_UNREAD + 20
    while slow.can_run:  # noqa: ASYNC110 - the loop of the scheduler is what is waited for
        await asyncio.sleep(0.01)
    assert slow.unread.qsize() == NUM_UNREAD and not slow.done
    assert len(await finish(scheduler, slow, shown)) == NUM_UNREAD + 10
    await scheduler.close()


async def test_a_sequence_that_leaves_early_gives_its_blocks_back(make_engine, make_prompt):
    engine = make_engine()
    scheduler = Scheduler(engine, 8)
    running, _ = await start(engine, make_prompt(engine, PROMPTS[1]), 200)
    scheduler.join(running)
    await anext(aiter(scheduler.tokens(running)))
    await scheduler.leave(running)
    assert engine.blocks.num_available == engine.pool.num_blocks
    await scheduler.close()


@pytest.mark.slow
async def test_a_full_pool_fails_the_one_that_needs_more(make_engine, make_prompt):
    engine = make_engine(num_blocks=3)
    scheduler = Scheduler(engine, 8)
    running, shown = await start(engine, make_prompt(engine, PROMPTS[1]), 200)
    scheduler.join(running)
    with pytest.raises(Overloaded):
        await finish(scheduler, running, shown)
    await scheduler.close()


@pytest.mark.slow
async def test_outputs_leave_their_blocks_and_one_checkpoint(make_engine, make_prompt, store):
    engine = make_engine("boundary")
    scheduler = Scheduler(engine, 8)
    store.puts.clear()
    await generate(engine, scheduler, make_prompt(engine, PROMPTS[0]), 140)
    blocks = [position for kind, position in store.puts if kind is RecordKind.BLOCK]
    marks = [position for kind, position in store.puts if kind is RecordKind.CHECKPOINT]
    assert blocks == [64, 128, 192]
    assert marks == [64, 192]
    await scheduler.close()


async def test_no_more_are_let_in_than_may_run(make_engine):
    scheduler = Scheduler(make_engine(), 2)
    with scheduler.place():
        with scheduler.place(), pytest.raises(Overloaded), scheduler.place():
            pass
        with scheduler.place():
            pass


async def test_one_sequence_that_fails_does_not_stop_the_others(make_engine, make_prompt):
    class Broken:
        def choose(self, logits, position):
            raise FloatingPointError("no token can be chosen")

    engine = make_engine()
    scheduler = Scheduler(engine, 8)
    bad, shown = await start(engine, make_prompt(engine, PROMPTS[0]), 50)
    bad.sampler = Broken()
    scheduler.join(bad)
    good = asyncio.create_task(generate(engine, scheduler, make_prompt(engine, PROMPTS[1]), 40))
    with pytest.raises(AntefixError, match="failed after its decode step"):
        await asyncio.wait_for(finish(scheduler, bad, shown), 150)
    assert len(await asyncio.wait_for(good, 150)) == 40
    assert engine.blocks.num_available == engine.pool.num_blocks
    await scheduler.close()
