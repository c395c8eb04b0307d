"""Requests fail, are cancelled, retried, and cut off by kill -9. The ledger agrees exactly with what clients saw."""

import asyncio
import json
import os
import random
import sys
import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from antefix.clients import RouterClient
from antefix.errors import AntefixError, Conflict
from antefix.sampling import Sampling
from antefix_billing.ledger_files import read_settled
from antefix_billing.pricing import priced
from antefix_billing.ratecard import load_cards
from antefix_billing.reconcile import verify
from antefix_billing.usage_record import Status
from tests.billing.test_ratecard import DEPLOY

pytestmark = pytest.mark.services


CARDS = load_cards([DEPLOY / "example.toml"])
ROUTER = Path(__file__).parent / "failing_router.py"
NUM_GROUPS, NUM_AT_ONCE = 50, 48
CANCEL_RATE = 0.03


class World:
    """A router that is killed every few seconds, and clients that continue until they have their answer."""

    def __init__(self, directory: Path, seed: int, kill_every_s: tuple[float, float]) -> None:
        self.directory = directory
        self.chance = random.Random(seed)
        self.kill_every_s = kill_every_s
        self.seen = {}
        self.cancelled = {}
        self.broken = defaultdict(list)
        self.num_kills = self.num_errors = 0
        self.client = None
        self.up = asyncio.Event()

    async def start(self):
        self.process = await asyncio.create_subprocess_exec(
            sys.executable,
            str(ROUTER),
            str(self.directory),
            str(self.directory / "ledger"),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            cwd=Path(__file__).parents[2],
            # The process needs the root for `tests`. It finds the packages where this process finds them.
            env={**os.environ, "PYTHONPATH": os.pathsep.join((str(Path(__file__).parents[2]), *sys.path))},
        )
        line = await self.process.stdout.readline()
        self.client = RouterClient(json.loads(line)["address"])
        self.up.set()

    async def kill_now_and_then(self):
        while True:
            await asyncio.sleep(self.chance.uniform(*self.kill_every_s))
            self.up.clear()
            self.process.kill()
            await self.process.wait()
            self.num_kills += 1
            await self.start()

    async def stop(self):
        self.process.stdin.close()
        await self.process.wait()

    async def ask(self, number):
        """Repeat one request until its usage is known, or cancel it."""
        request_id, tenant = f"q{number}", f"t{number % 5}"
        group = self.chance.randrange(NUM_GROUPS)
        length = 64 * self.chance.randint(0, 6) + self.chance.randint(1, 63)
        prompt = np.full(length, group, np.uint32)
        prompt[-1] = self.chance.randrange(1000)
        cancels = self.chance.random() < CANCEL_RATE
        while True:
            await self.up.wait()
            num_received = 0
            try:
                answer = self.client.generate(
                    prompt, Sampling(max_tokens=8), tenant=tenant, request_id=request_id, timeout_s=20
                )
                async for message in answer:
                    num_received += len(message.tokens)
                    if cancels and num_received:
                        await answer.aclose()
                        self.cancelled[tenant, request_id] = (length, num_received)
                        return
                    if message.usage is not None:
                        self.seen[tenant, request_id] = message.usage
            except AntefixError as err:
                self.num_errors += 1
                if num_received:
                    self.broken[tenant, request_id].append(num_received)
                await asyncio.sleep(0.2 if isinstance(err, Conflict) else 0.02)
                continue
            return


async def live(directory, num_requests, seed, kill_every_s):
    world = World(directory, seed, kill_every_s)
    await world.start()
    killer = asyncio.create_task(world.kill_now_and_then())
    numbers = iter(range(num_requests))

    async def client():
        for number in numbers:
            await world.ask(number)

    await asyncio.gather(*(client() for _ in range(NUM_AT_ONCE)))
    killer.cancel()
    await asyncio.gather(killer, return_exceptions=True)
    if world.process.returncode is not None:
        await world.start()
    await world.stop()
    return world


def check(world, directory, num_requests):
    """Check all numbers that must agree. Returns counts of what happened."""
    by_request = {}
    for item in read_settled(directory / "ledger"):
        by_request.setdefault((item.record.tenant, item.record.request_id), []).append(item.record)
    assert set(world.seen) | set(world.cancelled) == {(f"t{n % 5}", f"q{n}") for n in range(num_requests)}
    # 1. Each client's usage equals that of its one charged record.
    for key, usage in world.seen.items():
        (charged,) = [record for record in by_request[key] if record.is_final]
        assert charged.status is Status.STOP
        told = (usage.prompt_tokens, usage.cache_hit_tokens, usage.cache_miss_tokens, usage.output_tokens)
        assert told == (
            charged.prompt_tokens,
            charged.cache_hit_tokens,
            charged.cache_miss_tokens,
            charged.output_tokens,
        )
    # 2. A cancelled request is charged for its prompt, and for at least the tokens that its client received.
    for key, (length, num_received) in world.cancelled.items():
        given = [record for record in by_request.get(key, []) if record.status is Status.CANCELLED]
        assert len(given) <= 1
        if given and num_received:
            assert given[0].output_tokens >= num_received and given[0].prompt_tokens == length
    # 3. A request that Antefix broke costs at least the tokens that arrived, and nothing if none was sent.
    records = [record for group in by_request.values() for record in group]
    assert all(record.price == 0 for record in records if not record.is_charged)
    assert set(by_request) <= set(world.seen) | set(world.cancelled)
    num_broken_received = sum(check_broken(received, by_request[key]) for key, received in world.broken.items())
    # 4. All attempts of a request together cost as much as the most expensive attempt: nothing is paid for twice.
    for group in by_request.values():
        whole = [priced(replace(record, paid_before=0), CARDS).price for record in group if record.is_charged]
        assert sum(record.price for record in group) == max(whole, default=0)
    # 5. The ledger's chain, duplicates, and the store's log.
    verdict = verify(directory / "ledger", store_log=directory / "store-log")
    assert verdict.ok and verdict.open_requests == 0, verdict.to_json()
    seen = world.seen.values()
    charged = [record for record in records if record.is_final and (record.tenant, record.request_id) in world.seen]
    assert sum(u.prompt_tokens for u in seen) == sum(r.prompt_tokens for r in charged)
    assert sum(u.cache_hit_tokens for u in seen) == sum(r.cache_hit_tokens for r in charged)
    assert sum(u.output_tokens for u in seen) == sum(r.output_tokens for r in charged)
    return {
        "requests": num_requests,
        "kills": world.num_kills,
        "errors_seen_by_clients": world.num_errors,
        "cancelled": len(world.cancelled),
        "records": len(records),
        **{status.value: sum(record.status is status for record in records) for status in Status},
        "broken_off_with_output": sum(r.status.is_ours and r.is_charged for r in records),
        "broken_off_tokens_received": num_broken_received,
        "broken_off_tokens_billed": sum(r.output_tokens for r in records if r.status.is_ours),
        "price": str(sum(r.price for r in records)),
        "prompt_tokens": sum(r.prompt_tokens for r in charged),
        "hit_tokens": sum(r.cache_hit_tokens for r in charged),
        "output_tokens": sum(r.output_tokens for r in charged),
        "unsupported_hits": verdict.unsupported_hits,
        "duplicates": verdict.duplicates,
        "chain_ok": verdict.chain_ok,
    }


def check_broken(received, group):
    """Each broken stream matches a record of a failed attempt with at least its tokens, or the final record.

    Returns the tokens received in the streams that match failed attempts.
    """
    ours = iter([record.output_tokens for record in group if record.status.is_ours])
    final = max((record.output_tokens for record in group if record.is_final), default=0)
    num_ours = 0
    for num_received in received:
        billed = next((num_tokens for num_tokens in ours if num_tokens >= num_received), None)
        num_ours += num_received if billed is not None else 0
        assert billed is not None or num_received <= final
    return num_ours


async def test_a_short_life_with_kills(tmp_path):
    world = await live(tmp_path, 700, seed=1, kill_every_s=(0.3, 0.9))
    result = check(world, tmp_path, 700)
    assert result["kills"] > 0 and result["failed"] > 0
    assert result["broken_off_tokens_billed"] >= result["broken_off_tokens_received"] > 0


@pytest.mark.long
@pytest.mark.timeout(1800)
async def test_a_hundred_thousand_requests(tmp_path):
    started = time.perf_counter()
    world = await live(tmp_path, 100_000, seed=int(os.environ.get("ANTEFIX_TEST_SEED", "2")), kill_every_s=(1.0, 5.0))
    print(json.dumps({**check(world, tmp_path, 100_000), "seconds": round(time.perf_counter() - started)}))
