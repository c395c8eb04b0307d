"""Backup, restore, drain and a new disk, by the steps of docs/STORES.md, while the stores are in use."""

import asyncio
import json
import signal
import sys

import pytest

from antefix.store.open_store import StoreAddress, open_stores
from antefix.store.remote_store import RemoteStore
from tests.e2e.test_stores_over_services import serve_store, services
from tests.kvstore.small_store import FINGERPRINT, Prompt, owner
from tests.waiting import until

__all__ = ["services"]
pytestmark = pytest.mark.services
PROMPT = Prompt(list(range(48 * 8)), payload_bytes=4096)


async def antefix(tmp_path, *args):
    """Run a command as an operator types it. Returns its output; the command must succeed."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "antefix_console", *args, "--secret-file", "secret", "--json",
        cwd=tmp_path, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    said, problem = await process.communicate()
    assert process.returncode == 0, problem.decode()
    return json.loads(said.decode().splitlines()[-1])


async def put(address, blocks):
    async with RemoteStore(address) as store:
        assert not (await store.put([PROMPT.block(block, parent_elsewhere=True) for block in blocks])).refused


async def num_in(address):
    async with RemoteStore(address) as store:
        held = await store.held(PROMPT.hashes, fingerprint=FINGERPRINT, tenant=owner(""))
    return held.num_blocks


async def num_restored(stores):
    into = PROMPT.buffers()
    num_good = await stores.get_blocks(PROMPT.hashes, into, fingerprint=FINGERPRINT, tenant=owner(""))
    assert [bytes(row) for row in into[:num_good]] == [PROMPT.payload(block) for block in range(num_good)]
    return num_good


async def restores(stores, num_blocks):
    async def are_all():
        return await num_restored(stores) == num_blocks

    await until(are_all, f"{num_blocks} blocks are restored")


async def test_a_backup_of_a_served_store_is_restored_into_another_and_served_itself(services, tmp_path):
    (_, a), (_, b) = services["a"], services["b"]
    await put(a, range(30))
    # Backup: first from the store's files, then from its address, which adds the records written in between.
    assert (await antefix(tmp_path, "store", "copy", "a", "backup"))["num_copied"] == 30
    await put(a, range(30, 40))
    more = await antefix(tmp_path, "store", "copy", a, "backup", "--bytes-per-s", "10M")
    assert (more["num_copied"], more["num_there"]) == (10, 30)
    # Restore: into a store that is served, or a store on the backup itself.
    assert (await antefix(tmp_path, "store", "copy", "backup", b))["num_copied"] == 40
    assert await num_in(b) == 40
    process, address = await serve_store(tmp_path, "backup")
    assert await num_in(address) == 40
    process.kill()
    await process.wait()


async def test_a_disk_is_replaced_while_requests_go_on(services, tmp_path):
    """Store a is on the old disk, c on the new one of the same host, b on another host."""
    addresses = {name: address for name, (_, address) in services.items()}

    def worker(near, names="abc"):
        return open_stores([StoreAddress(name=name, address=addresses[name]) for name in names], near=[near])

    await put(addresses["a"], range(32))
    await put(addresses["b"], range(32, 40))
    before, after = worker("a"), worker("c")
    stop = asyncio.Event()

    async def ask_on(stores):
        """Read from the stores. A late answer is a miss, every returned block is right, and no call fails."""
        while not stop.is_set():
            await num_restored(stores)
            await asyncio.sleep(0.02)

    asking = [asyncio.create_task(ask_on(stores)) for stores in (before, after)]
    # 1. A worker that was restarted writes to the new disk.
    assert not (await after.put([PROMPT.block(block, parent_elsewhere=True) for block in range(40, 44)])).refused
    assert await num_in(addresses["c"]) == 4
    # 2. Records that only the old disk has move to the new one. Other stores already hold the rest.
    drained = await antefix(tmp_path, "drain", addresses["a"], "--to", addresses["c"])
    assert drained["num_missing"] == 0 and await num_in(addresses["c"]) == 36
    # 3. The old store stops, and nothing misses because of that.
    services["a"][0].send_signal(signal.SIGTERM)
    await services["a"][0].wait()
    for stores in (before, after):
        await restores(stores, 44)
    stop.set()
    await asyncio.gather(*asking)
    # 4. The workers' settings no longer name the old store.
    last = worker("c", names="bc")
    await restores(last, 44)
    for stores in (before, after, last):
        await stores.close()
