"""Tenants with workers and a real store service: any name, rotating secrets, and forged records."""

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from antefix import rpc
from antefix.layout import KVFormat
from antefix.record import Record, RecordKind, RefusalReason
from antefix.secret import Keyring
from antefix.store.local_store import LocalStore
from antefix.store.remote_store import RemoteStore
from antefix.store_files.seal import Seals
from antefix.v1 import kvstore_pb2
from antefix.window_pool import StoreMemoryPool
from antefix_billing.api_keys import CONTROL
from antefix_decode.adopt import adopt, take_handoff
from antefix_kvstore.kvstore_config import KvStoreConfig
from antefix_kvstore.server import KvStoreServicer, register
from antefix_kvstore.storage_engine import StorageEngine
from antefix_prefill.leave_handoff import leave_handoff
from antefix_prefill.run_prompt import run_prompt
from antefix_router.front import cache_tenant
from tests.engines import MODEL, build, load, prompt_of
from tests.kvstore.small_store import BLOCK, FINGERPRINT, Prompt
from tests.slow_cases import slow_but

pytestmark = pytest.mark.slow

TOKENS = np.random.default_rng(5).integers(0, 256, 400)
WHOLE = 384
OLD, NEW = b"o" * 32, b"n" * 32
# All names that the HTTP API accepts: up to 512 bytes of Unicode without control characters.
names = st.text(st.characters(exclude_categories=("Cs",)), max_size=512).filter(
    lambda text: len(text.encode()) <= 512 and not CONTROL.search(text)
)
LONGEST = "\U0001f600" * 128
NAMES = [(LONGEST, LONGEST), ("a" * 45, ""), ("", "u" * 150), ("", "")]


class Service:
    """A store service that a test can restart."""

    def __init__(self, directory, **settings):
        self.config = KvStoreConfig(dir=str(directory), budget_bytes=64 << 20, **settings)

    async def start(self):
        self.servicer = KvStoreServicer(StorageEngine(self.config))
        self.server = await rpc.start_server(
            "127.0.0.1:0", lambda server: register(self.servicer, server), [kvstore_pb2.DESCRIPTOR]
        )

    async def stop(self):
        await self.server.drain(0.2)
        await self.servicer.close()

    @property
    def engine(self):
        return self.servicer.engine


@pytest.fixture
async def service(tmp_path):
    served = Service(tmp_path / "store")
    await served.start()
    yield served
    await served.stop()


@pytest.fixture(params=["local", "remote"])
async def worker(request, service, make_engine):
    """Makes a new worker with empty memory and the given secrets."""
    stores = []

    def make(keyring=None, *, strategy="boundary", **changes):
        keyring = keyring or Keyring(OLD)
        seals, address = Seals(keyring), service.server.address
        store = (
            LocalStore(service.config.dir, address, seals=seals)
            if request.param == "local"
            else RemoteStore(address, seals=seals)
        )
        stores.append(store)
        return dataclasses.replace(make_engine(strategy), store=store, keyring=keyring, **changes)

    yield make
    for store in stores:
        await store.close()


async def run(engine, tenant="", tokens=TOKENS):
    computed = await run_prompt(engine, prompt_of(engine, tokens, tenant))
    engine.blocks.release(computed.sequence.block_table)
    return computed


async def hit(engine, tenant="", tokens=TOKENS):
    return (await run(engine, tenant, tokens)).report.hit_tokens


@pytest.mark.parametrize(("tenant", "user"), slow_but(NAMES[:1], NAMES))
async def test_a_long_name_hits_after_a_restart_of_store_and_worker(worker, service, tenant, user):
    mine = cache_tenant(tenant, user)
    cold = await run(worker(), mine)
    assert (cold.report.hit_tokens, cold.report.written_tokens) == (0, WHOLE)
    await service.stop()
    await service.start()
    again = await run(worker(), mine)
    assert again.report.hit_tokens == WHOLE
    assert np.array_equal(again.logits, cold.logits)
    for other in (cache_tenant(tenant, user + "x"), cache_tenant(tenant + "x", user)):
        assert await hit(worker(), other) == 0


@pytest.mark.slow
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(one=st.tuples(names, names), other=st.tuples(names, names))
def test_any_names_that_the_door_takes_are_stored_found_again_and_apart(tmp_path_factory, one, other):
    """What workers put for each, through the store's files and a restart of it."""
    assume(one != other)
    keyring, tokens = Keyring(OLD), list(range(BLOCK * 2))
    engine = StorageEngine(KvStoreConfig(dir=str(tmp_path_factory.mktemp("names") / "store"), budget_bytes=4 << 20))
    tenants = [cache_tenant(*names) for names in (one, other)]
    prompts = [Prompt(tokens) for _ in tenants]
    try:
        for tenant, prompt in zip(tenants, prompts, strict=True):
            prompt.chain = type(prompt.chain)(FINGERPRINT, keyring.key(tenant), BLOCK)
            prompt.hashes = prompt.chain.extend(tokens)
            blocks = [prompt.block(i, tenant=keyring.owner(tenant)) for i in range(2)]
            assert not engine.put([Seals(keyring).seal(block) for block in blocks]).refused
        engine.close()
        engine = StorageEngine(engine.config)
        reader = type(engine.reader)(engine.config.dir, seals=Seals(keyring))
        for (tenant, prompt), (asked, _) in itertools.product(zip(tenants, prompts, strict=True), repeat=2):
            into = prompt.buffers()
            found = reader.read_blocks(prompt.hashes, into, fingerprint=FINGERPRINT, tenant=keyring.owner(asked))
            assert found.num_good == (2 if tenant == asked else 0)
        assert not set(prompts[0].hashes) & set(prompts[1].hashes)
        reader.close()
    finally:
        engine.close()


async def test_secrets_rotate_and_hits_go_on(worker, service):
    before, both, after = Keyring(OLD), Keyring(NEW, generation=2, older={1: OLD}), Keyring(NEW, generation=2)
    cold = await run(worker(before), "acme")
    assert await hit(worker(after), "stranger") == 0
    rotated = await run(worker(both), "acme")
    assert (rotated.report.hit_tokens, rotated.report.plan) == (WHOLE, "checkpoint")
    assert np.array_equal(rotated.logits, cold.logits)
    # Used records were written again under the new secret. The old secret is no longer needed, and its records expire.
    assert await hit(worker(after), "acme") == WHOLE
    with service.engine.index.txn() as txn:
        owners = set(service.engine.index.owners(txn).values())
    assert {b"o" + both.owner("acme", generation) for generation in (1, 2)} <= owners


async def test_a_prefix_under_the_new_secret_goes_on_under_the_old_one(worker):
    both = Keyring(NEW, generation=2, older={1: OLD})
    cold = await run(worker(Keyring(OLD)), "acme")
    await run(worker(Keyring(NEW, generation=2)), "acme", TOKENS[:200])
    engine = worker(both)
    rotated = await run(engine, "acme")
    assert rotated.report.hit_tokens == WHOLE and rotated.report.written_tokens == WHOLE - 192
    assert np.array_equal(rotated.logits, cold.logits)


async def test_an_older_record_that_is_gone_meanwhile_makes_the_hit_shorter(worker, service):
    both = Keyring(NEW, generation=2, older={1: OLD})
    cold = await run(worker(Keyring(OLD)), "acme")
    engine = worker(both)
    chain = engine.chain("acme", 1)
    chain.extend(TOKENS)
    service.engine.quarantine((RecordKind.BLOCK, chain.hashes[3]), judge=False)
    rotated = await run(engine, "acme")
    assert rotated.report.hit_tokens < WHOLE and np.array_equal(rotated.logits, cold.logits)
    assert await hit(worker(Keyring(NEW, generation=2)), "acme") == WHOLE


async def test_a_forged_block_is_computed_again_and_replaced(worker, service):
    """The attack: somebody puts zeros with right checksums into the store, under the name of a tenant's block."""
    cold = await run(worker(), "acme")
    engine = worker()
    prompt = prompt_of(engine, TOKENS, "acme")
    service.engine.evict([(RecordKind.BLOCK, prompt.chain.hashes[2])])
    forged = Record(
        kind=RecordKind.BLOCK,
        hash=prompt.chain.hashes[2],
        parent=prompt.chain.parent(2),
        fingerprint=engine.fingerprint,
        position=3 * engine.block_size,
        payload=bytes(engine.layout.block_bytes),
        tenant=engine.keyring.owner("acme"),
    )
    await service_put(service, forged)
    again = await run(engine, "acme")
    assert np.array_equal(again.logits, cold.logits)
    assert again.report.hit_tokens == 2 * engine.block_size and again.report.miss_reason == "corrupt"
    assert service.engine.counters.forged == 1
    assert await hit(worker(), "acme") == WHOLE


async def service_put(service, record):
    client = RemoteStore(service.server.address)
    assert (await client.put([record])).num_stored == 1
    await client.close()


async def test_a_forged_handoff_is_not_taken(worker, service):
    engine = worker()
    computed = await run_prompt(engine, prompt_of(engine, TOKENS, "acme"))
    name = await leave_handoff(engine, computed)
    engine.blocks.release(computed.sequence.block_table)
    handoff = await take_handoff(engine, computed.prompt, name)
    adopted = await adopt(engine, computed.prompt, handoff)
    assert np.array_equal(adopted.logits, computed.logits)
    engine.blocks.release(adopted.sequence.block_table)
    kept = service.servicer.pool._kept[RecordKind.HANDOFF, name]
    forged = dataclasses.replace(kept, payload=kept.payload[:64] + bytes(len(kept.payload) - 64))
    service.servicer.pool._kept[RecordKind.HANDOFF, name] = forged
    assert await take_handoff(engine, computed.prompt, name) is None


async def test_pooled_checkpoints_are_sealed_and_resumed_from(worker, service):
    engine = worker(strategy="auto(ends=pool)")
    engine.window_pool = StoreMemoryPool(engine.store)
    await hit(engine, "acme")
    assert service.servicer.pool.count(RecordKind.POOLED)[0] > 0
    assert service.servicer.pool.count(RecordKind.HANDOFF) == (0, 0)
    second = worker(strategy="auto(ends=pool)")
    second.window_pool = StoreMemoryPool(second.store)
    report = (await run(second, "acme")).report
    assert (report.plan, report.hit_tokens) == ("checkpoint", WHOLE)


async def test_a_machine_with_other_arithmetic_says_so(worker):
    def of(arithmetic):
        engine = worker()
        made = engine.identity.fingerprint(engine.layout.kv_format, arithmetic=arithmetic)
        return dataclasses.replace(engine, fingerprint=made.digest, statement=made.statement)

    one, other = of("cpu-float32-1111"), of("cpu-float32-2222")
    for engine in (one, other):
        await engine.register()
    await run(one, "acme")
    report = (await run(other, "acme")).report
    assert (report.hit_tokens, report.miss_reason) == (0, "arithmetic_differs")
    assert (await run(of("cpu-float32-1111"), "acme")).report.hit_tokens == WHOLE


@pytest.mark.parametrize(
    ("settings", "reason"),
    [({"tenant_quota_bytes": 1}, RefusalReason.QUOTA), ({"segment_bytes": 64 << 10}, RefusalReason.INVALID)],
    ids=["quota", "too large"],
)
async def test_a_write_that_cannot_succeed_is_counted_by_reason(tmp_path, settings, reason):
    service = Service(tmp_path / "store", **settings)
    await service.start()
    store = RemoteStore(service.server.address)
    # Of the shipped model's records only checkpoints are too large for such a store.
    engine = build(load(KVFormat.FP8, MODEL), store, strategy="boundary", num_blocks=16, prefill_chunk=256, path=MODEL)
    try:
        report = (await run(engine, "acme")).report
        assert report.written_tokens == (0 if reason is RefusalReason.QUOTA else WHOLE)
        counters = engine.counters
        assert counters.refused_by_reason[reason] > 0 and counters.last_refusal
    finally:
        engine.compute.close()
        await store.close()
        await service.stop()
