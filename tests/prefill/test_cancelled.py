"""A request that is cancelled frees all its blocks of the pool, whatever it was waiting for."""

import asyncio
import itertools

import numpy as np
import pytest

from antefix_decode.adopt import adopt, take_handoff
from antefix_prefill.leave_handoff import leave_handoff
from antefix_prefill.run_prompt import run_prompt

# The prompt has six blocks of 64 tokens and a rest. The first three blocks are stored.
TOKENS = np.random.default_rng(8).integers(0, 256, 6 * 64 + 20)
STORED = TOKENS[: 3 * 64 + 5]


class Cancelled:
    """Stands in for an engine's store and compute thread. The request is cancelled at call number `at`.

    request: gives the request's task; the call may run in a task of its own.
    """

    def __init__(self, inner, count, at, request):
        self._inner, self._count, self._at, self._request = inner, count, at, request

    def __getattr__(self, name):
        found = getattr(self._inner, name)
        if not asyncio.iscoroutinefunction(found):
            return found

        async def call(*args, **kwargs):
            if next(self._count) == self._at:
                self._request().cancel()
                await asyncio.sleep(0)
            return await found(*args, **kwargs)

        return call


async def ends_at(engine, work, at):
    """Run `work` and cancel it at its call number `at`. Returns whether it ended before that call."""
    count = itertools.count()
    plain = engine.store, engine.compute
    engine.store, engine.compute = (Cancelled(each, count, at, lambda: task) for each in plain)
    task = asyncio.create_task(work())
    try:
        await task
        return True
    except asyncio.CancelledError:
        return False
    finally:
        engine.store, engine.compute = plain


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["boundary", "zero"])
async def test_a_prompt_cancelled_at_any_point_gives_its_blocks_back(make_engine, make_prompt, store, strategy):
    first = make_engine(strategy)
    await run_prompt(first, make_prompt(first, STORED))
    kept = dict(store.records)
    for at in itertools.count():
        store.records = dict(kept)
        engine = make_engine(strategy)

        async def work(engine=engine):
            computed = await run_prompt(engine, make_prompt(engine, TOKENS))
            assert computed.report.hit_tokens == 3 * 64
            engine.blocks.release(computed.sequence.block_table)

        done = await ends_at(engine, work, at)
        assert engine.blocks.num_available == engine.pool.num_blocks, f"cancelled at call {at}"
        if done:
            break
    assert at > 4


async def test_a_handover_cancelled_at_any_point_gives_its_blocks_back(make_engine, make_prompt):
    first = make_engine()
    prompt = make_prompt(first, TOKENS)
    name = await leave_handoff(first, await run_prompt(first, prompt))
    for at in itertools.count():
        engine = make_engine()

        async def work(engine=engine):
            handoff = await take_handoff(engine, prompt, name)
            adopted = await adopt(engine, prompt, handoff)
            engine.blocks.release(adopted.sequence.block_table)

        done = await ends_at(engine, work, at)
        assert engine.blocks.num_available == engine.pool.num_blocks, f"cancelled at call {at}"
        if done:
            break
    assert at >= 3
