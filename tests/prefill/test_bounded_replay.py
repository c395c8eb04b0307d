"""Bounded replay is approximate and opt-in, and exact namespaces never see its results."""

import dataclasses

import numpy as np
import pytest

from antefix.block import exactness_of
from antefix.record import Record, RecordKind
from antefix.window import PlanKind
from antefix_kvstore.kvstore_config import KvStoreConfig
from antefix_kvstore.storage_engine import StorageEngine
from antefix_prefill.run_prompt import run_prompt

RNG = np.random.default_rng(11)
DOCUMENT = RNG.integers(0, 256, 900)
LONGER = np.concatenate((DOCUMENT, RNG.integers(0, 256, 70)))


@pytest.fixture
def make_bounded(make_engine):
    def make(windows=1, **kwargs):
        engine = make_engine("zero", **kwargs)
        exactness = exactness_of(windows)
        engine.bounded_windows = windows
        engine.fingerprint = engine.identity.fingerprint(engine.layout.kv_format, exactness=exactness).digest
        return engine

    return make


async def answer(engine, prompt):
    computed = await run_prompt(engine, prompt)
    engine.blocks.release(computed.sequence.block_table)
    return computed


@pytest.mark.slow
async def test_a_bounded_namespace_replays_k_windows(make_bounded, make_prompt):
    engine = make_bounded(1)
    await answer(engine, make_prompt(engine, DOCUMENT))
    other = make_bounded(1)
    hit = await answer(other, make_prompt(other, LONGER))
    assert (hit.report.plan, hit.report.replayed_tokens, hit.report.hit_tokens) == ("bounded-1", 64, 896)


@pytest.mark.slow
async def test_it_is_approximate_and_more_windows_come_closer(make_bounded, make_engine, make_prompt):
    cold_engine = make_engine("zero")
    cold = (await answer(cold_engine, make_prompt(cold_engine, LONGER))).logits
    errors = []
    for windows in (1, 3, 7):
        engine = make_bounded(windows)
        await answer(engine, make_prompt(engine, DOCUMENT))
        other = make_bounded(windows)
        hit = await answer(other, make_prompt(other, LONGER))
        errors.append(float(np.abs(hit.logits - cold).max() / np.abs(cold).max()))
    # 7 windows have as many tokens as an exact replay of the shipped model's 7 layers.
    assert errors[0] > errors[2] == 0.0 and errors[0] >= errors[1]


@pytest.mark.slow
async def test_an_exact_namespace_finds_nothing_of_the_same_tokens(make_bounded, make_engine, make_prompt, store):
    engine = make_bounded(1)
    await answer(engine, make_prompt(engine, DOCUMENT))
    assert store.records
    for exact in (make_engine("zero"), make_bounded(2)):
        prompt = make_prompt(exact, LONGER)
        assert not any((RecordKind.BLOCK, name) in store.records for name in prompt.chain.hashes)
        assert (await answer(exact, prompt)).report.hit_tokens == 0


def test_names_differ_from_the_first_block_on(make_bounded, make_engine, make_prompt):
    chains = [make_prompt(e, DOCUMENT).chain for e in (make_engine("zero"), make_bounded(1), make_bounded(2))]
    assert len({chain.root for chain in chains}) == 3
    assert not set(chains[0].hashes) & set(chains[1].hashes)


@pytest.fixture
def disk(tmp_path):
    engine = StorageEngine(KvStoreConfig(dir=str(tmp_path / "store"), budget_bytes=64 << 20, compression="off"))
    yield engine
    engine.close()


def block(chain, index, fingerprint, payload):
    return Record(
        kind=RecordKind.BLOCK, hash=chain.hashes[index], parent=chain.parent(index), fingerprint=fingerprint,
        position=(index + 1) * chain.block_size, payload=payload,
    )  # fmt: skip


def test_a_record_copied_under_an_exact_name_is_not_served(make_bounded, make_engine, make_prompt, disk):
    """The attack: an approximate record is put under the exact chain's hashes. Its fingerprint still reveals it."""
    exact, bounded = make_engine("zero"), make_bounded(1)
    exact_chain, bounded_chain = (make_prompt(engine, DOCUMENT).chain for engine in (exact, bounded))
    payload = bytes(range(256)) * (exact.layout.block_bytes // 256 + 1)
    payload = payload[: exact.layout.block_bytes]
    disk.put([block(bounded_chain, 0, bounded.fingerprint, payload)])
    forged = dataclasses.replace(block(exact_chain, 0, bounded.fingerprint, payload))
    disk.put([forged])
    assert disk.lookup(exact_chain.hashes, fingerprint=exact.fingerprint).num_blocks == 0
    row = memoryview(bytearray(len(payload)))
    assert disk.read_blocks(exact_chain.hashes[:1], [row], fingerprint=exact.fingerprint).num_good == 0
    assert disk.lookup(bounded_chain.hashes, fingerprint=bounded.fingerprint).num_blocks == 1


def test_bytes_copied_over_an_exact_record_are_not_served(make_bounded, make_engine, make_prompt, disk, tmp_path):
    """The attack: in the file, the approximate record's bytes overwrite the exact record, including the header."""
    exact, bounded = make_engine("zero"), make_bounded(1)
    exact_chain, bounded_chain = (make_prompt(engine, DOCUMENT).chain for engine in (exact, bounded))
    size = exact.layout.block_bytes
    disk.put([block(exact_chain, 0, exact.fingerprint, bytes(size))])
    disk.put([block(bounded_chain, 0, bounded.fingerprint, b"\x01" * size)])
    segment = next((tmp_path / "store").rglob("*.seg*"))
    data = bytearray(segment.read_bytes())
    exact_at, bounded_at = (data.find(chain.hashes[0]) for chain in (exact_chain, bounded_chain))
    assert 0 < exact_at < bounded_at
    span = bounded_at - exact_at
    data[exact_at - 64 : exact_at - 64 + span] = data[bounded_at - 64 : bounded_at - 64 + span]
    segment.write_bytes(bytes(data))
    row = memoryview(bytearray(size))
    assert disk.read_blocks(exact_chain.hashes[:1], [row], fingerprint=exact.fingerprint).num_good == 0


async def test_an_exact_engine_refuses_a_bounded_plan(make_engine, make_prompt, monkeypatch):
    """If a planner ever asks for a bounded plan, the worker stops. Otherwise the result would get an exact name."""
    engine = make_engine("zero")
    await answer(engine, make_prompt(engine, DOCUMENT))
    other = make_engine("zero")
    plain = other.planner.plan

    def bounded(stored):
        decision = plain(stored)
        plan = next(plan for plan in decision.plans if plan.kind is PlanKind.REPLAY)
        return dataclasses.replace(decision, plan=dataclasses.replace(plan, kind=PlanKind.BOUNDED))

    monkeypatch.setattr(other.planner, "plan", bounded)
    with pytest.raises(AssertionError):
        await answer(other, make_prompt(other, LONGER))
    assert other.blocks.num_available == other.pool.num_blocks
