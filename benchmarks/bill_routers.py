"""Is it one bill, whatever dies? Requests through several routers, which are killed, like Redis and the receiver.

    python -m benchmarks.bill_routers --requests 100000 --routers 3 [--seed N] [--out FILE]

Workers are a script with a store log of its own (tests/billing/failing_router.py), routers are processes with the real
accounts, ledgers and shared bill; Redis is a real server that loses all it knew at each kill; the receiver is a local
webhook that keeps events by their ids, fed by the real pusher, which is killed too. Clients send each request again, at
whichever router, until they have its answer. Not in it: steps of clocks, reloads, and kills of real stores and workers
(tests/gateway/test_bill_over_real_services.py has those, with one router).

Held to be equal, to the token and the last decimal: what clients were told, the ledgers with adjustments, and what the
receiver has; every hit is in the store's log, and no request costs more than its dearest attempt.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np

from antefix.clients import RouterClient
from antefix.errors import AntefixError
from antefix.sampling import Sampling
from antefix.usage import Usage
from antefix_billing.adjustment import Adjusted
from antefix_billing.ledger_files import ledgers_of, read_billed
from antefix_billing.push.push_config import SinkConfig
from antefix_billing.push.pusher import Pusher
from antefix_billing.push.sinks import open_sink
from antefix_billing.reconcile import verify_all
from benchmarks import run_record
from tests.billing.billing_systems import BillingSystem
from tests.redis_servers import RedisServer

ROOT = Path(__file__).parents[1]
ROUTER = ROOT / "tests" / "billing" / "failing_router.py"
NUM_AT_ONCE = 32
NUM_GROUPS = 50
AGAIN_ELSEWHERE = 0.1


class World:
    """Routers, Redis, and what clients were told."""

    def __init__(self, directory: Path, args: argparse.Namespace) -> None:
        self.directory, self.args = directory, args
        self.chance = random.Random(args.seed)
        self.redis = RedisServer(directory)
        self.routers: list[tuple[subprocess.Popen[str], RouterClient] | None] = [None] * args.routers
        self.seen: dict[tuple[str, str], Usage] = {}
        self.counts: Counter[str] = Counter()

    async def start_router(self, number: int) -> None:
        ledger = self.directory / (f"ledger-{number}")
        command = [sys.executable, str(ROUTER), str(self.directory), str(ledger), self.redis.url]
        paths = os.pathsep.join((str(ROOT), *sys.path))
        process = await asyncio.to_thread(
            subprocess.Popen, command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
            env={**os.environ, "PYTHONPATH": paths},
        )  # fmt: skip
        line = await asyncio.to_thread(process.stdout.readline)  # type: ignore[union-attr]
        self.routers[number] = (process, RouterClient(json.loads(line)["address"]))

    async def kill_routers(self) -> None:
        while True:
            await asyncio.sleep(self.chance.uniform(0.5, 1.5) * self.args.kill_every_s)
            number = self.chance.randrange(self.args.routers)
            running, self.routers[number] = self.routers[number], None
            if running is not None:
                running[0].kill()
                await asyncio.to_thread(running[0].wait)
                self.counts["router kills"] += 1
            await self.start_router(number)

    async def kill_redis(self) -> None:
        while True:
            await asyncio.sleep(self.chance.uniform(0.5, 1.5) * 2 * self.args.kill_every_s)
            self.redis.kill()
            self.counts["redis kills"] += 1
            await asyncio.sleep(self.chance.random())
            await asyncio.to_thread(self.redis.start)

    async def ask(self, number: int) -> None:
        """One request, at any router, until its usage is known; some come again elsewhere although they are known."""
        tenant, request_id = f"t{number % 5}", f"q{number}"
        length = 64 * self.chance.randint(0, 6) + self.chance.randint(1, 63)
        prompt = np.full(length, self.chance.randrange(NUM_GROUPS), np.uint32)
        prompt[-1] = self.chance.randrange(1000)
        times = 2 if self.chance.random() < AGAIN_ELSEWHERE else 1
        while times:
            running = self.chance.choice(self.routers)
            if running is None:
                await asyncio.sleep(0.05)
                continue
            try:
                answer = running[1].generate(
                    prompt, Sampling(max_tokens=8), tenant=tenant, request_id=request_id, timeout_s=20
                )
                async for message in answer:
                    if message.usage is not None:
                        self.note((tenant, request_id), message.usage)
                        times -= 1
            except AntefixError as err:
                self.counts[f"error {type(err).__name__}"] += 1
                # What is refused while Redis is told again takes seconds.
                await asyncio.sleep(0.3)

    def note(self, key: tuple[str, str], usage: Usage) -> None:
        self.counts["answers"] += 1
        self.seen.setdefault(key, usage)

    async def end(self) -> None:
        """Every router stops in order, after it told Redis all that it has."""
        await asyncio.to_thread(self.redis.start) if self.redis.process is None else None
        for number, running in enumerate(self.routers):
            if running is None or running[0].poll() is not None:
                await self.start_router(number)
        await asyncio.sleep(15)
        for running in self.routers:
            if running is not None:
                running[0].stdin.close()  # type: ignore[union-attr]
                await asyncio.to_thread(running[0].wait)
        self.redis.kill()


def _stops_after(number: int) -> Callable[[float], bool]:
    """A pusher's sleep that takes no time, and ends it at so many."""
    left = iter(range(number))
    return lambda seconds: next(left, None) is None


def push(directory: Path, system: BillingSystem, chance: random.Random) -> int:
    """All ledgers to the receiver, with lost answers and a state that is lost now and then. Returns restarts."""
    config = SinkConfig(name="hook", kind="webhook", url=system.url, key="s", unmapped="name")
    state, restarts = directory / "push", 0
    for _ in range(20):
        state.mkdir(exist_ok=True)
        system.answers = [chance.choice((0, 500, 503)) for _ in range(5)]
        pusher = Pusher(config, open_sink(config), ledgers_of([directory]), state, sleep=_stops_after(8))
        pusher.push()
        restarts += 1
        if chance.random() < 0.3:
            shutil.rmtree(state)
    system.answers = []
    state.mkdir(exist_ok=True)
    Pusher(config, open_sink(config), ledgers_of([directory]), state).push()
    return restarts


def check(world: World, directory: Path, system: BillingSystem) -> dict[str, Any]:
    """What does not agree is in `faults`."""
    items = [item for ledger in ledgers_of([directory]) for item in read_billed(ledger)]
    charged: defaultdict[tuple[str, str], Decimal] = defaultdict(Decimal)
    dearest: defaultdict[tuple[str, str], Decimal] = defaultdict(Decimal)
    finals: defaultdict[tuple[str, str], list[Any]] = defaultdict(list)
    for item in items:
        if isinstance(item, Adjusted):
            charged[item.adjustment.tenant, item.adjustment.request_id] += item.adjustment.amount
            continue
        record = item.record
        key = (record.tenant, record.request_id)
        charged[key] += record.price
        dearest[key] = max(dearest[key], record.paid)
        if record.is_final:
            finals[key].append(record)
    faults = [
        f"{key}: charged {charged[key]}, its dearest attempt {dearest[key]}"
        for key in dearest
        if charged[key] != dearest[key]
    ]
    for key, usage in world.seen.items():
        told = (usage.prompt_tokens, usage.cache_hit_tokens, usage.output_tokens)
        if told not in [(r.prompt_tokens, r.cache_hit_tokens, r.output_tokens) for r in finals[key]]:
            faults.append(f"{key}: told {told}, which no final record says")
    sent = [event["data"] for event in system.taken.values()]
    received = sum((Decimal(data.get("price", data.get("amount", "0"))) for data in sent), Decimal(0))
    billed = sum(charged.values(), Decimal(0))
    if received != billed or len(sent) != len(items):
        faults.append(f"the receiver has {len(sent)} entries of {received}, the ledgers {len(items)} of {billed}")
    verdict = verify_all(ledgers_of([directory]), store_log=directory / "store-log", anchors={})
    if not verdict.ok:
        faults.append(verdict.to_json())
    return {
        "requests": len(world.seen),
        "counts": dict(sorted(world.counts.items())),
        "entries": len(items),
        "adjustments": sum(isinstance(item, Adjusted) for item in items),
        "final_records_beyond_one": sum(len(group) - 1 for group in finals.values()),
        "price": str(billed),
        "received": str(received),
        "faults": len(faults),
        "examples": faults[:10],
    }


async def live(directory: Path, args: argparse.Namespace) -> World:
    world = World(directory, args)
    await asyncio.to_thread(world.redis.start)
    for number in range(args.routers):
        await world.start_router(number)
    killers = [asyncio.create_task(world.kill_routers()), asyncio.create_task(world.kill_redis())]
    numbers = iter(range(args.requests))

    async def client() -> None:
        for number in numbers:
            await world.ask(number)

    await asyncio.gather(*(client() for _ in range(NUM_AT_ONCE)))
    for killer in killers:
        killer.cancel()
    await asyncio.gather(*killers, return_exceptions=True)
    await world.end()
    return world


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--routers", type=int, default=3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kill-every-s", type=float, default=10.0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch)
        world = asyncio.run(live(directory, args))
        system = BillingSystem()
        world.counts["pusher restarts"] = push(directory, system, world.chance)
        result = check(world, directory, system)
        system.close()
    result["seconds"] = round(time.perf_counter() - started)
    print(json.dumps(result, indent=1))
    if args.out:
        run_record.write(args.out, result)
    sys.exit(bool(result["faults"]))


if __name__ == "__main__":
    main()
