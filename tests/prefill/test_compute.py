"""Cancelling a request never leaves work running on memory that was freed."""

import asyncio
import threading
import time

import numpy as np
import pytest
import torch

from antefix.model.pauses import layers_pause
from antefix_prefill.run_prompt import run_prompt
from antefix_prefill.worker import chunk_parts, compute_thread
from antefix_prefill.worker.chunk_parts import ChunkParts
from antefix_prefill.worker.compute_thread import (
    OLDEST_EVERY,
    TOGETHER_TOKENS,
    ComputeThread,
    compute_for,
    uninterrupted,
)
from tests.waiting import AT_MOST_S, wait_until


async def test_cancellation_waits_for_the_work_in_hand():
    thread, running, let_go, finished = ComputeThread("test"), threading.Event(), threading.Event(), []

    def work():
        running.set()
        let_go.wait(AT_MOST_S)
        finished.append(True)

    task = asyncio.create_task(thread.run(work))
    await asyncio.to_thread(running.wait, AT_MOST_S)
    for _ in range(3):  # a second and a third cancellation must not interrupt the work either
        task.cancel()
        await asyncio.sleep(0)
    assert not task.done()
    let_go.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert finished == [True]
    thread.close()


async def test_an_error_of_the_work_reaches_the_caller():
    async def fails():
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        await uninterrupted(fails())


async def order_of(submissions):
    """The order in which a busy thread runs jobs that were submitted meanwhile: (name, remaining or None, began)."""
    thread, let_go, taken = ComputeThread("test"), threading.Event(), []
    busy = asyncio.create_task(thread.run(let_go.wait))
    await asyncio.sleep(0)
    waiting = []
    for name, remaining, began in submissions:
        if remaining is None:
            waiting.append(asyncio.create_task(thread.run(taken.append, name)))
        else:
            waiting.append(asyncio.create_task(thread.run_chunk(remaining, began, taken.append, name)))
        await asyncio.sleep(0)
    let_go.set()
    await asyncio.gather(busy, *waiting)
    thread.close()
    return taken


async def test_small_jobs_go_first_and_then_the_prompt_with_the_least_left():
    taken = await order_of([("long", 9000, 1.0), ("short", 40, 2.0), ("handoff", None, 0), ("middle", 500, 3.0)])
    assert taken == ["handoff", "short", "middle", "long"]


async def test_every_few_chunks_one_is_the_oldest_prompts():
    shorts = [(f"short {i}", 40, 2.0 + i) for i in range(9)]
    taken = await order_of([("long", 9000, 1.0), *shorts])
    assert taken.index("long") == OLDEST_EVERY - 1
    assert [name for name in taken if name != "long"] == [name for name, _, _ in shorts]


async def test_a_chunk_that_has_waited_goes_before_shorter_ones_that_have_not(monkeypatch):
    clock, waited = [0.0], {"replay": [], "short": []}
    monkeypatch.setattr(compute_thread.time, "perf_counter", lambda: clock[0])
    thread, begin = ComputeThread("test"), threading.Event()

    def compute(kind, asked):
        waited[kind].append(clock[0] - asked)
        clock[0] += 0.1
        # The next chunk is chosen only when the client of the last short one has asked again.
        others = 4 - (kind == "short")
        wait_until(
            lambda: len(waited["replay"]) >= 24 or sum(job.remaining == 200 for job in thread._chunks) >= others,
            "short chunks",
        )

    async def client():
        while len(waited["replay"]) < 24:  # short hits come without end
            asked = clock[0]
            await thread.run_chunk(200, asked, compute, "short", asked)

    async with asyncio.timeout(AT_MOST_S):
        busy = asyncio.create_task(thread.run(begin.wait))
        replays = [asyncio.create_task(thread.run_chunk(700, 0.0, compute, "replay", 0.0)) for _ in range(24)]
        shorts = [asyncio.create_task(client()) for _ in range(4)]
        await asyncio.sleep(0)
        begin.set()
        await asyncio.gather(busy, *replays, *shorts)
    thread.close()
    # With the fewest tokens first, only every fourth chunk would be a replay's.
    assert max(waited["replay"]) < 24 * 0.1 * OLDEST_EVERY / 1.5
    assert np.median(waited["short"]) < 1.0 and max(waited["short"]) < 2.0


async def test_an_error_is_the_callers_and_the_thread_goes_on():
    thread = ComputeThread("test")

    def fail():
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        await thread.run_chunk(1, 0.0, fail)
    assert await thread.run(int, "7") == 7
    thread.close()


async def test_a_short_prompt_does_not_wait_for_a_long_one(make_engine, make_prompt):
    engine, done = make_engine(prefill_chunk=64), []
    begun = asyncio.Event()

    async def finish(name, num_tokens):
        prompt = make_prompt(engine, [ord(name) for _ in range(num_tokens)])
        begun.set()
        computed = await run_prompt(engine, prompt)
        done.append(name)
        engine.blocks.release(computed.sequence.block_table)

    long = asyncio.create_task(finish("l", 1500))
    await begun.wait()
    await asyncio.gather(long, finish("s", 70))
    assert done == ["s", "l"]


async def test_tenants_take_turns_by_the_time_their_chunks_took():
    """A greedy tenant's many short prompts do not all run before the modest tenant's longer prompt."""
    thread, let_go, taken = ComputeThread("test"), threading.Event(), []

    def work(name):
        time.sleep(0.01)
        taken.append(name)

    async def ask(tenant, remaining):
        compute_for(tenant)
        await thread.run_chunk(remaining, 1.0, work, tenant)

    busy = asyncio.create_task(thread.run(let_go.wait))
    await asyncio.sleep(0)
    waiting = [asyncio.create_task(ask("greedy", 10)) for _ in range(12)]
    waiting += [asyncio.create_task(ask("modest", 500)) for _ in range(3)]
    await asyncio.sleep(0)
    let_go.set()
    await asyncio.gather(busy, *waiting)
    thread.close()
    assert taken.index("modest") <= 1
    assert taken[:7].count("modest") == 3


async def test_waits_for_the_thread_are_counted_by_kind_of_work():
    thread, let_go = ComputeThread("test"), threading.Event()
    busy = asyncio.create_task(thread.run(let_go.wait))
    await asyncio.sleep(0)
    waiting = [asyncio.create_task(thread.run_chunk(5, 0.0, int)), asyncio.create_task(thread.run(int))]
    await asyncio.sleep(0.02)
    let_go.set()
    await asyncio.gather(busy, *waiting)
    thread.close()
    samples = {
        (sample.name.rpartition("_")[2], sample.labels["work"]): sample.value
        for family in thread.wait_s.collect()
        for sample in family.samples
        if not sample.name.endswith("_bucket")
    }
    assert (samples["count", "small"], samples["count", "chunk"]) == (2, 1)
    assert min(samples["sum", "small"], samples["sum", "chunk"]) >= 0.02


async def together(pieces, function):
    """Run pieces that wait together for a busy thread.  pieces: (name, tokens) each. Returns every caller's result."""
    thread, let_go = ComputeThread("test"), threading.Event()
    busy = asyncio.create_task(thread.run(let_go.wait))
    await asyncio.sleep(0)
    asked = [thread.run_piece(size, 0.0, function, name, size) for name, size in pieces]
    waiting = [asyncio.create_task(each) for each in asked]
    await asyncio.sleep(0)
    let_go.set()
    await busy
    results = await asyncio.gather(*waiting, return_exceptions=True)
    thread.close()
    return results, thread.num_joined


async def test_short_pieces_that_wait_together_run_as_one_call():
    calls = []

    def run(names):
        calls.append(names)
        return [name.upper() for name in names]

    limit = TOGETHER_TOKENS
    sizes = {"a": 40, "b": limit - 50, "c": 10, "d": 20, "whole chunk": 2 * limit}
    results, num_joined = await together(sizes.items(), run)
    assert results == [name.upper() for name in sizes]
    assert calls == [["c", "d", "a"], ["b"], ["whole chunk"]]
    assert num_joined == 2


async def test_of_pieces_in_one_call_one_fails_alone():
    def run(names):
        return [ValueError(name) if name == "b" else name for name in names]

    results, _ = await together([("a", 1), ("b", 2), ("c", 3)], run)
    assert (results[0], results[2]) == ("a", "c")
    assert isinstance(results[1], ValueError)


async def test_where_a_call_fails_each_piece_runs_alone():
    def run(names):
        if "b" in names:
            raise ValueError("no")
        return names

    results, _ = await together([("a", 1), ("b", 2), ("c", 3)], run)
    assert (results[0], results[2]) == ("a", "c")
    assert isinstance(results[1], ValueError)


async def pieces_of_tenants(pieces):
    """The model's calls for pieces that wait together for a busy thread. A call is a list of (tenant, tokens)."""
    thread, let_go, calls = ComputeThread("test"), threading.Event(), []

    def run(group):
        calls.append(group)
        return group

    async def ask(tenant, share, size):
        compute_for(tenant, share)
        await thread.run_piece(size, 0.0, run, (tenant, size), size)

    busy = asyncio.create_task(thread.run(let_go.wait))
    await asyncio.sleep(0)
    waiting = [asyncio.create_task(ask(*each)) for each in pieces]
    await asyncio.sleep(0)
    let_go.set()
    await asyncio.gather(busy, *waiting)
    thread.close()
    return calls


async def test_where_tenants_share_the_thread_a_call_is_no_longer_than_a_share_allows():
    calls = await pieces_of_tenants([("greedy", 1, 20)] * 12 + [("modest", 1, 20)])
    # With two tenants a call may be twice as long as its first piece, and its second piece is the other tenant's.
    assert max(len(call) for call in calls) == 2
    assert {tenant for tenant, _ in calls[0]} == {"greedy", "modest"}


async def test_many_tenants_short_pieces_still_run_as_one_call():
    calls = await pieces_of_tenants([(f"tenant-{number}", 1, 10) for number in range(8)])
    assert [len(call) for call in calls] == [8]


async def test_a_larger_share_lets_fewer_others_into_its_calls():
    calls = await pieces_of_tenants([("large", 3, 20)] + [("small", 1, 20)] * 3)
    assert ("large", 20) in calls[0] and len(calls[0]) == 1


async def steps_and_chunks(stepping, chunk_tenants, monkeypatch, num_steps=8):
    """The order in which a thread ran decode steps ("s"), submitted one by one, and waiting chunks ("c")."""
    # The thread waits for the next step, even if the event loop is late.
    monkeypatch.setattr("antefix_prefill.worker.compute_thread.STEP_COMES_S", 60.0)
    thread, let_go, order = ComputeThread("test"), threading.Event(), []

    def run(name, seconds):
        order.append(name)
        time.sleep(seconds)

    async def chunk(tenant):
        compute_for(tenant)
        await thread.run_chunk(1, 0.0, run, "c", 0.03)

    busy = asyncio.create_task(thread.run(let_go.wait))
    await asyncio.sleep(0)
    thread.stepping_for(dict.fromkeys(stepping, 1))
    chunks = [asyncio.create_task(chunk(tenant)) for tenant in chunk_tenants]
    await asyncio.sleep(0)
    let_go.set()
    for _ in range(num_steps):
        await thread.run(run, "s", 0.011)
        await asyncio.sleep(0.002)
    thread.stepping_for({})
    async with asyncio.timeout(AT_MOST_S):
        await asyncio.gather(busy, *chunks)
        thread.close()
    return "".join(order)


async def test_others_chunks_leave_a_tenant_that_only_decodes_as_much_time_as_they_take(monkeypatch):
    order = await steps_and_chunks({"greedy", "modest"}, ["greedy"] * 3, monkeypatch)
    # Between two chunks the steps take as long as a chunk, which are two or three steps. The first chunk does not
    # count.
    between = order.strip("s").split("c")[1:-1]
    assert all(len(steps) >= 2 for steps in between), order
    assert order.count("c") == 3 and order.count("s") == 8


async def test_a_tenant_that_has_no_steps_yet_waits_for_none_with_its_chunk(monkeypatch):
    order = await steps_and_chunks({"greedy"}, ["modest"] * 2, monkeypatch)
    assert "cc" in order or "csc" in order, order


async def test_alone_a_tenants_chunks_and_steps_take_turns(monkeypatch):
    order = await steps_and_chunks({"greedy"}, ["greedy"] * 3, monkeypatch)
    assert "sss" not in order.rpartition("c")[0], order


async def test_small_jobs_run_between_the_layers_of_a_chunk():
    thread, running, order = ComputeThread("test"), threading.Event(), []

    def chunk():
        running.set()
        after_layer = layers_pause(torch.device("cpu"))
        while len(order) < 2:  # steps that never run would let this test time out
            after_layer()
        order.append("chunk")

    def step():
        assert layers_pause(torch.device("cpu")) is None
        order.append("step")

    async with asyncio.timeout(AT_MOST_S):
        task = asyncio.create_task(thread.run_chunk(1, 0.0, chunk))
        await asyncio.to_thread(running.wait, AT_MOST_S)
        for _ in range(2):
            await thread.run_step(None, step)
        await task
    assert order == ["step", "step", "chunk"]
    thread.close()


async def test_a_chunk_whose_time_was_given_back_in_its_pauses_owes_none():
    thread, running, ran = ComputeThread("test"), threading.Event(), []

    def chunk():
        running.set()
        after_layer = layers_pause(torch.device("cpu"))
        while not ran:
            after_layer()

    async with asyncio.timeout(AT_MOST_S):
        task = asyncio.create_task(thread.run_chunk(1, 0.0, chunk))
        await asyncio.to_thread(running.wait, AT_MOST_S)
        await thread.run_step(2 * AT_MOST_S, ran.append, 1)
        await task
    thread.close()
    assert thread.chunk_tenants == frozenset()


def test_a_chunk_is_cut_to_what_a_part_computes_within_the_limit(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(chunk_parts.time, "perf_counter", lambda: clock[0])
    parts = ChunkParts(0.05)
    assert parts.tokens_max(8192) == 8192
    for longest_s, wanted in ((0.04, 8192), (0.1, 3072), (1.0, 1024), (0.05, 8192)):
        parts.begin()
        for part_s in (longest_s / 2, longest_s, 0.001):
            clock[0] += part_s
            # The time of a step in a pause is no part of the chunk.
            parts.paused(clock[0], clock[0] + 5.0, 0.0)
            clock[0] += 5.0
        parts.end(8192)
        assert parts.tokens_max(8192) == wanted and parts.tokens_max(100) == 100
        assert parts.paused_s == pytest.approx(15.0)


async def test_chunks_are_cut_only_while_steps_run():
    thread = ComputeThread("test", step_delay_max_s=1e-9)
    await thread.run_piece(1, 0.0, lambda pieces: pieces, "piece", 4096)
    assert thread.chunk_tokens_max(4096) == 4096
    thread.stepping_for({"tenant": 1})
    assert thread.chunk_tokens_max(4096) == chunk_parts.TOKENS_MIN
    thread.stepping_for({})
    assert thread.chunk_tokens_max(4096) == 4096
    thread.close()
