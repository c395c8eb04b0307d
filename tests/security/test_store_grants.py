"""A tenant's records in the store can be reached only with a worker's certificate and the tenant's grant."""

import time
from types import SimpleNamespace

import grpc
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from antefix import rpc
from antefix.block import as_tokens
from antefix.errors import InvalidRequest, PermissionDenied
from antefix.miss_reason import MissReason
from antefix.record import Record, RecordKind
from antefix.secret import Keyring
from antefix.security import credential_files, grants
from antefix.security.certificates import issue, make_ca
from antefix.security.credential_files import CredentialFiles
from antefix.security.grants import Grant, GrantCheck, Granter, fits_prompt, prompt_root, public_keys, secret_keys
from antefix.security.identity import Role
from antefix.security.process_security import ProcessSecurity
from antefix.store.remote_store import RemoteStore
from antefix.v1 import kvstore_pb2, kvstore_pb2_grpc
from antefix_kvstore.kvstore_config import KvStoreConfig
from antefix_kvstore.server import KvStoreServicer, register
from antefix_kvstore.storage_engine import StorageEngine
from tests.kvstore.small_store import BLOCK, FINGERPRINT, Prompt, owner
from tests.waiting import AT_MOST_S

ALICE, MALLORY = owner("alice"), owner("mallory")
PROMPT = Prompt(list(range(BLOCK * 6)))
ROOT = bytes(32)
HANDOFF = b"h" * 32
BLOCKS = [(RecordKind.BLOCK, name) for name in PROMPT.hashes]


@pytest.fixture
async def server(authority, tmp_path):
    """A real store over TLS, with Alice's blocks, a checkpoint and a handoff."""
    servicer = KvStoreServicer(StorageEngine(KvStoreConfig(dir=str(tmp_path / "store"), budget_bytes=64 << 20)))
    server = await rpc.start_server(
        "127.0.0.1:0",
        lambda target: register(servicer, target),
        [kvstore_pb2.DESCRIPTOR],
        security=authority.security("kvstore"),
    )
    store = RemoteStore(server.address, credentials=authority.credentials("prefill", "alices"))
    with_grant(authority, ALICE)
    handoff = PROMPT.block(5, kind=RecordKind.HANDOFF, hash=HANDOFF, tenant=ALICE)
    records = [PROMPT.block(i, tenant=ALICE) for i in range(6)]
    done = await store.put([*records, PROMPT.checkpoint(3, tenant=ALICE), handoff])
    assert done.num_stored == 8 and not done.refused
    grants.hold(b"")
    await store.close()
    served = SimpleNamespace(address=server.address, servicer=servicer)
    yield served
    await server.drain(0)
    await servicer.close()


@pytest.fixture
async def thief(authority, server):
    """A raw client with a stolen worker certificate."""
    store = RemoteStore(server.address, credentials=authority.credentials("prefill", "stolen"))
    yield store
    grants.hold(b"")
    await store.close()


def with_grant(authority, *owners, ttl_s=60.0):
    grants.hold(authority.granter().grant(owners, ROOT, ttl_s=ttl_s))


async def everything(store):
    """What a client gets of Alice's records by look-up, read and explain."""
    found = await store.lookup(PROMPT.hashes, fingerprint=FINGERPRINT)
    blocks = PROMPT.buffers()
    num_read = await store.get_blocks(PROMPT.hashes, blocks, fingerprint=FINGERPRINT)
    assert all(bytes(blocks[i]) == PROMPT.payload(i) for i in range(num_read))
    checkpoint = await store.get(RecordKind.CHECKPOINT, PROMPT.hashes[3], fingerprint=FINGERPRINT)
    handoff = await store.get(RecordKind.HANDOFF, HANDOFF, fingerprint=FINGERPRINT)
    fate = await store.fate(PROMPT.hashes[0], fingerprint=FINGERPRINT)
    return found.num_blocks, found.checkpoints, num_read, checkpoint, handoff, fate.reason


async def test_with_the_tenants_grant_all_of_its_records_are_there(authority, thief):
    with_grant(authority, ALICE)
    num_found, checkpoints, num_read, checkpoint, handoff, reason = await everything(thief)
    assert (num_found, checkpoints, num_read, reason) == (6, (4,), 6, MissReason.NONE)
    assert checkpoint == PROMPT.payload(3, RecordKind.CHECKPOINT)
    assert handoff == PROMPT.payload(5)


async def test_with_another_tenants_grant_there_is_nothing(authority, thief):
    with_grant(authority, MALLORY)
    assert await everything(thief) == (0, (), 0, None, None, MissReason.FIRST_SEEN)


CALLS = {
    "look up": lambda s: s.lookup(PROMPT.hashes, fingerprint=FINGERPRINT, tenant=ALICE),
    "read": lambda s: s.get_blocks(PROMPT.hashes, PROMPT.buffers(), fingerprint=FINGERPRINT),
    "read a checkpoint": lambda s: s.get(RecordKind.CHECKPOINT, PROMPT.hashes[3], fingerprint=FINGERPRINT),
    "take a handoff": lambda s: s.get(RecordKind.HANDOFF, HANDOFF, fingerprint=FINGERPRINT),
    "explain": lambda s: s.fate(PROMPT.hashes[0], fingerprint=FINGERPRINT),
    "write": lambda s: s.put([Prompt([9] * BLOCK).block(0, tenant=ALICE)]),
    "call forged": lambda s: forge(s),
    "pin": lambda s: s.pin(BLOCKS, duration_s=3600, owner=ALICE),
    "evict": lambda s: s.evict(BLOCKS, owner=ALICE),
}


async def forge(store):
    with rpc.rpc_errors():
        name = kvstore_pb2.RecordName(kind=RecordKind.BLOCK.value, hash=PROMPT.hashes[0])
        await store.stub.Touch(kvstore_pb2.TouchRequest(forged=[name]), timeout=AT_MOST_S)


@pytest.mark.parametrize("what", CALLS)
async def test_a_stolen_certificate_without_a_grant_does_nothing(authority, thief, what):
    with pytest.raises(PermissionDenied):
        await CALLS[what](thief)
    with_grant(authority, ALICE)
    assert (await everything(thief))[0] == 6


@pytest.mark.parametrize("what", ["look up", "write", "pin", "evict"])
async def test_naming_another_tenant_than_the_grants_is_refused(authority, thief, what):
    with_grant(authority, MALLORY)
    with pytest.raises(PermissionDenied):
        await CALLS[what](thief)
    with_grant(authority, ALICE)
    assert (await everything(thief))[0] == 6


@pytest.mark.parametrize("role", ["router", "operator"])
@pytest.mark.parametrize("what", ["pin", "evict"])
async def test_who_may_pin_and_evict_does_it_with_the_grant_of_the_owner(authority, server, role, what):
    store = RemoteStore(server.address, credentials=authority.credentials(role))
    with_grant(authority, MALLORY)
    with pytest.raises(PermissionDenied):
        await CALLS[what](store)
    # A grant in the thief's own name gives no access to Alice's records.
    if what == "pin":
        assert await store.pin(BLOCKS, duration_s=9, owner=MALLORY) == 0
    else:
        assert await store.evict(BLOCKS, owner=MALLORY) == 0
    with_grant(authority, ALICE)
    # The checkpoint depends on a block and is removed with it.
    assert await CALLS[what](store) == (6 if what == "pin" else 7)
    await store.close()


async def test_anothers_records_are_neither_called_forged_nor_replaced(authority, thief):
    with_grant(authority, MALLORY)
    await forge(thief)
    stolen = PROMPT.block(5, kind=RecordKind.HANDOFF, hash=HANDOFF, tenant=MALLORY, payload=b"mine")
    assert (await thief.put([stolen])).refused
    block = PROMPT.block(0, tenant=MALLORY, payload=b"x" * 300)
    assert (await thief.put([block])).num_existing == 1
    with_grant(authority, ALICE)
    assert (await everything(thief))[3:5] == (PROMPT.payload(3, RecordKind.CHECKPOINT), PROMPT.payload(5))
    assert (await everything(thief))[2] == 6


async def test_what_is_registered_for_all_tenants_stays(authority, server, thief):
    """A wrong layout would switch off compression for all tenants."""
    request = kvstore_pb2.RegisterRequest(fingerprint=FINGERPRINT, block_size=BLOCK)
    await thief.stub.Register(request, timeout=AT_MOST_S)
    request.block_size = 7
    request.parts.add(num_rows=1).fields.add(nbytes=3, width=1)
    with pytest.raises(grpc.aio.AioRpcError, match=r"blocks have 7 tokens, but the KV .* has blocks of 8:"):
        await thief.stub.Register(request, timeout=AT_MOST_S)
    index = server.servicer.engine.index
    with index.txn() as txn:
        assert index.block_tokens(txn, FINGERPRINT) == BLOCK
        assert not [key for key, _ in txn.cursor(db=index.db["meta"]) if FINGERPRINT in bytes(key)]


async def test_a_worker_cannot_pin_evict_or_watch_even_with_a_grant(authority, thief):
    with_grant(authority, ALICE)
    for call in (CALLS["pin"], CALLS["evict"], lambda s: anext(s.watch())):
        with pytest.raises(PermissionDenied, match="prefill stolen may not call"):
            await call(thief)


async def test_nobody_reads_with_a_tenants_or_front_ends_certificate(authority, server):
    with_grant(authority, ALICE)
    for role in ("tenant", "frontend", "metrics", "kvstore"):
        store = RemoteStore(server.address, credentials=authority.credentials(role, "mallory"))
        for what in ("look up", "read", "write", "pin", "evict"):
            with pytest.raises(PermissionDenied):
                await CALLS[what](store)
        await store.close()


# --- grants themselves -----------------------------------------------------------------------------------------------


def signed(authority, **changes):
    fields = {"owners": (ALICE,), "prompt": ROOT, "expires_ms": round(1000 * (time.time() + 60)), **changes}
    return authority.granter().sign(Grant(**fields))


@pytest.mark.parametrize("position", [0, 3, 12, 20, 49, 55, -1])
async def test_a_changed_grant_is_refused(authority, thief, position):
    grant = bytearray(signed(authority))
    grant[position] ^= 1
    grants.hold(bytes(grant))
    with pytest.raises(PermissionDenied):
        await CALLS["look up"](thief)


@pytest.mark.parametrize("grant", [b"x", b"", b"\x01" * 49, b"\x01" * 5000])
def test_what_is_no_grant_is_refused_in_words(authority, grant):
    check = GrantCheck(lambda: public_keys((authority.ca / "grant.pub").read_bytes()))
    with pytest.raises(PermissionDenied):
        check.check(grant)


async def test_a_grant_that_has_expired_is_replayed_in_vain(authority, thief, monkeypatch):
    grants.hold(signed(authority))
    assert (await CALLS["look up"](thief)).num_blocks == 6
    later = time.time() + 61
    monkeypatch.setattr("antefix.security.grants.time.time", lambda: later)
    with pytest.raises(PermissionDenied, match="expired"):
        await CALLS["look up"](thief)


async def test_a_rogue_routers_grant_is_worth_nothing(thief, keyring):
    """The rogue router signs with its own key, or with the deployment's secret although certificates are required."""
    for rogue in (Granter(Ed25519PrivateKey.generate()), Granter.from_secret(keyring)):
        grants.hold(rogue.grant([ALICE], ROOT, ttl_s=60))
        with pytest.raises(PermissionDenied, match="not signed by a router"):
            await CALLS["look up"](thief)


async def test_a_tls_grant_is_not_taken_off_a_plain_connection(keyring, tmp_path):
    """Without TLS the secret proves the caller and signs grants. The same rules apply."""
    servicer = KvStoreServicer(StorageEngine(KvStoreConfig(dir=str(tmp_path / "store"), budget_bytes=64 << 20)))
    security = ProcessSecurity(Role.KVSTORE, keyring=keyring)
    server = await rpc.start_server(
        "127.0.0.1:0", lambda target: register(servicer, target), [kvstore_pb2.DESCRIPTOR], security=security
    )
    worker = RemoteStore(server.address, credentials=ProcessSecurity(Role.PREFILL, keyring=keyring).credentials)
    other_secret = ProcessSecurity(Role.PREFILL, keyring=Keyring(b"another deployment's secret.....")).credentials
    for store in (RemoteStore(server.address), RemoteStore(server.address, credentials=other_secret), worker):
        with pytest.raises(rpc.errors.AntefixError) as caught:
            await CALLS["look up"](store)
        assert isinstance(caught.value, PermissionDenied if store is worker else rpc.errors.Unauthenticated)
    grants.hold(Granter.from_secret(keyring).grant([ALICE], ROOT, ttl_s=60))
    assert (await CALLS["look up"](worker)).num_blocks == 0
    grants.hold(b"")
    await server.drain(0)
    await servicer.close()


async def test_a_service_token_is_good_for_its_method_and_a_minute(keyring, serve, monkeypatch):
    server = await serve(ProcessSecurity(Role.KVSTORE, keyring=keyring))
    credentials = ProcessSecurity(Role.ROUTER, keyring=keyring).credentials
    stats, watch = "/antefix.v1.KvStoreService/Stats", "/antefix.v1.KvStoreService/Watch"
    taken = credentials.metadata(stats)
    async with grpc.aio.insecure_channel(server.address) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await channel.unary_unary(stats)(b"", timeout=AT_MOST_S, metadata=taken)
        assert caught.value.code() is grpc.StatusCode.INTERNAL, "let through, to a servicer that does nothing"
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await channel.unary_stream(watch)(b"", timeout=AT_MOST_S, metadata=taken).read()
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
        later = time.time() + 61
        monkeypatch.setattr("antefix.security.service_tokens.time.time", lambda: later)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await channel.unary_unary(stats)(b"", timeout=AT_MOST_S, metadata=taken)
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
        assert "61" not in caught.value.details()


def test_a_key_that_was_taken_away_signs_nothing_more():
    """Earlier grants become invalid too, even if they were already verified."""
    old, new = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
    believed = [(old.public_key(), new.public_key())]
    check = GrantCheck(lambda: believed[0])
    grant = Granter(old).grant([ALICE], ROOT, ttl_s=60)
    assert check.check(grant).owners == (ALICE,)
    believed[0] = (new.public_key(),)
    with pytest.raises(PermissionDenied, match="not signed by a router"):
        check.check(grant)
    assert check.check(Granter(new).grant([ALICE], ROOT, ttl_s=60)).owners == (ALICE,)


def test_new_grant_keys_are_taken_over(tmp_path, monkeypatch):
    monkeypatch.setattr(credential_files, "_LOOK_EVERY_S", 0.0)
    for ca in ("one", "two"):
        make_ca(tmp_path / ca)
    for role, name in ((Role.KVSTORE, "s"), (Role.ROUTER, "r")):
        issue(tmp_path / "one", tmp_path / name, role, name)
    store = ProcessSecurity(Role.KVSTORE, files=CredentialFiles(tmp_path / "s"))
    router = ProcessSecurity(Role.ROUTER, files=CredentialFiles(tmp_path / "r"))
    before = router.granter().grant([ALICE], ROOT, ttl_s=60)
    assert store.grant_check.check(before)
    # 1. Both keys are trusted.  2. The router signs with the new key.  3. The old key is no longer trusted.
    keys = [(tmp_path / ca / "grant.pub").read_bytes() for ca in ("one", "two")]
    (tmp_path / "s" / "grant.pub").write_bytes(b"".join(keys))
    (tmp_path / "r" / "grant.key").write_bytes((tmp_path / "two" / "grant.key").read_bytes())
    after = router.granter().grant([ALICE], ROOT, ttl_s=60)
    assert store.grant_check.check(before) and store.grant_check.check(after)
    (tmp_path / "s" / "grant.pub").write_bytes(keys[1])
    assert store.grant_check.check(after)
    with pytest.raises(PermissionDenied):
        store.grant_check.check(before)


def test_a_grant_is_for_one_prompt_under_whichever_secret():
    old, new = Keyring(b"old" * 8), Keyring(b"new" * 8, generation=2, older={1: b"old" * 8})
    tokens = as_tokens(range(300))
    for router, worker in ((old, old), (old, new), (new, new)):
        grant = Grant(owners=(ALICE,), prompt=prompt_root(router, tokens), expires_ms=0)
        assert fits_prompt(worker, grant, tokens)
        assert fits_prompt(worker, grant, tokens[:128])
        assert not fits_prompt(worker, grant, tokens[1:])
    assert len(secret_keys(new)) == 2


async def test_raw_calls_that_make_no_sense_are_refused_too(authority, server):
    """A record of version 1 has its tenant's name in plain text. No grant is valid for such a name."""
    with_grant(authority, ALICE)
    old = Prompt([5] * BLOCK, version=1).block(0, tenant=b"alice")
    store = RemoteStore(server.address, credentials=authority.credentials("prefill", "stolen"))
    with pytest.raises((PermissionDenied, InvalidRequest)):
        await store.put([old])
    operator = rpc.channel(server.address, of=Role.KVSTORE, credentials=authority.credentials("operator"))
    with pytest.raises(PermissionDenied), rpc.rpc_errors():
        request = kvstore_pb2.EvictRequest(tenant="alice", records=[])
        await kvstore_pb2_grpc.KvStoreServiceStub(operator).Evict(request, timeout=AT_MOST_S)
    assert isinstance(old, Record)
    await operator.close()
    await store.close()
