"""Is each request billed exactly once, whatever fails? Runs requests through several routers while failures happen.

    python -m benchmarks.bill_routers --requests 100000 --routers 3 [--until-s S] [--status FILE] [--out FILE]

Routers, store, decode workers and the pusher are the real processes with a small random model. Redis is a real server
that loses all its data at each kill. Receivers are local stand-ins for billing systems that keep events by their ids.
`bill_failures.py` causes the failures: kills of each role, steps of the host's clock, reloads, and changes of the
price. Clients send each request again, to any router, until they have its answer. Some clients send a request again
although they have its answer, and some first disconnect in the middle.

At the end three records must agree, to the token and the last decimal: the usage that clients were told, the ledgers
with their adjustments, and the events of each receiver. Every hit must be in the store's log, every anchor in its
ledger, and no request may cost more than its most expensive attempt.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib.util
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from dataclasses import asdict
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np

from antefix.clients import RouterClient
from antefix.errors import AntefixError
from antefix.sampling import Sampling
from antefix.usage import Usage
from antefix_billing.adjustment import Adjusted
from antefix_billing.anchor import read_anchors
from antefix_billing.ledger_files import ledgers_of, read_billed
from antefix_billing.push.push_config import SinkConfig
from antefix_billing.push.pusher import Pusher
from antefix_billing.push.sinks import open_sink
from antefix_billing.reconcile import verify_all
from antefix_billing.usage_record import UsageRecord
from antefix_console.deployment import Deployment, DeploymentConfig
from benchmarks import run_record
from benchmarks.bill_failures import Failures, add_card, clock_environment, write_clock, write_tenants
from tests.billing.billing_systems import BillingSystem
from tests.redis_servers import RedisServer
from tests.small_worker_model import small_worker_model

NUM_AT_ONCE = 32
NUM_DOCUMENTS = 50
AGAIN_ELSEWHERE, LEAVES_FIRST, LONG_ANSWER = 0.1, 0.01, 0.1
NUM_TRIES_MAX = 400
CLIENTS = {"openmeter": "openmeter", "lago": "lago_python_client"}
Key = tuple[str, str]


class Clients:
    """The counts that clients keep: the usage that routers told them, and the answers that they received."""

    def __init__(self, deployment: Deployment, args: argparse.Namespace, chance: random.Random) -> None:
        self.deployment, self.args, self.chance = deployment, args, chance
        self.routers: dict[str, RouterClient] = {}
        self.seen: dict[Key, tuple[Usage, int]] = {}
        self.counts: Counter[str] = Counter()
        self.started = time.monotonic()
        self.documents = [chance.choices(range(256), k=chance.randint(70, 400)) for _ in range(NUM_DOCUMENTS)]

    def progress(self) -> float:
        """The run's progress by number of requests or by time, whichever is larger."""
        share = (time.monotonic() - self.started) / self.args.until_s if self.args.until_s else 0.0
        return max(share, self.counts["requests"] / self.args.requests)

    async def run(self) -> None:
        numbers = iter(range(self.args.requests))

        async def client() -> None:
            for number in numbers:
                if self.progress() >= 1:
                    return
                await self.ask(number)
                self.counts["requests"] += 1

        await asyncio.gather(*(client() for _ in range(NUM_AT_ONCE)))

    async def ask(self, number: int) -> None:
        """Send one request, to any router, and repeat it until its usage is known."""
        chance = self.chance
        tenant, request_id = f"t{number % 5}", f"q{number}"
        prompt = np.array(
            chance.choice(self.documents) + chance.choices(range(256), k=chance.randint(1, 20)), np.uint32
        )
        sampling = Sampling(max_tokens=4 if chance.random() < LONG_ANSWER else 1, ignore_eos=True)
        leaves, times = chance.random() < LEAVES_FIRST, 1 + (chance.random() < AGAIN_ELSEWHERE)
        for _ in range(NUM_TRIES_MAX):
            try:
                if leaves:
                    leaves = False
                    await self.leave(prompt, sampling, tenant, request_id)
                await self.hear(prompt, sampling, tenant, request_id)
                times -= 1
                if not times:
                    return
            except AntefixError as err:
                self.counts[f"error {type(err).__name__}"] += 1
                # While the routers load Redis with their data again, they refuse requests for some seconds.
                await asyncio.sleep(0.3)
        self.counts["requests without an answer"] += 1

    async def hear(self, prompt: Any, sampling: Sampling, tenant: str, request_id: str) -> None:
        num_received = 0
        router = self.router()
        async for message in router.generate(prompt, sampling, tenant=tenant, request_id=request_id, timeout_s=30):
            num_received += len(message.tokens)
            if message.usage is not None:
                self.counts["answers"] += 1
                self.seen.setdefault((tenant, request_id), (message.usage, num_received))

    async def leave(self, prompt: Any, sampling: Sampling, tenant: str, request_id: str) -> None:
        answer = self.router().generate(prompt, sampling, tenant=tenant, request_id=request_id, timeout_s=30)
        async with contextlib.aclosing(answer):
            async for _ in answer:
                self.counts["left"] += 1
                return

    def router(self) -> RouterClient:
        addresses = self.deployment.addresses("router")
        address = self.chance.choice(addresses) if addresses else next(iter(self.routers))
        if address not in self.routers:
            self.routers[address] = RouterClient(address)
        return self.routers[address]


class Amounts(dict[Any, tuple[Decimal, int]]):
    """Cost and tokens of the events that a receiver gets. The events themselves are not kept, because they would fill
    memory.
    """

    def setdefault(self, id: Any, event: Any = None) -> Any:
        if id not in self:
            self[id] = _amounts_of(event)
        return self[id]


def _amounts_of(event: dict[str, Any]) -> tuple[Decimal, int]:
    data = event.get("properties") or event["data"]
    price = Decimal(str(data.get("price", data.get("amount", "0"))))
    return price, sum(int(data.get(name, 0)) for name in ("prompt_tokens", "output_tokens"))


class Forgets(list[Any]):
    """A list that keeps none of the request bodies appended to it."""

    def append(self, _: Any) -> None:
        return


def receiver() -> BillingSystem:
    system = BillingSystem()
    system.taken, system.heads, system.bodies = Amounts(), Forgets(), Forgets()
    return system


def push(kind: str, ledgers: list[Path], state: Path, system: BillingSystem, chance: random.Random) -> None:
    """Push all remaining events to one receiver, although some of its answers are lost."""
    state.mkdir(exist_ok=True)
    config = SinkConfig(name="hook", kind=kind, url=system.url, key="secret", unmapped="name")
    system.answers = [chance.choice((0, 500, 503)) for _ in range(20)]
    Pusher(config, open_sink(config), ledgers, state, sleep=lambda _: None).push()


def check(clients: Clients, config: DeploymentConfig, systems: dict[str, BillingSystem]) -> dict[str, Any]:
    """Compare the bills; each disagreement is added to `faults`."""
    ledgers = ledgers_of([config.data_dir])
    items = [item for ledger in ledgers for item in read_billed(ledger)]
    charged: defaultdict[Key, Decimal] = defaultdict(Decimal)
    dearest: defaultdict[Key, Decimal] = defaultdict(Decimal)
    finals: defaultdict[Key, list[UsageRecord]] = defaultdict(list)
    statuses: Counter[str] = Counter()
    cards: Counter[str] = Counter()
    for item in items:
        if isinstance(item, Adjusted):
            charged[item.adjustment.tenant, item.adjustment.request_id] += item.adjustment.amount
            continue
        record = item.record
        key = (record.tenant, record.request_id)
        statuses[record.status.value] += 1
        cards[record.rate_card] += 1
        charged[key] += record.price
        dearest[key] = max(dearest[key], record.paid)
        if record.is_final:
            finals[key].append(record)
    faults = [
        f"{key}: charged {charged[key]}, its most expensive attempt {dearest[key]}"
        for key in dearest
        if charged[key] != dearest[key]
    ]
    for key, (usage, num_received) in clients.seen.items():
        told = (usage.prompt_tokens, usage.cache_hit_tokens, usage.cache_miss_tokens, usage.output_tokens)
        if told not in [_told(record) for record in finals[key]] or num_received != usage.output_tokens:
            faults.append(f"{key}: told {told} and given {num_received}, which no final record says")
    billed = sum(charged.values(), Decimal(0))
    tokens = sum(_tokens(item) for item in items)
    received = {}
    for name, system in systems.items():
        held = sum((price for price, _ in system.taken.values()), Decimal(0))
        held_tokens = sum(number for _, number in system.taken.values())
        received[name] = {"entries": len(system.taken), "price": str(held), "tokens": held_tokens}
        if (len(system.taken), held, held_tokens) != (len(items), billed, tokens):
            faults.append(f"{name} has {received[name]}, the ledgers {len(items)} entries, {billed}, {tokens} tokens")
    verdict = verify_all(
        ledgers, store_log=config.usage_log_dir, anchors={}, signed=read_anchors(config.anchors), are_all=True
    )
    if not verdict.ok:
        faults.append(verdict.to_json())
    return {
        "requests": len(clients.seen),
        "counts": dict(sorted(clients.counts.items())),
        "entries": len(items),
        "statuses": dict(statuses),
        "records_by_price": dict(cards),
        "adjustments": sum(isinstance(item, Adjusted) for item in items),
        "hit_tokens": sum(item.record.cache_hit_tokens for item in items if not isinstance(item, Adjusted)),
        "tokens": tokens,
        "price": str(billed),
        "received": received,
        "final_records_beyond_one": sum(len(group) - 1 for group in finals.values() if group),
        "faults": len(faults),
        "examples": faults[:10],
    }


def _told(record: UsageRecord) -> tuple[int, int, int, int]:
    return record.prompt_tokens, record.cache_hit_tokens, record.cache_miss_tokens, record.output_tokens


def _tokens(item: Any) -> int:
    return 0 if isinstance(item, Adjusted) else item.record.prompt_tokens + item.record.output_tokens


async def live(directory: Path, args: argparse.Namespace, system: BillingSystem) -> tuple[Clients, Deployment]:
    chance = random.Random(args.seed)
    write_tenants(directory / "tenants.toml", tokens=10**12)
    add_card(directory / "cards.toml", 1, datetime(2020, 1, 1, tzinfo=UTC))
    redis = RedisServer(directory)
    await asyncio.to_thread(redis.start)
    config = DeploymentConfig(
        model=small_worker_model(),
        data_dir=directory / "data",
        num_prefill=0,
        num_decode=2,
        num_routers=args.routers,
        bill_redis=redis.url,
        ratecards=(str(directory / "cards.toml"),),
        tenants_file=str(directory / "tenants.toml"),
        anchors=(str(directory / "anchors.jsonl"),),
        extra_flags={"kvstore": ("--budget-bytes", "256M"), "decode": ("--pool-bytes", "64M")},
    )
    deployment = Deployment(config)
    try:
        await deployment.start()
        clients = Clients(deployment, args, chance)
        failures = Failures(directory, deployment, redis, clients.progress, chance)
        failures.counts = clients.counts
        tasks = failures.tasks(args.kills, webhook=system.url)
        telling = asyncio.create_task(_tell(clients, args.status))
        await clients.run()
        # Wait until all failures that were spread over the run have happened.
        await asyncio.gather(*tasks)
        telling.cancel()
        await end(deployment, redis, failures)
    finally:
        await deployment.stop()
        redis.kill()
    return clients, deployment


async def end(deployment: Deployment, redis: RedisServer, failures: Failures) -> None:
    """Start every router once more, so that it settles requests left open before and sends all data to Redis."""
    await asyncio.to_thread(redis.start) if redis.process is None else None
    for process in [each for each in deployment.processes if each.role == "router"]:
        await deployment.kill(process)
        await failures.restart(process)
    await asyncio.sleep(20)


async def _tell(clients: Clients, path: Path | None) -> None:
    while True:
        await asyncio.sleep(10)
        if path is not None:
            seconds = round(time.monotonic() - clients.started)
            said = json.dumps({"seconds": seconds, **dict(sorted(clients.counts.items()))}) + "\n"
            await asyncio.to_thread(path.write_text, said)


def save(clients: Clients, path: Path) -> None:
    """Write the usage that clients were told, one request per line."""
    with path.open("w") as file:
        for key, (usage, num_received) in clients.seen.items():
            file.write(json.dumps([*key, num_received, asdict(usage)], default=str) + "\n")


def under_a_clock(args: argparse.Namespace) -> int:
    """Run this program again in a process that shares its shifted clock with all processes that it starts."""
    with contextlib.ExitStack() as stack:
        directory = args.keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        directory.mkdir(parents=True, exist_ok=True)
        write_clock(directory, 0)
        command = [sys.executable, "-m", "benchmarks.bill_routers", *sys.argv[1:]]
        return subprocess.run(command, env={**os.environ, **clock_environment(directory)}, check=False).returncode


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--routers", type=int, default=3)
    parser.add_argument(
        "--kills", type=int, default=20, help="number of times that each kind of process is killed during the run"
    )
    parser.add_argument(
        "--until-s",
        type=float,
        default=0.0,
        help="stop sending requests after this many seconds (0: send all requests)",
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--status", type=Path, help="file to which the progress of the run is written every 10 s")
    parser.add_argument("--keep", type=Path, help="working directory, which is kept")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if "ANTEFIX_CLOCK_FILE" not in os.environ:
        sys.exit(under_a_clock(args))
    started, directory = time.perf_counter(), Path(os.environ["ANTEFIX_CLOCK_FILE"]).parent
    installed = [kind for kind, package in CLIENTS.items() if importlib.util.find_spec(package)]
    systems = {kind: receiver() for kind in ("webhook", *installed)}
    clients, deployment = asyncio.run(live(directory, args, systems["webhook"]))
    save(clients, directory / "seen.jsonl")
    ledgers = ledgers_of([deployment.config.data_dir])
    for kind, system in systems.items():
        state = directory / ("push" if kind == "webhook" else f"push-{kind}")
        push(kind, ledgers, state, system, random.Random(args.seed))
    result = check(clients, deployment.config, systems)
    for system in systems.values():
        system.close()
    result["seconds"] = round(time.perf_counter() - started)
    print(json.dumps(result, indent=1))
    if args.out:
        run_record.write(args.out, result)
    sys.exit(bool(result["faults"]))


if __name__ == "__main__":
    main()
