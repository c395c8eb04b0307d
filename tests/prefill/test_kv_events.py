"""Events of a real engine's pool during prefill: each block with its tokens, its parent and its owner."""

import asyncio

import msgspec
import numpy as np
import pytest

from antefix.errors import ConfigError
from antefix.layout import KVFormat
from antefix_prefill.run_prompt import run_prompt
from antefix_prefill.server import PrefillConfig
from antefix_prefill.worker.kv_events_service import telling_kv_events
from tests.engines import MemoryStore, build, load, prompt_of
from tests.events.test_kv_publisher import Reader

SIZE = 64
SETTINGS = {"model": "m", "secret_file": "s", "store_address": "127.0.0.1:1"}


@pytest.fixture(scope="module")
def model():
    return load(KVFormat.FP8)


@pytest.fixture
async def telling(model):
    """An engine whose pool holds six blocks, and a reader of its events."""
    engine = build(model, MemoryStore(), strategy="zero", num_blocks=6, prefill_chunk=128)
    config = PrefillConfig(**SETTINGS, kv_events="tcp://127.0.0.1:0", kv_events_replay="tcp://127.0.0.1:0")
    async with telling_kv_events(config, engine):
        reader = Reader(engine.kv_events)
        yield engine, reader
        reader.close()
    assert engine.kv_events is None
    await engine.close()


async def prefill(engine, tokens, tenant=""):
    computed = await run_prompt(engine, prompt_of(engine, tokens, tenant))
    engine.blocks.release(computed.sequence.block_table)


async def told(reader):
    await asyncio.sleep(0)
    return [event for _, (_, events, _) in await reader.again_from(0) for event in events]


def tokens_of(seed, num_blocks):
    return np.random.default_rng(seed).integers(0, 200, num_blocks * SIZE + 5).astype(np.uint32)


async def test_a_prompts_blocks_are_told_with_their_tokens(telling):
    engine, reader = telling
    tokens = tokens_of(1, 3)
    await prefill(engine, tokens)
    stored = [event for event in await told(reader) if event["type"] == "BlockStored"]
    names = [name for event in stored for name in event["block_hashes"]]
    assert names == prompt_of(engine, tokens).chain.hashes
    assert [token for event in stored for token in event["token_ids"]] == tokens[: 3 * SIZE].tolist()
    assert {event["block_size"] for event in stored} == {SIZE}
    assert {event["medium"] for event in stored} == {"GPU"}
    assert {event["locality"] for event in stored} == {"LOCAL"}
    parents = [event["parent_block_hash"] for event in stored]
    assert parents[0] is None
    assert all(parent in names for parent in parents[1:])


async def test_a_block_is_told_once_and_its_continuation_names_it(telling):
    engine, reader = telling
    tokens = tokens_of(1, 3)
    await prefill(engine, tokens[: 2 * SIZE + 1])
    await prefill(engine, tokens)
    names = [name for event in await told(reader) for name in event["block_hashes"]]
    assert names == prompt_of(engine, tokens).chain.hashes


async def test_what_is_told_and_not_taken_back_is_what_the_pool_has(telling):
    engine, reader = telling
    for seed in range(5):
        await prefill(engine, tokens_of(seed, 3))
    held = set()
    for event in await told(reader):
        if event["type"] == "BlockStored":
            held.update(event["block_hashes"])
        else:
            held.difference_update(event["block_hashes"])
    assert held == set(engine.blocks._by_hash)
    assert engine.blocks.num_evicted


async def test_a_block_that_comes_from_the_store_is_told_too(model):
    store = MemoryStore()
    first = build(model, store, strategy="full", num_blocks=8, prefill_chunk=128)
    await prefill(first, tokens_of(1, 3))
    engine = build(model, store, strategy="full", num_blocks=8, prefill_chunk=128)
    async with telling_kv_events(
        PrefillConfig(**SETTINGS, kv_events="tcp://127.0.0.1:0", kv_events_replay="tcp://127.0.0.1:0"), engine
    ):
        reader = Reader(engine.kv_events)
        await prefill(engine, tokens_of(1, 3))
        events = await told(reader)
        reader.close()
    assert [t for event in events for t in event["token_ids"]] == tokens_of(1, 3)[: 3 * SIZE].tolist()


async def test_tenants_blocks_are_told_apart(telling):
    engine, reader = telling
    tokens = tokens_of(1, 1)
    for tenant in ("", "alice", "bob"):
        await prefill(engine, tokens, tenant)
    salts = [event.get("extra_keys") for event in await told(reader)]
    assert salts == [None, [[engine.keyring.owner("alice").hex()]], [[engine.keyring.owner("bob").hex()]]]
    assert "alice" not in str(msgspec.to_builtins(salts))


async def test_nothing_is_told_by_default(model):
    engine = build(model, MemoryStore(), strategy="zero", num_blocks=6, prefill_chunk=128)
    async with telling_kv_events(PrefillConfig(**SETTINGS), engine):
        assert engine.kv_events is None


async def test_an_open_address_is_refused(model):
    engine = build(model, MemoryStore(), strategy="zero", num_blocks=6, prefill_chunk=128)
    with pytest.raises(ConfigError, match="token ids"):
        async with telling_kv_events(PrefillConfig(**SETTINGS, kv_events="tcp://0.0.0.0:0"), engine):
            pass
