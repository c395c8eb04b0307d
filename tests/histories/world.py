"""One history: a router, a store and workers in one process, clients, faults, and what must hold afterwards.

The classes are the real ones: StorageEngine and its recovery (commit), Prefilling and InFlight (coalescing),
PrefillCalls, Workers, Leases, Directory and Generator (placement, leases, hedging, failover, handoffs), Accounts,
LedgerWriter and Ledger (settlement), EventLog, watch_log and StoreFeed (events). Simulated are the model, the network,
what the disk has synced, the clock and the threads.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import Counter
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from antefix.end_tasks import end_tasks
from antefix.errors import AntefixError, Unavailable
from antefix.events.block_events import BlockEvent
from antefix.events.numbered_log import Batch, Cursor, watch_log
from antefix.generation_request import Caller, GenerationRequest
from antefix.sampling import Sampling
from antefix.secret import Keyring
from antefix.store.store_feed import StoreFeed
from antefix_billing.ledger import Ledger
from antefix_billing.ratecard import RateCards
from antefix_billing.tenants import TenantBook
from antefix_kvstore.kvstore_config import KvStoreConfig
from antefix_kvstore.storage_engine import StorageEngine
from antefix_router.accounting import Accounts
from antefix_router.breakpoint_pins import BreakpointPins
from antefix_router.generation import Generation, Generator
from antefix_router.open_bill import Served
from antefix_router.placement.directory import Directory
from antefix_router.placement.leases import Leases
from antefix_router.placement.policy import make_policy
from antefix_router.placement.sessions import Sessions
from antefix_router.placement.workers import WorkerRole, Workers
from antefix_router.prefill_calls import Limits
from antefix_router.prefilling import Prefilling
from tests.histories.checks import Broken, check
from tests.histories.faults import Faults
from tests.histories.network import Network
from tests.histories.simulated_loop import InlineExecutor, SimulatedLoop
from tests.histories.workers import (
    BLOCK,
    FINGERPRINT,
    KnownPrompts,
    SimDecode,
    SimPrefill,
    SimStore,
    Worker,
    token_of,
)
from tests.kvstore.power_loss import PowerLossDisk

KEYRING = Keyring(b"simulated secret")
NUM_REQUESTS = 11
NUM_FAULTS = 7
# Simulated seconds after the last client and fault, in which watchers catch up, leases are renewed, and hangs end.
QUIET_S, QUIET_AFTER_HANG_S = 8.0, 18.0
LEASE_S = 6.0
ROLES = (WorkerRole.PREFILL, WorkerRole.DECODE)
ADDRESSES = ("127.0.0.1:7001", "127.0.0.1:7002", "127.0.0.1:7101", "127.0.0.1:7102")
CLIENT_S = 300.0


@dataclass(slots=True)
class Told:
    """What clients were told: by request id, how the request ended, and the ledger entry that says so."""

    answers: dict[str, list[int]] = field(default_factory=dict)
    prompts: dict[str, np.ndarray] = field(default_factory=dict)
    wanted: dict[str, int] = field(default_factory=dict)
    settled: dict[tuple[str, int], bytes] = field(default_factory=dict)
    errors: Counter[str] = field(default_factory=Counter)


class World:
    """All objects of one history.  counts: operations, faults and checks."""

    def __init__(self, directory: Path, loop: SimulatedLoop, rng: random.Random) -> None:
        self.directory = directory
        self.loop = loop
        self.rng = rng
        self.counts: Counter[str] = Counter()
        # (fault, time of its end), and the times of answers.
        self.over: list[tuple[str, float]] = []
        self.answered_s: list[float] = []
        self.told = Told()
        self.network = Network(rng, self.counts)
        self.faults = Faults(self, rng)
        self.disk = PowerLossDisk()
        self.store = SimStore(self.network)
        self.ttl_s = rng.choice([0.0, 0.0, 72 * 3600.0])
        # True: a fault may have hurt any record, so no acknowledged record is promised any more.
        self.may_lose_store = False
        self.names = KnownPrompts(fingerprint=FINGERPRINT, keyring=KEYRING, block_size=BLOCK)
        self.workers: dict[str, Worker] = {}
        self.handoffs: set[bytes] = set()
        self.open_store()
        self.feed = StoreFeed(self.watch, fingerprint=FINGERPRINT)
        for address in ADDRESSES:
            self.workers[address] = Worker(self.store, self.names, random.Random(rng.random()), self.handoffs)
        # A dict keeps the order. A set's order depends on addresses, so a seed would not always give the same history.
        self.asking: dict[asyncio.Future[None], None] = {}
        self.open_router()

    @property
    def recovery_s(self) -> dict[str, list[float]]:
        """By fault, seconds from its end to the next complete answer, if there was one."""
        found: dict[str, list[float]] = {}
        for kind, over_s in self.over:
            later = [at_s - over_s for at_s in self.answered_s if at_s >= over_s]
            if later:
                found.setdefault(kind, []).append(min(later))
        return found

    # --- roles ---------------------------------------------------------------------------------------------------

    def open_store(self) -> None:
        config = KvStoreConfig(
            dir=str(self.directory / "store"),
            budget_bytes=64 << 20,
            compression="off",
            scrub_bytes_per_s=0,
            block_ttl_s=self.ttl_s,
        )
        self.store_gone = Gone()
        engine = StorageEngine(config, disk=self.disk, clock_ms=lambda: int(self.loop.wall_s() * 1000))
        engine.writer.sync_thread = engine.reader._pool = InlineExecutor()
        # Helpers would run in turn, so one thread reads all.
        engine.reader._num_helpers = 0
        self.store.engine = engine

    def open_router(self) -> None:
        prefill, decode = (Workers(role, make_policy("least_work")) for role in ROLES)
        self.router_is_up = True
        self.prefill, self.decode = prefill, decode
        directory, sessions = Directory(), Sessions()
        # These leases do not watch gRPC's health, and this class removes expired ones.
        self.leases = Leases(prefill, decode, directory, fingerprint=FINGERPRINT)
        for address in self.workers:
            self.renew(address)
        self.prefilling = Prefilling(
            prefill,
            self.store,
            directory,
            fingerprint=FINGERPRINT,
            limits=Limits(prefill_tokens_min=BLOCK),
            feed=self.feed,
            sessions=sessions,
        )
        pins = BreakpointPins(self.store, lambda: FINGERPRINT)
        self.generator = Generator(self.prefilling, decode, self.names, directory, pins, sessions)
        self.accounts = Accounts(
            Ledger(self.directory / "ledger", segment_bytes=8192),
            served=Served(model="m", revision="r", fingerprint=FINGERPRINT.hex()),
            keyring=KEYRING,
            cards=RateCards(),
            tenants=TenantBook(),
        )

    def renew(self, address: str) -> None:
        """Register a worker with the router, which then reaches the worker over the simulated network."""
        worker, role = self.workers[address], ROLES[address not in ADDRESSES[:2]]
        self.leases.renew(role, address, instance=worker.instance, fingerprint=FINGERPRINT, ttl_s=LEASE_S)
        known = (self.prefill if role is WorkerRole.PREFILL else self.decode).find(address)
        made = SimPrefill if role is WorkerRole.PREFILL else SimDecode
        if not isinstance(known.client, made):
            known.client = made(address, worker, self.network)

    async def keep_lease(self, address: str) -> None:
        while True:
            await asyncio.sleep(LEASE_S / 3)
            self.counts["renewals"] += 1
            with contextlib.suppress(AntefixError):
                await self.network.way(address)
                if self.workers[address].alive and self.router_is_up:
                    self.renew(address)

    async def sweep_leases(self) -> None:
        while True:
            await asyncio.sleep(0.5)
            self.leases.expire(self.loop.time())

    def watch(self, cursor: Cursor | None = None) -> AsyncGenerator[Batch[BlockEvent], None]:
        return self._watch(cursor or Cursor())

    async def _watch(self, cursor: Cursor) -> AsyncGenerator[Batch[BlockEvent], None]:
        await self.network.way("store")
        engine = self.store._open()

        async def snapshot() -> AsyncGenerator[Batch[BlockEvent], None]:
            for piece in engine.snapshot():
                yield piece

        gone = self.store_gone
        async with contextlib.aclosing(watch_log(engine.events, cursor, snapshot)) as batches:
            while True:
                async with gone.ends_this():
                    batch = await anext(batches)
                await self.network.way("store")
                yield batch

    # --- clients -------------------------------------------------------------------------------------------------

    def draw_requests(self) -> list[GenerationRequest]:
        drawn = self.rng.random

        def tokens_of(count: int) -> list[int]:
            # What `choices` draws from 1,000 numbers, in half of its time.
            return [int(drawn() * 1000) for _ in range(count)]

        bases = [tokens_of(self.rng.randint(20, 90)) for _ in range(4)]
        requests = []
        for number in range(NUM_REQUESTS):
            base = self.rng.choice(bases)
            tokens = base[: self.rng.randint(len(base) // 2, len(base))] + tokens_of(BLOCK)
            if self.rng.random() < 0.3:
                tokens = base
            bases.append(tokens[:120])
            requests.append(
                GenerationRequest(
                    tokens=np.array(tokens, np.uint32),
                    sampling=Sampling(max_tokens=self.rng.randint(1, 12)),
                    caller=Caller(tenant=self.rng.choice("ab"), request_id=f"r{number}"),
                )
            )
        return requests

    async def client(self, request: GenerationRequest, at_s: float, patience_s: float) -> None:
        """Send a request, and send it again with the same id if the error allows that."""
        await asyncio.sleep(at_s)
        name = request.caller.request_id
        self.told.prompts[name], self.told.wanted[name] = request.tokens, request.sampling.max_tokens
        for _ in range(4):
            self.counts["requests"] += 1
            asking = asyncio.ensure_future(self._ask(name, request))
            self.asking[asking] = None
            try:
                async with asyncio.timeout(patience_s):
                    await asking
                return
            except asyncio.CancelledError:
                # This task was not cancelled. The router died, and the connection with it.
                self.told.errors["router died"] += 1
                await asyncio.sleep(self.rng.uniform(0.1, 2.0))
            except TimeoutError:
                self.told.errors["client left"] += 1
                return
            except AntefixError as err:
                self.told.errors[type(err).__name__] += 1
                await asyncio.sleep(self.rng.uniform(0.1, 2.0))
            finally:
                self.asking.pop(asking, None)

    async def _ask(self, name: str, request: GenerationRequest) -> None:
        accounts = self.accounts
        bill = await accounts.admit(request, generation=lambda it: Generation(it, started=self.loop.time()))
        given: list[int] = []
        try:
            async with contextlib.aclosing(accounts.run(bill, self.generator.run, CLIENT_S)) as pieces:
                async for piece in pieces:
                    given += [int(token) for token in piece.tokens]
        finally:
            right = [token_of(request.tokens, number) for number in range(len(given))]
            self.counts["answers checked"] += 1
            if given != right:
                raise Broken(f"{name} was given {given}, right is {right}")
        if len(given) != request.sampling.max_tokens:
            raise Broken(f"{name} ended after {len(given)} of {request.sampling.max_tokens} tokens")
        self.told.answers[name] = given
        self.answered_s.append(self.loop.now_s)
        record = bill.record
        if accounts is self.accounts:
            self.told.settled[record.event_id, bill.settled.sequence] = bill.settled.hash

    # --- the whole -----------------------------------------------------------------------------------------------

    async def run(self) -> None:
        self.feed.start()
        keeping = [asyncio.create_task(self.keep_lease(address)) for address in ADDRESSES]
        keeping.append(asyncio.create_task(self.sweep_leases()))
        tasks = [
            asyncio.create_task(
                self.client(
                    request, self.rng.uniform(0, 4), CLIENT_S if self.rng.random() < 0.8 else self.rng.uniform(0.01, 1)
                )
            )
            for request in self.draw_requests()
        ]
        rng = self.rng
        faults = [self.faults.happen(rng.uniform(0, 5)) for _ in range(rng.randint(1, NUM_FAULTS))]
        tasks += [asyncio.create_task(fault) for fault in faults]
        for outcome in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(outcome, BaseException):
                raise outcome
        await asyncio.sleep(QUIET_AFTER_HANG_S if any(kind == "hang" for kind, _ in self.over) else QUIET_S)
        await check(self)
        await end_tasks(keeping)


class Gone:
    """The end of the store's process, at which connections break."""

    def __init__(self) -> None:
        self._is_set = False
        self._waiting: dict[asyncio.Task[object], None] = {}

    def set(self) -> None:
        self._is_set = True
        for task in self._waiting:
            task.cancel()

    @contextlib.asynccontextmanager
    async def ends_this(self) -> AsyncGenerator[None, None]:
        """The block fails at once when the store goes. (A task and a wait per batch would take a fifth of a history.)

        Raises:  Unavailable: the store went away.
        """
        if self._is_set:
            # It went while the last batch was on its way, so nothing would end the wait any more.
            raise Unavailable("the store went away")
        task = asyncio.current_task()
        assert task is not None
        self._waiting[task] = None
        try:
            yield
        except asyncio.CancelledError:
            if not self._is_set or task.uncancel():
                raise
        finally:
            del self._waiting[task]
        if self._is_set:
            raise Unavailable("the store went away")
