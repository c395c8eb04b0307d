"""The invariants that must hold after every history, whatever faults it had."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from antefix_billing import reconcile
from antefix_billing.usage_record import Status
from tests.histories.workers import FINGERPRINT, PAYLOAD_BYTES, payload_of

if TYPE_CHECKING:
    from tests.histories.world import World


class Broken(AssertionError):
    """An invariant does not hold."""


async def check(world: World) -> None:
    """Raises:  Broken: something that was promised does not hold."""
    # 1. Nobody is stuck, nothing is held.
    prefilling, accounts = world.prefilling, world.accounts
    if len(prefilling._in_flight) or accounts._running or accounts._settling or accounts._admitting:
        raise Broken("a request is still counted as running")
    for worker in (*world.prefill.workers, *world.decode.workers):
        if worker.num_requests or worker.num_tokens:
            raise Broken(f"{worker.address} is still counted as busy")
    for role in (world.prefill, world.decode):
        if len(role.workers) != 2:
            raise Broken(f"{len(role.workers)} of 2 {role.role} workers are known, and all of them live")
    # 2. Watchers hold what the store holds.
    engine = world.store._open()
    stored = {event for batch in engine.snapshot() for found in batch.events for event in found.keys().tolist()}
    if world.feed.in_step and world.feed._blocks != stored:
        raise Broken(f"a watcher holds {len(world.feed._blocks)} blocks, the store {len(stored)}")
    if not world.feed.in_step:
        raise Broken("a watcher has not caught up")
    await world.feed.close()
    # 3. What was acknowledged is there, with its own bytes, after one more restart.
    engine.abandon()
    world.disk.lose_power(world.rng)
    world.open_store()
    _check_stored(world)
    # 4. The bill: whole, one record per request, what clients were told, hit + miss = prompt.
    await accounts.close()
    _check_bill(world)


def _check_stored(world: World) -> None:
    engine = world.store._open()
    hurt = world.store.with_descendants(world.store.rotten)
    hashes = sorted(world.store.acknowledged)
    world.counts["records checked"] += len(hashes)
    into = [memoryview(bytearray(PAYLOAD_BYTES)) for _ in hashes]
    # One read gives all records up to the first that is not there.
    while hashes:
        num_good = engine.read_blocks(hashes, into[: len(hashes)], fingerprint=FINGERPRINT).num_good
        for block_hash, payload in zip(hashes[:num_good], into, strict=False):
            if bytes(payload) != payload_of(block_hash):
                raise Broken(f"wrong bytes of {block_hash.hex()}")
        gone = hashes[num_good : num_good + 1]
        if gone and not world.may_lose_store and gone[0] not in hurt:
            raise Broken(f"{gone[0].hex()} was acknowledged and is gone")
        hashes = hashes[num_good + 1 :]
    engine.abandon()


def _check_bill(world: World) -> None:
    # As `verify` does, but with one reading for the verdict and for the records.
    chain = reconcile._read(world.directory / "ledger", None, ())
    verdict = reconcile._verdict(chain, None, reconcile.CLOCK_SLACK_US, has_anchor=False)
    if not verdict.chain_ok or verdict.duplicates or verdict.open_requests:
        raise Broken(f"the ledger: {verdict}")
    items = {(item.record.event_id, item.sequence): item for item in chain.settled}
    for told, settled_hash in world.told.settled.items():
        if told not in items or items[told].hash != settled_hash:
            raise Broken(f"the record of {told} was acknowledged and is gone")
    finals = Counter(item.record.request_id for item in items.values() if item.record.is_final)
    for item in items.values():
        record = item.record
        world.counts["records of the bill checked"] += 1
        if record.cache_hit_tokens + record.cache_miss_tokens != record.prompt_tokens:
            raise Broken(f"{record.event_id}: hit and miss are not the prompt")
        length = len(world.told.prompts[record.request_id])
        if record.prompt_tokens not in (length, 0) or (
            record.prompt_tokens == 0 and record.status is not Status.CANCELLED
        ):
            raise Broken(f"{record.event_id}: {record.prompt_tokens} of {length} prompt tokens, {record.status}")
    for name in world.told.answers:
        if finals[name] != 1:
            raise Broken(f"{name} was answered and has {finals[name]} final records")
