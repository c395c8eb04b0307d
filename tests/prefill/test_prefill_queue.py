"""Places of a prefill worker: long prompts wait for each other, and short rests do not wait for long prompts."""

import asyncio

import pytest

from antefix.errors import ConfigError, Overloaded
from antefix_prefill.prefill_queue import PrefillQueue
from antefix_prefill.restore import has_short_rest
from antefix_prefill.run_prompt import run_prompt
from antefix_prefill.server import PrefillConfig


def answers(short):
    async def is_short():
        return short

    return is_short


async def enter(queue, short, let_go):
    async with queue.turn(1.0, answers(short)):
        await let_go.wait()


async def started(queue, *shorts):
    """Start these prompts. Returns how many run at once, and how many wait."""
    let_go = asyncio.Event()
    tasks = [asyncio.create_task(enter(queue, short, let_go)) for short in shorts]
    for _ in range(10):
        await asyncio.sleep(0)
    found = queue.num_running, queue.num_waiting
    let_go.set()
    await asyncio.gather(*tasks)
    assert (queue.num_running, queue.num_waiting) == (0, 0)
    return found


async def test_short_rests_do_not_wait_for_long_prompts():
    queue = PrefillQueue(2, 64, 3)
    assert await started(queue, False, False, False) == (2, 1)
    assert await started(queue, False, False, True, True) == (4, 0)
    assert await started(queue, False, False, *[True] * 5) == (5, 2)
    # The next prompt takes a free place without waiting.
    assert await started(queue, True, True) == (2, 0)


async def test_another_tenants_short_rest_waits_for_no_place_of_a_busy_one():
    queue, let_go, at_work = PrefillQueue(1, 64, 2), asyncio.Event(), []

    async def ask(tenant):
        async with queue.turn(1.0, answers(True), tenant=tenant):
            at_work.append(tenant)
            await let_go.wait()

    tasks = [asyncio.create_task(ask(tenant)) for tenant in (*["greedy"] * 8, "modest")]
    for _ in range(10):
        await asyncio.sleep(0)
    assert at_work == ["greedy", "greedy", "greedy", "modest"] and queue.num_waiting == 5
    let_go.set()
    await asyncio.gather(*tasks)


async def test_a_tenants_prompts_start_in_their_order_whichever_place_becomes_free():
    queue, let_go, begun = PrefillQueue(2, 64, 1), [asyncio.Event() for _ in range(6)], []

    async def ask(number, tenant="busy"):
        async with queue.turn(1.0, answers(True), tenant=tenant):
            begun.append(number)
            await let_go[number].wait()

    async def ask_now(*asked):
        tasks.append(asyncio.create_task(ask(*asked)))
        for _ in range(10):
            await asyncio.sleep(0)

    tasks = []
    for number in range(4):
        await ask_now(number)
    # Three places are taken, and number 3 waits for the one for short prompts. Another one becomes free.
    let_go[0].set()
    await ask_now(4)
    assert begun == [0, 1, 2]
    # That a tenant's prompts wait keeps no other tenant waiting.
    await ask_now(5, "another")
    assert begun == [0, 1, 2, 5]
    for each in let_go:
        each.set()
    await asyncio.gather(*tasks)
    assert begun == [0, 1, 2, 5, 3, 4]


async def test_without_such_places_everybody_waits():
    assert await started(PrefillQueue(1, 64, 0), False, True, True) == (1, 2)


async def test_a_full_queue_refuses_short_ones_too():
    queue, let_go = PrefillQueue(1, 1, 0), asyncio.Event()
    tasks = [asyncio.create_task(enter(queue, False, let_go)) for _ in range(2)]
    for _ in range(4):
        await asyncio.sleep(0)
    with pytest.raises(Overloaded):
        await enter(queue, True, let_go)
    let_go.set()
    await asyncio.gather(*tasks)


def test_the_setting_is_checked():
    with pytest.raises(ConfigError, match="num_short_max"):
        PrefillConfig(model="m", secret_file="s", store_address="127.0.0.1:1", num_short_max=-1)


async def test_a_rest_is_short_where_the_store_or_the_memory_has_the_beginning(make_engine, make_prompt):
    engine = make_engine(prefill_chunk=64)
    tokens = list(range(256)) * 2
    assert not await has_short_rest(engine, make_prompt(engine, tokens))
    computed = await run_prompt(engine, make_prompt(engine, tokens))
    engine.blocks.release(computed.sequence.block_table)
    assert await has_short_rest(engine, make_prompt(engine, [*tokens, 1, 2]))
    another = make_engine(prefill_chunk=64)
    assert await has_short_rest(another, make_prompt(another, [*tokens, 1, 2]))
    assert not await has_short_rest(another, make_prompt(another, [*tokens, *range(70)]))
    small = make_engine(prefill_chunk=64, num_blocks=2)
    assert not await has_short_rest(small, make_prompt(small, [*tokens, 1, 2]))
