"""Thousands of requests over real processes, any of which may be killed at any time. The ledger agrees with what
clients were told, and the store's log supports it. `ANTEFIX_TEST_REQUESTS` sets the number of requests."""

import asyncio
import contextlib
import json
import os
import random
import time
from collections import Counter, defaultdict
from dataclasses import replace

import numpy as np
import pytest

from antefix.clients import RouterClient
from antefix.errors import AntefixError, Conflict
from antefix.sampling import Sampling
from antefix.secret import create_secret_file
from antefix_billing.ledger_files import read_settled
from antefix_billing.pricing import priced
from antefix_billing.ratecard import load_cards
from antefix_billing.reconcile import verify
from antefix_console.deployment import Deployment, DeploymentConfig
from tests.billing.test_bill_under_failure import check_broken
from tests.billing.test_ratecard import DEPLOY
from tests.gateway.scripted import MODEL as MODEL_DIR
from tests.redis_servers import free_port
from tests.waiting import AT_MOST_S

pytestmark = pytest.mark.services


NUM_AT_ONCE, NUM_DOCUMENTS, CANCEL_RATE = 8, 12, 0.03
CARDS = load_cards([DEPLOY / "example.toml"])
SMALL_POOL = ("--pool-bytes", "64M")
VICTIMS = ["router"] * 4 + ["decode"] * 3 + ["prefill"] * 2 + ["kvstore"] * 2


class World:
    """A deployment whose roles keep their addresses, and clients that continue until they have their answers."""

    def __init__(self, directory, seed):
        self.chance = random.Random(seed)
        self.config = DeploymentConfig(
            model=MODEL_DIR,
            data_dir=directory / "data",
            num_prefill=0,
            num_decode=0,
            ratecards=(str(DEPLOY / "example.toml"),),
            router_address=f"127.0.0.1:{free_port()}",
            extra_flags={
                "kvstore": ("--budget-bytes", "256M", "--address", f"127.0.0.1:{free_port()}"),
                "prefill": SMALL_POOL,
                "decode": SMALL_POOL,
            },
        )
        self.deployment = Deployment(self.config)
        self.workers = [("prefill", free_port()), ("decode", free_port()), ("decode", free_port())]
        self.documents = [
            self.chance.choices(range(256), k=self.chance.randint(100, 900)) for _ in range(NUM_DOCUMENTS)
        ]
        self.seen, self.cancelled, self.broken = {}, {}, defaultdict(list)
        self.kills, self.num_errors = Counter(), 0

    async def start_store(self):
        config = self.config
        flags = ("--dir", str(config.store_dir), "--usage-log-dir", str(config.usage_log_dir))
        await self.deployment.start_role("kvstore", flags)

    async def start_worker(self, role, port):
        flags = ("--threads", "1", "--strategy", "boundary", "--address", f"127.0.0.1:{port}")
        await self.deployment.start_role(role, [*self.deployment._shared_flags(), *flags])

    async def start_router(self):
        await self.deployment.start_router(self.config.router_address)

    async def start(self):
        (self.config.data_dir / "logs").mkdir(parents=True)
        create_secret_file(self.config.data_dir / "secret")
        await self.start_store()
        for role, port in self.workers:
            await self.start_worker(role, port)
        await self.start_router()

    async def kill_now_and_then(self):
        while True:
            await asyncio.sleep(self.chance.uniform(4, 12))
            role = self.chance.choice(VICTIMS)
            alive = [p for p in self.deployment.processes if p.role == role and p.alive]
            victim = self.chance.choice(alive)
            await self.deployment.kill(victim)
            self.kills[role] += 1
            await asyncio.sleep(self.chance.uniform(0, 1))
            if role == "router":
                await self.start_router()
            elif role == "kvstore":
                await self.start_store()
            else:
                await self.start_worker(role, int(victim.address.rpartition(":")[2]))

    async def ask(self, number):
        request_id, tenant = f"q{number}", f"t{number % 3}"
        document = self.chance.choice(self.documents)
        question = self.chance.choices(range(256), k=self.chance.randint(1, 40))
        prompt = np.array(document[: self.chance.randint(1, len(document))] + question, np.uint32)
        sampling = Sampling(max_tokens=self.chance.randint(1, 12), ignore_eos=True)
        cancels = self.chance.random() < CANCEL_RATE
        client = RouterClient(self.config.router_address)
        while True:
            num_received = 0
            try:
                answer = client.generate(prompt, sampling, tenant=tenant, request_id=request_id, timeout_s=AT_MOST_S)
                async for message in answer:
                    num_received += len(message.tokens)
                    if cancels and num_received:
                        await answer.aclose()
                        self.cancelled[tenant, request_id] = (len(prompt), num_received)
                        return
                    if message.usage is not None:
                        self.seen[tenant, request_id] = (message.usage, num_received)
            except AntefixError as err:
                self.num_errors += 1
                if num_received:
                    self.broken[tenant, request_id].append(num_received)
                await asyncio.sleep(1.0 if isinstance(err, Conflict) else 0.3)
                continue
            return


async def live(directory, num_requests, seed):
    world = World(directory, seed)
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(world.deployment.stop)
        await world.start()
        killer = asyncio.create_task(world.kill_now_and_then())
        numbers = iter(range(num_requests))

        async def client():
            for number in numbers:
                await world.ask(number)

        await asyncio.gather(*(client() for _ in range(NUM_AT_ONCE)))
        killer.cancel()
        await asyncio.gather(killer, return_exceptions=True)
        # The last router settles what its predecessors left open.
        await asyncio.gather(*(world.deployment.kill(p) for p in world.deployment.processes if p.role == "router"))
        if not world.deployment.addresses("kvstore"):
            await world.start_store()
        await world.start_router()
    return world


def check(world, num_requests):
    by_request = defaultdict(list)
    for item in read_settled(world.config.ledger_dir):
        by_request[item.record.tenant, item.record.request_id].append(item.record)
    records = [record for group in by_request.values() for record in group]
    assert set(world.seen) | set(world.cancelled) == {(f"t{n % 3}", f"q{n}") for n in range(num_requests)}
    # 1. Each client's usage and received tokens agree with its one ended record.
    for key, (usage, num_received) in world.seen.items():
        (ended,) = [record for record in by_request[key] if record.is_final]
        told = (usage.prompt_tokens, usage.cache_hit_tokens, usage.cache_miss_tokens, usage.output_tokens)
        assert told == (
            ended.prompt_tokens,
            ended.cache_hit_tokens,
            ended.cache_miss_tokens,
            ended.output_tokens,
        )
        assert num_received == ended.output_tokens
    # 2. A cancelled request has at most one ended record, with at least the tokens that its client received.
    for key, (length, num_received) in world.cancelled.items():
        final = [record for record in by_request[key] if record.is_final]
        assert len(final) <= 1
        assert not final or (final[0].output_tokens >= num_received and final[0].prompt_tokens == length)
    # 3. A broken answer costs the tokens that were sent. All attempts together cost as much as the most expensive one.
    assert all(record.price == 0 for record in records if not record.is_charged)
    for group in by_request.values():
        whole = [priced(replace(record, paid_before=0), CARDS).price for record in group if record.is_charged]
        assert sum(record.price for record in group) == max(whole, default=0)
    verdict = verify(world.config.ledger_dir, store_log=world.config.usage_log_dir)
    ended = [record for record in records if record.is_final and (record.tenant, record.request_id) in world.seen]
    broken = [record for record in records if record.status.is_ours]
    return {
        "requests": num_requests,
        "kills": dict(world.kills),
        "errors_seen_by_clients": world.num_errors,
        "cancelled": len(world.cancelled),
        "records": len(records),
        "statuses": dict(Counter(record.status.value for record in records)),
        "miss_reasons": dict(Counter(record.miss_reason.value for record in records)),
        "broken_off_tokens_received": sum(check_broken(got, by_request[key]) for key, got in world.broken.items()),
        "broken_off_tokens_billed": sum(record.output_tokens for record in broken),
        "prompt_tokens": sum(record.prompt_tokens for record in ended),
        "hit_tokens": sum(record.cache_hit_tokens for record in ended),
        "hit_memory_tokens": sum(record.hit_memory_tokens for record in ended),
        "output_tokens": sum(record.output_tokens for record in ended),
        "price": str(sum(record.price for record in records)),
        **{name: getattr(verdict, name) for name in ("chain_ok", "duplicates", "open_requests", "unsupported_hits")},
        "unsupported_examples": verdict.unsupported_examples,
    }


@pytest.mark.long
@pytest.mark.timeout(3600)
async def test_thousands_of_requests_over_processes_that_are_killed(tmp_path):
    num_requests, started = int(os.environ.get("ANTEFIX_TEST_REQUESTS", "2000")), time.perf_counter()
    world = await live(tmp_path, num_requests, seed=int(os.environ.get("ANTEFIX_TEST_SEED", "4")))
    result = check(world, num_requests)
    print(json.dumps({**result, "seconds": round(time.perf_counter() - started)}))
    assert result["chain_ok"] and not result["duplicates"] and not result["open_requests"]
    assert result["unsupported_hits"] == 0
