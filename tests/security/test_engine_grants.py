"""An engine at the store: what its certificate and its tenant's lasting grant allow, and what they do not."""

import json
import time

import pytest

from antefix import rpc
from antefix.block import as_tokens
from antefix.errors import ConfigError, PermissionDenied
from antefix.secret import create_secret_file
from antefix.security import certificates, credential_files, grants
from antefix.security.certificates import TENANT_GRANT, write_lasting_grant
from antefix.security.credentials import Credentials
from antefix.security.grants import GrantCheck, fits_prompt, public_keys
from antefix.security.identity import Role
from antefix.store.remote_store import RemoteStore
from antefix.v1 import kvstore_pb2
from antefix_console.cli import main
from antefix_engines.engine_store import EngineStore, StoreSettings
from antefix_kvstore.kvstore_config import KvStoreConfig
from antefix_kvstore.server import KvStoreServicer, register
from antefix_kvstore.storage_engine import StorageEngine
from tests.kvstore.small_store import BLOCK, FINGERPRINT, Prompt

PROMPT = Prompt(list(range(BLOCK * 2)))


@pytest.fixture
async def server(authority, tmp_path):
    servicer = KvStoreServicer(StorageEngine(KvStoreConfig(dir=str(tmp_path / "store"), budget_bytes=64 << 20)))
    server = await rpc.start_server(
        "127.0.0.1:0",
        lambda target: register(servicer, target),
        [kvstore_pb2.DESCRIPTOR],
        security=authority.security("kvstore"),
    )
    yield server
    await server.drain(0)
    await servicer.close()


@pytest.fixture
def engine(authority, keyring):
    """`engine(tenant)`: the credentials of an engine that works for that tenant."""

    def engine(tenant, *, days=9):
        directory = authority.files("engine", f"of-{tenant}").directory
        write_lasting_grant(authority.ca, directory, keyring, tenant, days=days)
        return Credentials(Role.ENGINE, files=credential_files.CredentialFiles(directory), keyring=keyring)

    yield engine
    grants.hold(b"")


async def test_an_engine_does_all_that_it_needs_for_its_tenant(server, engine, keyring):
    credentials, owner = engine("acme"), keyring.owner("acme")
    store = RemoteStore(server.address, credentials=credentials)
    grants.hold(credentials.grant_for("acme", as_tokens([]), ttl_s=1))
    assert (await store.put([PROMPT.block(i, tenant=owner) for i in range(2)])).num_stored == 2
    found = await store.lookup(PROMPT.hashes, fingerprint=FINGERPRINT, tenant=owner)
    buffers = PROMPT.buffers()
    assert found.num_blocks == 2
    assert await store.get_blocks(PROMPT.hashes, buffers, fingerprint=FINGERPRINT, tenant=owner) == 2
    names = [(record.kind, record.hash) for record in (PROMPT.block(i) for i in range(2))]
    assert await store.pin(names, duration_s=9, owner=owner) == 2
    assert await store.pin(names, duration_s=0, owner=owner) == 2
    assert await store.evict(names[1:], owner=owner) == 1
    await store.close()


async def test_an_engine_reaches_no_other_tenant(server, engine, keyring):
    owner, other = keyring.owner("acme"), engine("globex")
    store = RemoteStore(server.address, credentials=other)
    mine = engine("acme")
    grants.hold(mine.grant_for("acme", as_tokens([]), ttl_s=1))
    await RemoteStore(server.address, credentials=mine).put([PROMPT.block(i, tenant=owner) for i in range(2)])
    grants.hold(other.grant_for("globex", as_tokens([]), ttl_s=1))
    names = [(PROMPT.block(0).kind, PROMPT.hashes[0])]
    for call in (
        lambda: store.lookup(PROMPT.hashes, fingerprint=FINGERPRINT, tenant=owner),
        lambda: store.put([Prompt([9] * BLOCK).block(0, tenant=owner)]),
        lambda: store.pin(names, duration_s=9, owner=owner),
        lambda: store.evict(names, owner=owner),
    ):
        with pytest.raises(PermissionDenied):
            await call()
    buffers = PROMPT.buffers()
    assert await store.get_blocks(PROMPT.hashes, buffers, fingerprint=FINGERPRINT) == 0
    await store.close()


async def test_its_certificate_alone_or_with_another_role_does_nothing(server, engine, authority):
    store = RemoteStore(server.address, credentials=engine("acme"))
    grants.hold(b"")
    with pytest.raises(PermissionDenied):
        await store.lookup(PROMPT.hashes, fingerprint=FINGERPRINT)
    grants.hold(engine("acme").grant_for("acme", as_tokens([]), ttl_s=1))
    for call in (lambda: anext(store.watch()), lambda: store.fate(PROMPT.hashes[0], fingerprint=FINGERPRINT)):
        with pytest.raises(PermissionDenied, match="engine of-acme may not call"):
            await call()
    tenant = RemoteStore(server.address, credentials=authority.credentials("tenant", "acme"))
    with pytest.raises(PermissionDenied):
        await tenant.lookup(PROMPT.hashes, fingerprint=FINGERPRINT)
    await tenant.close()
    await store.close()


def test_no_worker_takes_a_lasting_grant_for_a_prompt(engine, keyring, authority):
    check = GrantCheck(lambda: public_keys((authority.ca / "grant.pub").read_bytes()))
    grant = check.check(engine("acme").grant_for("acme", as_tokens([]), ttl_s=1))
    assert grant.owners == (keyring.owner("acme"),)
    assert not any(fits_prompt(keyring, grant, as_tokens(tokens)) for tokens in ([], [1], [0] * 128))


def test_a_lasting_grant_ends(engine, authority, monkeypatch):
    check = GrantCheck(lambda: public_keys((authority.ca / "grant.pub").read_bytes()))
    grant = engine("acme", days=1).grant_for("acme", as_tokens([]), ttl_s=1)
    check.check(grant)
    later = time.time() + 86400 + 31
    monkeypatch.setattr("antefix.security.grants.time.time", lambda: later)
    with pytest.raises(PermissionDenied, match="expired"):
        check.check(grant)


def settings_of(directory, secret, **other):
    return StoreSettings(address="store.example:1", secret_file=str(secret), credentials=str(directory), **other)


def test_an_engine_without_a_grant_for_its_tenant_does_not_start(tmp_path, capsys):
    ca, out, secret = tmp_path / "ca", tmp_path / "e1", create_secret_file(tmp_path / "secret")
    assert main(["certs", "init", str(ca)]) == 0
    assert main(["certs", "issue", "engine", "e1", "--ca", str(ca), "--out", str(out)]) == 0
    with pytest.raises(ConfigError, match=r"has no tenant\.grant"):
        EngineStore.open(settings_of(out, secret))
    grant = ["certs", "grant", "acme", "--ca", str(ca), "--secret-file", str(secret), "--out", str(out)]
    assert main(grant) == 0
    with pytest.raises(ConfigError, match="is not for tenant 'default'"):
        EngineStore.open(settings_of(out, secret))
    EngineStore.open(settings_of(out, secret, tenant="acme")).close()
    capsys.readouterr()
    assert main(["certs", "show", str(out), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [each["file"] for each in told["grants"]] == [str(out / TENANT_GRANT)]
    assert 89 < told["grants"][0]["days_left"] < 91 and len(told["certificates"]) == 2


def test_what_is_no_grant_is_refused_with_its_file(tmp_path):
    certificates.make_ca(tmp_path / "ca")
    certificates.issue(tmp_path / "ca", tmp_path / "e1", Role.ENGINE, "e1")
    (tmp_path / "e1" / TENANT_GRANT).write_bytes(b"nonsense")
    with pytest.raises(ConfigError, match=r"tenant\.grant"):
        credential_files.CredentialFiles(tmp_path / "e1")
