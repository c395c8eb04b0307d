"""A store that is late, or hangs, costs a prompt no more than computing it. Time is simulated; the model is real."""

import asyncio

import numpy as np
import pytest

from antefix.store.patience import FLOOR_S, UNKNOWN_S
from antefix.window import RestorePlanner
from antefix_decode.adopt import adopt, take_handoff
from antefix_prefill.leave_handoff import leave_handoff
from antefix_prefill.prefetch import Prefetcher
from antefix_prefill.run_prompt import run_prompt
from tests.engines import MemoryStore
from tests.router.test_moves import simulate

pytestmark = pytest.mark.impatient

RNG = np.random.default_rng(11)
DOCUMENT = RNG.integers(0, 256, 900)
LONGER = np.concatenate((DOCUMENT, RNG.integers(0, 256, 70)))
TOKENS_PER_S = 200.0
COLD_S = len(LONGER) / TOKENS_PER_S
HUNG_S = 1e6
# A read, a put and what follows them are late after this time each, once a first call is.
MARGINS_S = UNKNOWN_S + 4 * FLOOR_S
STRATEGIES = ("zero", "boundary", "full", "periodic(256)")
CALLS = ("lookup", "get_blocks", "get", "fate", "put")


class LateStore(MemoryStore):
    """lasts_s: by call, how long it takes from now on.  ends_s: when calls that began before it end at the latest."""

    def __init__(self):
        super().__init__()
        self.lasts_s, self.num_open = {}, 0

    async def _answer(self, call, *args, **kwargs):
        self.num_open += 1
        try:
            await asyncio.sleep(self.lasts_s.get(call, 0.0))
            return await getattr(MemoryStore, call)(self, *args, **kwargs)
        finally:
            self.num_open -= 1

    async def lookup(self, *args, **kwargs):
        return await self._answer("lookup", *args, **kwargs)

    async def get_blocks(self, *args, **kwargs):
        return await self._answer("get_blocks", *args, **kwargs)

    async def get(self, *args, **kwargs):
        return await self._answer("get", *args, **kwargs)

    async def fate(self, *args, **kwargs):
        return await self._answer("fate", *args, **kwargs)

    async def put(self, *args, **kwargs):
        return await self._answer("put", *args, **kwargs)


class SimulatedCompute:
    """Runs each job at once, and a chunk in the simulated time that its tokens take."""

    chunk_tenants = frozenset()

    def __init__(self):
        self.num_tokens, self._turn = 0, asyncio.Lock()

    async def run(self, function, *args, **kwargs):
        return function(*args, **kwargs)

    run_apart = run

    async def run_chunk(self, remaining, began, function, *args):
        num_tokens = len(args[0][0].tokens) if isinstance(args[0], list) else len(args[2])
        return await self._run(num_tokens, function, *args)

    async def run_piece(self, remaining, began, function, piece, num_tokens):
        (result,) = await self._run(num_tokens, function, [piece])
        if isinstance(result, Exception):
            raise result
        return result

    async def _run(self, num_tokens, function, *args):
        async with self._turn:
            self.num_tokens += num_tokens
            await asyncio.sleep(num_tokens / TOKENS_PER_S)
            return function(*args)

    def chunk_tokens_max(self, num_tokens):
        return num_tokens

    def close(self):
        pass


@pytest.fixture
def store():
    return LateStore()


@pytest.fixture
def worker(make_engine):
    def make(*args, **kwargs):
        engine = make_engine(*args, **kwargs)
        engine.compute.close()
        engine.compute = SimulatedCompute()
        return engine

    return make


def contents(engine, computed):
    rows = [bytes(engine.pool.payloads([block])[0]) for block in computed.sequence.block_table]
    return computed.logits.tobytes(), rows, computed.sequence.window.to_bytes()


async def run(engine, prompt):
    """What a prompt computed, its report, and the seconds that it took. Nothing of it stays in use."""
    clock = asyncio.get_running_loop().time
    begun = clock()
    computed = await run_prompt(engine, prompt)
    took_s, found = clock() - begun, contents(engine, computed)
    report = computed.report
    assert report.hit_tokens + report.miss_tokens == prompt.num_tokens
    assert report.hit_memory_tokens + report.hit_store_tokens == report.hit_tokens
    engine.blocks.release(computed.sequence.block_table)
    return found, report, took_s


async def rows_come_back(engine, store):
    """Whether the pool has all its rows again when the store's calls have ended."""
    store.lasts_s.clear()
    await asyncio.sleep(2 * HUNG_S)
    assert store.num_open == 0
    return engine.blocks.num_available == engine.pool.num_blocks and engine.patience.num_late == 0


async def stored_and_cold(worker, make_prompt, store, strategy="boundary", kv_format="fp8"):
    """What a cold run of LONGER gives, after which the store holds DOCUMENT alone."""
    alone = worker(strategy, kv_format)
    cold, _, took_s = await run(alone, make_prompt(alone, LONGER))
    assert took_s == pytest.approx(COLD_S, abs=0.01)
    store.records.clear()
    first = worker(strategy, kv_format)
    await run(first, make_prompt(first, DOCUMENT))
    return cold


@pytest.mark.parametrize("hung", [*((call,) for call in CALLS), CALLS], ids="+".join)
def test_a_store_that_hangs_costs_no_more_than_computing_and_a_margin(worker, make_prompt, store, hung):
    async def prompts():
        cold = await stored_and_cold(worker, make_prompt, store)
        engine = worker()
        store.lasts_s = dict.fromkeys(hung, HUNG_S)
        found, report, took_s = await run(engine, make_prompt(engine, LONGER))
        assert found == cold
        assert took_s <= COLD_S + (1.1 if hung == ("put",) else MARGINS_S)
        if {"lookup", "get_blocks"} & set(hung):
            assert (report.hit_tokens, report.miss_reason) == (0, "store_late")
        if hung == ("get",):
            # The blocks have come. Only the checkpoint is late, and the window state is rebuilt from them.
            assert (report.plan, report.hit_tokens) == ("replay", report.hit_store_tokens) == ("replay", 896)
        if {"lookup", "get_blocks", "get"} & set(hung):
            assert engine.counters.late_by_outcome["computed"] == 1
        assert await rows_come_back(engine, store)

    simulate(prompts)


@pytest.mark.parametrize(
    ("late", "strategy", "kv_format"),
    [
        *(("get_blocks", strategy, "fp8") for strategy in STRATEGIES),
        *(("lookup", strategy, "float32") for strategy in ("zero", "boundary")),
    ],
)
def test_a_late_answer_that_is_still_a_gain_is_taken_and_is_exact(
    worker, make_prompt, store, strategy, kv_format, late
):
    async def prompts():
        cold = await stored_and_cold(worker, make_prompt, store, strategy, kv_format)
        engine = worker(strategy, kv_format)
        store.lasts_s = {late: 0.9}
        found, report, took_s = await run(engine, make_prompt(engine, LONGER))
        assert found == cold and took_s < COLD_S
        assert report.hit_tokens > 0 == report.hit_memory_tokens
        assert report.hit_tokens == report.hit_store_tokens
        assert engine.counters.late_by_outcome == {"restored": 1}
        assert await rows_come_back(engine, store)

    simulate(prompts)


@pytest.mark.parametrize(
    ("lasts_s", "late", "strategy"),
    [
        *((COLD_S - 0.2, "get_blocks", strategy) for strategy in STRATEGIES),
        (COLD_S - 0.2, "lookup", "boundary"),
        (COLD_S + 1.0, "get_blocks", "boundary"),
    ],
)
def test_an_answer_that_comes_too_late_is_dropped(worker, make_prompt, store, strategy, late, lasts_s):
    async def prompts():
        cold = await stored_and_cold(worker, make_prompt, store, strategy)
        engine = worker(strategy)
        store.lasts_s = {late: lasts_s}
        found, report, took_s = await run(engine, make_prompt(engine, LONGER))
        assert found == cold and took_s <= COLD_S + MARGINS_S
        assert (report.hit_tokens, report.miss_reason) == (0, "store_late")
        assert engine.counters.late_by_outcome["computed"] == 1
        assert await rows_come_back(engine, store)
        # What was computed meanwhile stands under its names, and the next prompt finds it.
        _, report, _ = await run(engine, make_prompt(engine, LONGER))
        assert report.hit_memory_tokens == len(LONGER) // 64 * 64

    simulate(prompts)


def test_answers_at_any_time_give_the_same_bits_and_end_in_time(worker, make_prompt, store):
    async def prompts():
        cold = await stored_and_cold(worker, make_prompt, store, "zero")
        outcomes = set()
        for lasts_s in np.arange(0.1, COLD_S + 0.5, 0.55):
            engine = worker("zero")
            store.lasts_s = dict.fromkeys(("lookup", "get_blocks"), lasts_s)
            found, _, took_s = await run(engine, make_prompt(engine, LONGER))
            assert found == cold and took_s <= COLD_S + MARGINS_S + 0.5
            outcomes |= engine.counters.late_by_outcome.keys()
            assert await rows_come_back(engine, store)
        return outcomes

    assert simulate(prompts) >= {"restored", "computed"}


def test_in_reproducible_mode_a_late_answer_makes_the_calls_of_a_hit(worker, make_prompt, store):
    def aligned():
        engine = worker("boundary", prefill_chunk=192)
        engine.align_tokens = 192
        engine.planner = RestorePlanner(engine.sizes, engine.rates, align_tokens=192)
        return engine

    async def prompts():
        alone = aligned()
        cold, _, _ = await run(alone, make_prompt(alone, LONGER))
        store.records.clear()
        first = aligned()
        await run(first, make_prompt(first, DOCUMENT))
        for lasts_s, hit in ((1.2, 768), (COLD_S, 0)):
            engine = aligned()
            store.lasts_s = {"get_blocks": lasts_s}
            found, report, _ = await run(engine, make_prompt(engine, LONGER))
            assert (found, report.hit_tokens) == (cold, hit)
            assert await rows_come_back(engine, store)

    simulate(prompts)


def test_a_late_store_that_has_nothing_is_no_reason_for_the_miss(worker, make_prompt, store):
    async def prompts():
        engine = worker()
        store.lasts_s = {"lookup": 1.0}
        _, report, took_s = await run(engine, make_prompt(engine, LONGER))
        assert report.miss_reason == "first_seen" and took_s <= COLD_S + MARGINS_S
        # Records that were held back are stored after all.
        assert report.written_tokens == len(LONGER) // 64 * 64

    simulate(prompts)


def test_what_is_in_memory_is_used_without_the_store(worker, make_prompt, store):
    async def prompts():
        engine = worker()
        await run(engine, make_prompt(engine, DOCUMENT))
        store.lasts_s = dict.fromkeys(CALLS, HUNG_S)
        _, report, took_s = await run(engine, make_prompt(engine, LONGER))
        assert report.hit_tokens == report.hit_memory_tokens == len(DOCUMENT) // 64 * 64
        assert took_s < COLD_S / 2 + MARGINS_S

    simulate(prompts)


def test_a_pool_without_room_for_both_waits_for_the_store(worker, make_prompt, store):
    async def prompts():
        cold = await stored_and_cold(worker, make_prompt, store)
        engine = worker(num_blocks=18)
        store.lasts_s = {"get_blocks": 2.0}
        found, report, _ = await run(engine, make_prompt(engine, LONGER))
        assert found == cold and report.hit_tokens > 0
        assert await rows_come_back(engine, store)

    simulate(prompts)


@pytest.mark.parametrize("at_s", [0.1, 0.3, 1.0, 3.0])
@pytest.mark.parametrize("hung", ["lookup", "get_blocks", "put"])
def test_a_request_that_is_cancelled_next_to_a_late_store_gives_its_rows_back(worker, make_prompt, store, hung, at_s):
    async def prompts():
        await stored_and_cold(worker, make_prompt, store)
        engine = worker()
        store.lasts_s = {hung: 50.0}
        asked = asyncio.create_task(run(engine, make_prompt(engine, LONGER)))
        await asyncio.sleep(at_s)
        asked.cancel()
        await asyncio.wait([asked])
        assert await rows_come_back(engine, store)

    simulate(prompts)


def test_a_store_that_hangs_after_prefill_costs_decode_no_more_than_computing(worker, make_prompt, store):
    async def prompts():
        for hung in ("get", "get_blocks"):
            first = worker()
            prompt = make_prompt(first, LONGER)
            name = await leave_handoff(first, await run_prompt(first, prompt))
            other, clock = worker(), asyncio.get_running_loop().time
            begun = clock()
            store.lasts_s = dict.fromkeys(CALLS if hung == "get" else ("get_blocks",), HUNG_S)
            handoff = await take_handoff(other, prompt, name)
            adopted = await adopt(other, prompt, handoff) if handoff is not None else None
            assert adopted is None
            assert clock() - begun <= MARGINS_S
            assert await rows_come_back(other, store)

    simulate(prompts)


def test_a_handoff_to_a_store_that_hangs_is_given_up(worker, make_prompt, store):
    async def prompts():
        engine = worker()
        computed = await run_prompt(engine, make_prompt(engine, LONGER))
        store.lasts_s = {"put": HUNG_S}
        begun = asyncio.get_running_loop().time()
        assert await leave_handoff(engine, computed) == b""
        assert asyncio.get_running_loop().time() - begun <= 1.1

    simulate(prompts)


@pytest.mark.parametrize("hung", ["lookup", "get_blocks", "get"])
def test_a_turn_does_not_wait_for_a_prefetch_from_a_store_that_hangs(worker, make_prompt, store, hung):
    async def prompts():
        await stored_and_cold(worker, make_prompt, store)
        engine, clock = worker(), asyncio.get_running_loop().time
        prompt = make_prompt(engine, LONGER)
        store.lasts_s = {hung: HUNG_S}
        begun = clock()
        async with Prefetcher(engine).while_waiting(prompt):
            await asyncio.sleep(0.06)
        assert clock() - begun <= 0.06 + MARGINS_S
        assert await rows_come_back(engine, store)

    simulate(prompts)


def test_a_cancellation_while_a_load_is_waited_for_is_not_lost(worker, make_prompt, store):
    async def prompts():
        await stored_and_cold(worker, make_prompt, store)
        engine, went_on = worker(), []
        prompt = make_prompt(engine, LONGER)
        store.lasts_s = {"get_blocks": HUNG_S}

        async def turn():
            async with Prefetcher(engine).while_waiting(prompt):
                await asyncio.sleep(0.06)
            went_on.append(True)

        task = asyncio.create_task(turn())
        await asyncio.sleep(0.1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not went_on
        assert await rows_come_back(engine, store)

    simulate(prompts)


def test_a_busy_store_is_waited_for_once_its_times_are_known(worker, make_prompt, store):
    async def prompts():
        await stored_and_cold(worker, make_prompt, store)
        store.lasts_s = {"lookup": 0.2, "fate": 0.2}
        engine = worker()
        for number in range(30):
            await run(engine, make_prompt(engine, np.full(70, number)))
        assert engine.counters.late_by_outcome == {}
        store.lasts_s = {"lookup": 0.35}
        _, report, _ = await run(engine, make_prompt(engine, LONGER))
        assert report.hit_tokens > 0 and engine.counters.late_by_outcome == {}

    simulate(prompts)
