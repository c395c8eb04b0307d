"""A disk or mount that hangs is a miss in bounded time, and memory that a late read may still write is not used."""

import asyncio
import threading
import time

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from antefix.errors import Unavailable
from antefix.store.breaker import Breaker
from antefix.store.file_reads import FileReads, ReadHangs
from antefix.store.local_store import LocalStore
from antefix.store.read_tiers import Wanted, read_tiers
from antefix.store_files import segment_files
from antefix_prefill.run_prompt import run_prompt
from tests.kvstore.small_store import FINGERPRINT
from tests.store.many_embedded import PROMPT, rack_of
from tests.store.test_service import Service
from tests.waiting import AT_MOST_S

pytestmark = pytest.mark.impatient
SLACK_S = 0.05
# Without a limit, a hang would last for twice as long.
BOUND_S = AT_MOST_S


class Disk:
    """A disk whose reads wait while it hangs."""

    def __init__(self):
        self.answers = threading.Event()
        self.answers.set()
        self.num_waiting = 0

    def wait(self):
        self.num_waiting += 1
        self.answers.wait(2 * AT_MOST_S)


@pytest.fixture
def disk():
    disk = Disk()
    yield disk
    disk.answers.set()


async def test_a_late_read_is_given_up_and_says_when_it_is_over(disk):
    counts = Breaker()
    reads, over = FileReads("the disk", counts, slack_s=BOUND_S), asyncio.Event()
    assert await reads.run(lambda: 7) == 7
    disk.answers.clear()
    reads._pace = Breaker(slack_s=SLACK_S)
    with pytest.raises(ReadHangs, match="the disk does not answer") as hangs:
        await reads.run(disk.wait)
    hangs.value.when_over(over.set)
    # 1. No further read of that disk begins meanwhile, so no more threads wait.
    for _ in range(20):
        with pytest.raises(Unavailable, match="a read of it hangs"):
            await reads.run(lambda: 7)
    assert (counts.num_slow, counts.num_spared, disk.num_waiting) == (1, 20, 1)
    assert not over.is_set()
    # 2. When the disk works again, reads work as before.
    disk.answers.set()
    async with asyncio.timeout(BOUND_S):
        await over.wait()
    assert not reads.hangs and await reads.run(lambda: 7) == 7
    reads.close()


async def test_a_client_that_leaves_waits_no_longer_than_the_read_may_take(disk):
    reads = FileReads("the disk", Breaker(), slack_s=SLACK_S)
    disk.answers.clear()
    asking = asyncio.create_task(reads.run(disk.wait))
    await asyncio.sleep(0)
    asking.cancel()
    async with asyncio.timeout(BOUND_S):
        with pytest.raises(ReadHangs):
            await asking
    # The caller that closes the reader does not wait for the hanging read.
    reads.close()


async def test_closing_waits_for_no_disk(disk, tmp_path, monkeypatch):
    service = Service(tmp_path / "store")
    await service.start()
    store = LocalStore(service.config.dir, service.address)
    await store.put(PROMPT.blocks(4))
    store.reads = FileReads("the store", store.breaker, slack_s=SLACK_S)
    real = segment_files.os.preadv

    def preadv(*args):
        disk.wait()
        return real(*args)

    monkeypatch.setattr(segment_files.os, "preadv", preadv)
    disk.answers.clear()
    begun = time.monotonic()
    hashes, into = PROMPT.hashes[:4], PROMPT.buffers()[:4]
    with pytest.raises(ReadHangs):
        await store.get_blocks(hashes, into, fingerprint=FINGERPRINT)
    with pytest.raises(Unavailable):
        await store.lookup(hashes, fingerprint=FINGERPRINT)
    await store.close()
    assert time.monotonic() - begun < BOUND_S
    disk.answers.set()
    again = LocalStore(service.config.dir, service.address)
    assert await again.get_blocks(hashes, into, fingerprint=FINGERPRINT) == 4
    await again.close()
    await service.stop()


@pytest.mark.slow
async def test_rows_that_a_late_read_may_write_are_taken_until_it_is_over(make_engine, make_prompt, store, monkeypatch):
    tokens = np.random.default_rng(5).integers(0, 256, 300)
    writer = make_engine()
    cold = await run_prompt(writer, make_prompt(writer, tokens))
    reader, late = make_engine(), asyncio.get_running_loop().create_future()
    landed = []

    async def hangs(hashes, into, **names):
        landed.extend(into)
        raise ReadHangs("the disk does not answer", [late])

    with monkeypatch.context() as patch:
        patch.setattr(store, "get_blocks", hangs)
        hot = await run_prompt(reader, make_prompt(reader, tokens))
        assert_array_equal(hot.logits, cold.logits)
        # Late bytes are written to memory that no computation uses.
        for row in landed:
            row[:] = b"\xff" * row.nbytes
        again = await run_prompt(reader, make_prompt(reader, tokens))
        assert_array_equal(again.logits, cold.logits)
    for computed in (hot, again):
        reader.blocks.release(computed.sequence.block_table)
    assert reader.blocks.num_available < reader.pool.num_blocks
    late.set_result(None)
    await asyncio.sleep(0)
    assert reader.blocks.num_available == reader.pool.num_blocks


async def test_buffers_of_a_tier_that_hangs_are_given_to_no_other(tmp_path, monkeypatch):
    async with rack_of(tmp_path) as rack:
        for name in "ab":
            await rack.fill(name, 0, 8)
        late = asyncio.get_running_loop().create_future()

        async def hangs(*args, **names):
            raise ReadHangs("the disk does not answer", [late])

        number = next(number for number, tier in enumerate(rack.many.tiers) if tier.label == "disk:a")
        monkeypatch.setattr(rack.many.tiers[number].source, "get_blocks", hangs)
        held = await rack.many.members.held(PROMPT.hashes, fingerprint=FINGERPRINT, tenant=b"")
        wanted = Wanted(hashes=PROMPT.hashes[:8], into=PROMPT.buffers()[:8], fingerprint=FINGERPRINT)
        with pytest.raises(ReadHangs) as told:
            await read_tiers(rack.many.tiers, held, wanted)
        assert told.value.works == (late,)
