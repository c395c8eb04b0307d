"""Several stores with their own certificates: a grant is valid at all of them, and only for its tenant."""

from __future__ import annotations

import pytest

from antefix import rpc
from antefix.errors import PermissionDenied
from antefix.record import RecordKind
from antefix.security import grants
from antefix.store.many_stores import ManyStores
from antefix.store.remote_store import RemoteStore
from antefix.store.store_members import Member
from antefix.store.tier import Tier
from antefix.tier_kind import TierKind
from antefix.v1 import kvstore_pb2
from antefix_kvstore.kvstore_config import KvStoreConfig
from antefix_kvstore.server import KvStoreServicer, register
from antefix_kvstore.storage_engine import StorageEngine
from tests.kvstore.small_store import BLOCK, FINGERPRINT
from tests.security.test_store_grants import ALICE, MALLORY, PROMPT, with_grant


@pytest.fixture
async def many(authority, tmp_path):
    """A worker's view of two stores; the first has half of Alice's prompt, the second the rest."""
    servers, members = [], []
    for name, blocks in (("a", range(3)), ("b", range(3, 6))):
        engine = StorageEngine(KvStoreConfig(dir=str(tmp_path / name), budget_bytes=64 << 20))
        engine.register(FINGERPRINT, BLOCK, {})
        engine.put([PROMPT.block(index, tenant=ALICE, parent_elsewhere=True) for index in blocks])
        servicer = KvStoreServicer(engine)
        server = await rpc.start_server(
            "127.0.0.1:0",
            lambda target, servicer=servicer: register(servicer, target),
            [kvstore_pb2.DESCRIPTOR],
            security=authority.security("kvstore"),
        )
        servers.append((server, servicer))
        store = RemoteStore(server.address, credentials=authority.credentials("prefill", "worker"))
        members.append(Member(tier=Tier(name, TierKind.PEER, store), store=store, near=name == "a"))
    yield ManyStores(members)
    grants.hold(b"")
    for member in members:
        await member.store.close()
    for server, servicer in servers:
        await server.drain(0)
        await servicer.close()


async def test_a_grant_holds_at_each_store(authority, many):
    with_grant(authority, ALICE)
    assert (await many.lookup(PROMPT.hashes, fingerprint=FINGERPRINT, tenant=ALICE)).num_blocks == 6
    into = PROMPT.buffers()
    assert await many.get_blocks(PROMPT.hashes, into, fingerprint=FINGERPRINT, tenant=ALICE) == 6
    assert [bytes(each) for each in into] == [PROMPT.payload(index) for index in range(6)]


async def test_another_tenant_gets_nothing_and_takes_no_store_from_others(authority, many):
    with_grant(authority, MALLORY)
    with pytest.raises(PermissionDenied):
        await many.lookup(PROMPT.hashes, fingerprint=FINGERPRINT, tenant=ALICE)
    assert (await many.lookup(PROMPT.hashes, fingerprint=FINGERPRINT, tenant=MALLORY)).num_blocks == 0
    assert await many.get_blocks(PROMPT.hashes, PROMPT.buffers(), fingerprint=FINGERPRINT, tenant=MALLORY) == 0
    with pytest.raises(PermissionDenied):
        await many.evict([(RecordKind.BLOCK, PROMPT.hashes[0])], owner=ALICE)
    grants.hold(b"")
    with pytest.raises(PermissionDenied):
        await many.lookup(PROMPT.hashes, fingerprint=FINGERPRINT)
    assert not any(tier.is_shunned for tier in many.tiers)
    with_grant(authority, ALICE)
    assert (await many.lookup(PROMPT.hashes, fingerprint=FINGERPRINT, tenant=ALICE)).num_blocks == 6
