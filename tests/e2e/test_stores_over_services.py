"""Three real store services: one dies during a read, and blocks that are often read elsewhere are copied home."""

import asyncio
import os
import signal
import sys

import pytest

from antefix.errors import AntefixError
from antefix.secret import Keyring, create_secret_file
from antefix.security import grants, own_credentials
from antefix.security.credentials import Credentials
from antefix.security.identity import Role
from antefix.store import standing
from antefix.store.local_copies import LocalCopies
from antefix.store.open_store import StoreAddress, open_stores
from antefix.store.remote_store import RemoteStore
from tests.kvstore.small_store import FINGERPRINT, Prompt, owner
from tests.waiting import AT_MOST_S, until

pytestmark = pytest.mark.services
# 40 blocks of 1 MiB are read in pieces of 16 MiB, so a store that dies has sent some pieces and not others.
BLOCK_BYTES = 1 << 20
PROMPT = Prompt(list(range(40 * 8)), payload_bytes=BLOCK_BYTES)


@pytest.fixture
async def services(tmp_path, monkeypatch):
    """Processes and addresses by name, and the credentials of every call."""
    # Long time limits, because a late answer on a busy machine would be a miss, which is not the subject of this test.
    monkeypatch.setattr(standing, "ASK_S", 10.0)
    monkeypatch.setattr(standing, "ASK_S_MAX", 10.0)
    keyring = Keyring.from_file(create_secret_file(tmp_path / "secret"))
    credentials = Credentials(Role.OPERATOR, files=None, keyring=keyring)
    own_credentials.use(credentials)
    grants.hold(credentials.grant_for_owners([owner("")], ttl_s=300))
    started = dict(zip("abc", await asyncio.gather(*(serve_store(tmp_path, name) for name in "abc")), strict=True))
    yield started
    for process, _ in started.values():
        await _end(process)
    own_credentials.use(None)
    grants.hold(b"")


async def serve_store(tmp_path, name):
    flags = {
        "dir": str(tmp_path / name),
        "secret-file": str(tmp_path / "secret"),
        "address": f"unix:{tmp_path}/{name}.sock",
        "budget-bytes": "512M",
    }
    parts = [part for flag, value in flags.items() for part in (f"--{flag}", value)]
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "antefix_console", "serve", "kvstore", *parts, env={**os.environ},
        stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL,
    )  # fmt: skip
    async with RemoteStore(flags["address"]) as store:
        await until(store.stats, f"store {name} serves", despite=AntefixError)
    return process, flags["address"]


async def _end(process):
    if process.returncode is None:
        process.kill()
    await process.wait()


async def _fill(services, name, blocks):
    async with RemoteStore(services[name][1]) as store:
        records = [PROMPT.block(block, parent_elsewhere=True) for block in blocks]
        assert not (await store.put(records)).refused


def _open(services, near, **options):
    where = [StoreAddress(name=name, address=address) for name, (_, address) in services.items()]
    return open_stores(where, near=[near], **options)


async def _restored(stores):
    into = PROMPT.buffers()
    read = await stores.read_blocks(PROMPT.hashes, into, fingerprint=FINGERPRINT, tenant=owner(""))
    for block in range(read.num_good):
        assert bytes(into[block]) == PROMPT.payload(block)
    return read


async def test_a_store_that_dies_in_mid_stream_loses_nothing_that_another_has(services):
    await _fill(services, "b", range(40))
    await _fill(services, "c", range(40))
    stores = _open(services, "a")
    reading = asyncio.create_task(_restored(stores))
    await asyncio.sleep(0.01)
    services["b"][0].send_signal(signal.SIGKILL)
    assert (await reading).num_good == 40
    # Read again while the store is down.
    read = await _restored(stores)
    assert read.num_good == 40 and {each.tier for each in read.reads} == {"peer:c"}
    await stores.close()


async def test_a_prefix_that_was_read_three_times_elsewhere_is_near_at_the_fourth_within_the_budget(services):
    await _fill(services, "b", range(40))
    copies = LocalCopies(bytes_max=24 * BLOCK_BYTES, ttl_s=600.0)
    stores = _open(services, "a", copies=copies)
    for _ in range(3):
        read = await _restored(stores)
        assert {each.tier: each.num_blocks for each in read.reads} == {"peer:b": 40}
        await copies.settle()
    async with RemoteStore(services["a"][1]) as near:
        held = await near.held(PROMPT.hashes, fingerprint=FINGERPRINT, tenant=owner(""))
    assert held.spans == ((0, 24),) and copies.counters.bytes_copied == 24 * BLOCK_BYTES
    # Without the other host, the copied blocks are on this host.
    services["b"][0].send_signal(signal.SIGKILL)
    read = await _restored(stores)
    assert {each.tier: each.num_blocks for each in read.reads} == {"peer:a": 24}
    await stores.close()


async def test_a_store_that_was_away_is_read_as_soon_as_it_is_back(services, tmp_path, monkeypatch):
    """The store's pause would last an hour, but its connection shows that it answers again."""
    monkeypatch.setattr(standing, "SHUNNED_S", 3600.0)
    monkeypatch.setattr(standing, "SHUNNED_S_MAX", 3600.0)
    await _fill(services, "b", range(40))
    stores = _open(services, "a")
    assert (await _restored(stores)).num_good == 40
    services["b"][0].send_signal(signal.SIGKILL)
    await services["b"][0].wait()
    tier = next(tier for tier in stores.tiers if tier.name == "b")
    async with asyncio.timeout(AT_MOST_S):
        while not tier.is_shunned:
            await _restored(stores)
    assert (await _restored(stores)).num_good == 0
    services["b"] = await serve_store(tmp_path, "b")

    async def are_all_restored():
        return (await _restored(stores)).num_good == 40

    await until(are_all_restored)
    await stores.close()
