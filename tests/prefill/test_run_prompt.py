"""Restoring and computing a prompt: a hit equals a cold run to the bit, and no failure changes an answer."""

import asyncio
import dataclasses
import threading
from types import SimpleNamespace

import numpy as np
import pytest

from antefix.errors import StepFailed
from antefix.layout import KVFormat
from antefix.record import RecordKind
from antefix_prefill import run_prompt as run_prompt_module
from antefix_prefill.run_prompt import run_prompt

RNG = np.random.default_rng(7)
DOCUMENT = RNG.integers(0, 256, 900)
OTHER_END = RNG.integers(0, 256, 70)


async def run(engine, prompt):
    computed = await run_prompt(engine, prompt)
    rows = [bytes(engine.pool.payloads([block])[0]) for block in computed.sequence.block_table]
    window = computed.sequence.window.to_bytes()
    engine.blocks.release(computed.sequence.block_table)
    return computed, rows, window


def same(one, two):
    """Whether logits, every block's bytes and the window state are equal to the bit."""
    return np.array_equal(one[0].logits, two[0].logits) and one[1] == two[1] and one[2] == two[2]


@pytest.mark.parametrize("kv_format", [KVFormat.FP8, KVFormat.FLOAT32])
@pytest.mark.parametrize(("strategy", "plan"), [("boundary", "checkpoint"), ("zero", "replay")])
async def test_a_hit_equals_a_cold_run_to_the_bit(make_engine, make_prompt, store, kv_format, strategy, plan):
    first = make_engine(strategy, kv_format)
    await run(first, make_prompt(first, DOCUMENT))
    longer = np.concatenate((DOCUMENT, OTHER_END))
    other = make_engine(strategy, kv_format)  # another worker, whose memory is empty
    hit = await run(other, make_prompt(other, longer))
    store.records.clear()
    fresh = make_engine(strategy, kv_format)
    cold = await run(fresh, make_prompt(fresh, longer))
    assert (hit[0].report.plan, cold[0].report.plan) == (plan, "cold")
    assert same(hit, cold)


def wait_for_each_other(compute, num_prompts):
    """The compute thread runs no piece before every prompt has submitted its only piece."""
    submit, barrier, let_go = compute.run_piece, asyncio.Barrier(num_prompts), threading.Event()

    async def run_piece(*args):
        if await barrier.wait() == 0:
            compute._executor.submit(let_go.wait)
        await barrier.wait()
        mine = asyncio.create_task(submit(*args))
        await asyncio.sleep(0)
        await barrier.wait()
        let_go.set()
        return await mine

    compute.run_piece = run_piece


async def test_short_rests_that_run_in_one_call_have_the_bits_of_each_alone(make_engine, make_prompt, store):
    prompts = [DOCUMENT[:60], DOCUMENT[100:141], OTHER_END[:20], OTHER_END[:63]]
    alone = []
    for tokens in prompts:
        store.records.clear()
        engine = make_engine("boundary")
        alone.append(await run(engine, make_prompt(engine, tokens)))
    store.records.clear()
    engine = make_engine("boundary")
    wait_for_each_other(engine.compute, len(prompts))
    waiting = [asyncio.create_task(run(engine, make_prompt(engine, tokens))) for tokens in prompts]
    found = await asyncio.gather(*waiting)
    assert all(same(one, two) for one, two in zip(found, alone, strict=True))
    assert engine.compute.num_joined == len(prompts) - 1


async def test_a_fork_without_a_checkpoint_is_replayed_exactly(make_engine, make_prompt, store):
    engine = make_engine("boundary")
    await run(engine, make_prompt(engine, DOCUMENT))
    fork = np.concatenate((DOCUMENT[:700], OTHER_END))
    other = make_engine("boundary")
    hit = await run(other, make_prompt(other, fork))
    store.records.clear()
    fresh = make_engine("boundary")
    assert same(hit, await run(fresh, make_prompt(fresh, fork)))
    assert hit[0].report.plan == "replay"
    assert hit[0].report.hit_tokens == 640
    assert hit[0].report.replayed_tokens == engine.sizes.replay_tokens


async def test_a_replay_writes_no_block_again(make_engine, make_prompt, store):
    engine = make_engine("zero")
    await run(engine, make_prompt(engine, DOCUMENT))
    store.puts.clear()
    other = make_engine("zero")
    await run(other, make_prompt(other, np.concatenate((DOCUMENT, OTHER_END))))
    written = [position for kind, position in store.puts if kind is RecordKind.BLOCK]
    assert written == [960]


async def test_counts_add_up(make_engine, make_prompt):
    engine = make_engine("boundary")
    cold = (await run(engine, make_prompt(engine, DOCUMENT)))[0].report
    assert (cold.hit_tokens, cold.miss_tokens, cold.miss_reason) == (0, 900, "first_seen")
    assert cold.written_tokens == 896
    warm = (await run(engine, make_prompt(engine, DOCUMENT)))[0].report
    assert (warm.hit_tokens, warm.miss_tokens, warm.miss_reason) == (896, 4, "")
    assert warm.hit_memory_tokens == 896 and warm.bytes_read > 0
    assert warm.written_tokens == 0
    other = make_engine("boundary")
    disk = (await run(other, make_prompt(other, DOCUMENT)))[0].report
    assert (disk.hit_tokens, disk.hit_store_tokens, disk.hit_memory_tokens) == (896, 896, 0)
    assert disk.last_hit_hash == make_prompt(engine, DOCUMENT).chain.hashes[13]


async def test_a_prompt_that_ends_at_a_boundary_still_runs_its_last_token(make_engine, make_prompt):
    engine = make_engine("boundary")
    cold = await run(engine, make_prompt(engine, DOCUMENT[:640]))
    other = make_engine("boundary")
    hit = await run(other, make_prompt(other, DOCUMENT[:640]))
    assert hit[0].report.hit_tokens < 640
    assert same(cold, hit)


@pytest.mark.slow
@pytest.mark.parametrize(
    "broken", [{"lookup"}, {"get_blocks"}, {"get"}, {"put"}, {"lookup", "get", "get_blocks", "put"}]
)
async def test_a_broken_store_costs_speed_never_an_answer(make_engine, make_prompt, store, broken):
    engine = make_engine("boundary")
    longer = np.concatenate((DOCUMENT, OTHER_END))
    cold = await run(engine, make_prompt(engine, longer))
    store.records.clear()
    await run(make_engine("boundary"), make_prompt(engine, DOCUMENT))
    store.broken = broken
    other = make_engine("boundary")
    answer = await run(other, make_prompt(other, longer))
    assert same(cold, answer)
    assert other.counters.errors > 0


async def test_a_block_lost_between_lookup_and_read_shortens_the_hit(make_engine, make_prompt, store):
    engine = make_engine("boundary")
    prompt = make_prompt(engine, DOCUMENT)
    cold = await run(engine, prompt)
    lookup = store.lookup

    async def stale(chain, **kwargs):
        found = await lookup(chain, **kwargs)
        store.records.pop((RecordKind.BLOCK, prompt.chain.hashes[9]), None)
        return found

    store.lookup = stale
    other = make_engine("boundary")
    hit = await run(other, make_prompt(other, DOCUMENT))
    assert same(cold, hit)
    assert hit[0].report.hit_tokens == 9 * 64


async def test_a_restore_that_finds_no_room_for_a_seat_gives_its_blocks_back(make_engine, make_prompt, monkeypatch):
    first, other = make_engine("boundary"), make_engine("boundary")
    await run(first, make_prompt(first, DOCUMENT))

    def seat_early(model, window, num_tokens):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(other.ops, "step_runner", SimpleNamespace(seat_early=seat_early))
    with pytest.raises(StepFailed):
        await run(other, make_prompt(other, DOCUMENT))
    assert other.blocks.num_available == other.pool.num_blocks


@pytest.mark.parametrize("lost", [RecordKind.CHECKPOINT, RecordKind.BLOCK])
async def test_blocks_that_an_earlier_plan_read_count_as_read(make_engine, make_prompt, store, lost):
    engine = make_engine("boundary")
    prompt = make_prompt(engine, DOCUMENT)
    await run(engine, make_prompt(engine, DOCUMENT[:130]))
    await run(engine, prompt)
    lookup = store.lookup

    async def stale(chain, **kwargs):
        found = await lookup(chain, **kwargs)
        name = prompt.chain.hashes[found.checkpoints[-1] - 1 if lost is RecordKind.CHECKPOINT else 9]
        store.records.pop((lost, name), None)
        return found

    other = make_engine("boundary")
    await run(other, make_prompt(other, DOCUMENT[:130]))
    store.lookup = stale
    report = (await run(other, make_prompt(other, DOCUMENT)))[0].report
    assert report.hit_tokens > 128 and report.hit_memory_tokens == 128
    assert report.hit_tiers == {"disk": report.hit_store_tokens}
    assert report.hit_store_tokens == report.hit_tokens - 128
    assert other.blocks.num_available == other.pool.num_blocks


async def test_tenants_do_not_hit_each_other(make_engine, make_prompt):
    engine = make_engine("boundary")
    await run(engine, make_prompt(engine, DOCUMENT, tenant="a"))
    other = (await run(engine, make_prompt(engine, DOCUMENT, tenant="b")))[0].report
    assert other.hit_tokens == 0


@pytest.mark.slow
async def test_all_blocks_come_back_to_the_pool(make_engine, make_prompt, store):
    engine = make_engine("boundary", num_blocks=20)
    for seed in range(4):
        tokens = np.random.default_rng(seed).integers(0, 256, 900)
        await run(engine, make_prompt(engine, tokens))
    assert engine.blocks.num_available == 20


async def test_what_the_store_lost_and_a_worker_still_has_is_stored_again(make_engine, make_prompt, store):
    engine = make_engine("boundary")
    await run(engine, make_prompt(engine, DOCUMENT))
    store.records.clear()
    warm = await run(engine, make_prompt(engine, np.concatenate((DOCUMENT, OTHER_END))))
    assert warm[0].report.hit_tokens == 896
    found = await store.lookup(warm[0].prompt.chain.hashes, fingerprint=engine.fingerprint)
    assert found.num_blocks == 15


async def test_what_another_worker_stored_meanwhile_is_not_counted_as_written(make_engine, make_prompt, store):
    class Raced(type(store)):
        """A store that already holds the first block when it is put."""

        async def put(self, records):
            num_existing = sum(record.position == 64 for record in records)
            return dataclasses.replace(await super().put(records), num_existing=num_existing)

    engine = dataclasses.replace(make_engine("zero"), store=Raced())
    computed = await run_prompt(engine, make_prompt(engine, DOCUMENT[: 5 * 64 + 3]))
    assert computed.report.written_tokens == 4 * 64


@pytest.mark.parametrize("kv_format", [KVFormat.FP8, KVFormat.FLOAT32])
@pytest.mark.parametrize("num_marks", [1, 3, 6])
async def test_checkpoints_inside_a_chunk_have_the_bits_of_chunks_that_end_there(
    make_engine, make_prompt, store, kv_format, num_marks
):
    engine = make_engine("boundary", kv_format, prefill_chunk=1024)
    size = engine.block_size
    # The strategy's own checkpoint is at the last boundary; clients asked for the others.
    ends = [size * (number + 1) for number in range(num_marks)]
    tokens = DOCUMENT[: ends[-1] + size // 2]
    prompt = make_prompt(engine, tokens)
    prompt = dataclasses.replace(prompt, breakpoints=tuple((end, 60.0) for end in ends))
    whole = await run(engine, prompt)
    stored = {end: store.records[RecordKind.CHECKPOINT, prompt.chain.hashes[end // size - 1]] for end in ends}
    for end in ends:
        store.records.clear()
        alone = make_engine("boundary", kv_format, prefill_chunk=1024)
        assert (await run(alone, make_prompt(alone, tokens[:end])))[2] == stored[end]
    store.records.clear()
    in_blocks = make_engine("zero", kv_format, prefill_chunk=size)
    assert same(whole, await run(in_blocks, make_prompt(in_blocks, tokens)))


@pytest.mark.parametrize(("num_marks", "num_calls"), [(1, 1), (4, 1), (5, 2)])
async def test_a_checkpoint_costs_no_call_of_its_own(make_engine, make_prompt, num_marks, num_calls, monkeypatch):
    engine = make_engine("boundary", prefill_chunk=1024)
    ends = [engine.block_size * (number + 1) for number in range(num_marks)]
    prompt = make_prompt(engine, DOCUMENT[: ends[-1] + 5])
    lengths = []

    def run_tokens(model, pool, batch, **more):
        lengths.extend(len(tokens) for _, tokens in batch)
        return run_tokens_of_the_model(model, pool, batch, **more)

    run_tokens_of_the_model = run_prompt_module.run_tokens
    monkeypatch.setattr(run_prompt_module, "run_tokens", run_tokens)
    await run(engine, dataclasses.replace(prompt, breakpoints=tuple((end, 60.0) for end in ends)))
    assert sum(lengths) == prompt.num_tokens
    assert len(lengths) == num_calls
