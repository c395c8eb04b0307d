"""Builds a router from its parts and connects them. The calls that use the router's parts are in server.py and
gateway/.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import replace

from prometheus_client.core import Metric

from antefix.block import CPU_FLOAT32, exactness_of
from antefix.discovery import Source
from antefix.discovery.finders import finders, without_finders
from antefix.errors import FingerprintMismatch
from antefix.events.event_seal import EventKeys
from antefix.layout import KVFormat
from antefix.model_dir import ModelIdentity
from antefix.redis_access import RedisAccess
from antefix.secret import Keyring
from antefix.security.grants import Granter
from antefix.security.identity import Role
from antefix.store.api import Store
from antefix.store.breaker_metrics import breaker_metrics
from antefix.store.feed_room import FeedRoom
from antefix.store.many_stores import ManyStores
from antefix.store.store_feed import StoreFeed
from antefix.tokenizer import Tokenizer
from antefix_router.breakpoint_pins import BreakpointPins
from antefix_router.front import Front, open_front
from antefix_router.generation import Generator
from antefix_router.hedging import HedgeBudget
from antefix_router.key_changes import follow_keys
from antefix_router.live_books import LiveBooks
from antefix_router.load_shedding import LoadShedding
from antefix_router.metrics import (
    accounts_metrics,
    finding_metrics,
    hedge_metrics,
    key_metrics,
    lost_metrics,
    placement_metrics,
    reload_metrics,
    router_metrics,
    shedding_metrics,
    store_names_metrics,
)
from antefix_router.naming import PromptNames
from antefix_router.page.prefix_forest import PrefixForest
from antefix_router.placement.directory import Directory
from antefix_router.placement.found_workers import FoundWorkers, Status
from antefix_router.placement.leases import Leases
from antefix_router.placement.memory_feed import MemoryFeed
from antefix_router.placement.policy import make_policy
from antefix_router.placement.sessions import Sessions
from antefix_router.placement.workers import WorkerRole, Workers
from antefix_router.prefill_calls import Limits
from antefix_router.prefilling import Prefilling
from antefix_router.readiness import why_unready
from antefix_router.router_config import RouterConfig
from antefix_router.workers_arithmetic import Said, difference, learn

log = logging.getLogger("antefix_router")


class Router:
    """All parts of a router behind its gRPC and HTTP calls. `learn` must be called first, then `start`, and `close` at
    the end.

    fingerprint: the digest that is part of every block's name. The fingerprint changes if the workers turn out to
    compute with another arithmetic.
    """

    def __init__(
        self,
        identity: ModelIdentity,
        tokenizer: Tokenizer,
        store: Store,
        config: RouterConfig,
        *,
        granter: Callable[[], Granter | None] = lambda: None,
        may_call: Callable[[str], object] = lambda address: None,
    ) -> None:
        """granter: returns the signer of grants that workers and the store demand; None if they demand no grants.
        may_call: raises ConfigError for an address that was found and must not be called.
        """
        self.identity = identity
        self.tokenizer = tokenizer
        self.store = store
        self.config = config
        # Without workers no block can be named, because the first worker's arithmetic is part of the names.
        self.arithmetic = config.arithmetic or CPU_FLOAT32
        self.fingerprint = self._fingerprint_of(self.arithmetic)
        weight = config.compute_weight
        self.prefill, self.decode = (
            Workers(role, make_policy(config.policy, compute_weight=weight), without_finders(named))
            for role, named in ((WorkerRole.PREFILL, config.prefill), (WorkerRole.DECODE, config.decode))
        )
        keyring = Keyring.from_file(config.secret_file)
        self._names = PromptNames(
            fingerprint=self.fingerprint,
            keyring=keyring,
            block_size=identity.geometry.block_size,
            replay_tokens=identity.geometry.replay_tokens,
            granter=granter,
        )
        directory, sessions = Directory(), Sessions()
        self.budget = HedgeBudget()
        events = RedisAccess.of(config.events_redis, config) if config.events_redis else ""
        event_keys = EventKeys.of(keyring)
        self.feed = self._store_feed(events, event_keys)
        self._prefilling = self._open_prefilling(directory, sessions)
        self.counters = self._prefilling.counters
        self.keyring = keyring
        self.memory = MemoryFeed(directory, redis_url=events, keys=event_keys, callee=self._callee)
        self.leases = Leases(
            self.prefill,
            self.decode,
            directory,
            fingerprint=self.fingerprint,
            memory=self.memory,
            block_size=identity.geometry.block_size,
        )
        self.found = FoundWorkers(_finders(config, event_keys), self.leases, admit=self.admit, may_call=may_call)
        self.pins = BreakpointPins(store, lambda: self.fingerprint)
        self.forest = PrefixForest()
        self.front: Front = open_front(
            config,
            self._generator(directory, sessions),
            identity=identity,
            tokenizer=tokenizer,
            keyring=keyring,
            fingerprint=self.fingerprint,
            shedding=LoadShedding(config.wait_s_max, lambda: len(self.decode.workers)),
        )
        self.key_changes = follow_keys(config, self.front.keys, keyring)
        self.live_books = LiveBooks(config, self.front)

    def _store_feed(self, events: str | RedisAccess, keys: EventKeys) -> StoreFeed:
        """Follows the store's events of stored and dropped blocks. events: the Redis server that carries them; empty:
        the store's own stream is used.
        """
        config = self.config
        return StoreFeed(
            self.store.watch,
            fingerprint=self.fingerprint,
            room=FeedRoom(config.store_events_bytes),
            redis_url=events if config.store_events else "",
            name=config.store_address,
            keys=keys,
        )

    def _open_prefilling(self, directory: Directory, sessions: Sessions) -> Prefilling:
        config = self.config
        return Prefilling(
            self.prefill,
            self.store,
            directory,
            fingerprint=self.fingerprint,
            limits=Limits(prefill_tokens_min=config.prefill_tokens_min, ttft_s_max=config.ttft_s_max),
            num_decoding=self.decode.num_running_least,
            sessions=sessions,
            budget=self.budget,
            # With several stores, the store client itself keeps what the events said.
            feed=self.feed if config.store_events and not config.stores else None,
        )

    def _generator(self, directory: Directory, sessions: Sessions) -> Generator:
        return Generator(
            self._prefilling,
            self.decode,
            self._names,
            directory,
            self.pins,
            sessions,
            budget=self.budget,
            between_tokens=lambda seconds, number: self.front.accounts.measures.note_pace(seconds, number),
            on_named=lambda prompt: self.forest.note(prompt.chain.hashes, prompt.owner),
        )

    def why_unready(self) -> str:
        """Why a request could not be served now; empty if a request could be served. The router can serve without
        prefill workers, because decode workers can prefill.
        """
        return why_unready(self.front.accounts, self.decode)

    def start(self) -> None:
        """Follow workers' leases, changes of API keys and, if configured, the store's events."""
        self.leases.start()
        self.found.start()
        if self.key_changes is not None:
            self.key_changes.start()
        self.front.start()
        self.live_books.start()
        if isinstance(self.store, ManyStores):
            self.store.follow(self.fingerprint)
        elif self.config.store_events:
            self.feed.start()

    async def close(self) -> None:
        await self.live_books.close()
        await self.front.close()
        if self.key_changes is not None:
            await self.key_changes.close()
        await self.found.close()
        await self.leases.close()
        await self.feed.close()
        await self.pins.close()
        await self.store.close()

    def _callee(self, address: str) -> tuple[Role | None, str]:
        found = (group.find(address) for group in (self.prefill, self.decode))
        worker = next((worker for worker in found if worker is not None), None)
        return (None, "") if worker is None else (Role(worker.role.value), worker.name)

    def _fingerprint_of(self, arithmetic: str) -> bytes:
        config = self.config
        return self.identity.fingerprint(
            KVFormat(config.kv_format),
            namespace=config.namespace,
            exactness=exactness_of(config.bounded_windows),
            arithmetic=arithmetic,
        ).digest

    async def learn(self) -> None:
        """Ask the workers in the settings which arithmetic they compute with.  Raises:  ConfigError: they differ."""
        workers = [*self.prefill.workers, *self.decode.workers]
        if workers and not self.config.arithmetic:
            self._adopt(await learn(workers))

    def _adopt(self, arithmetic: str) -> None:
        """Use this arithmetic in all block names from now on."""
        log.info("workers compute %s", arithmetic)
        self.arithmetic, self.fingerprint = arithmetic, self._fingerprint_of(arithmetic)
        self._names.fingerprint = self._prefilling.fingerprint = self.leases.fingerprint = self.fingerprint
        self.feed.rename(self.fingerprint)
        if isinstance(self.store, ManyStores):
            self.store.follow(self.fingerprint)
        accounts = self.front.accounts
        accounts.served = replace(accounts.served, fingerprint=self.fingerprint.hex())

    def admit(self, role: WorkerRole, address: str, status: Status) -> None:
        """Give work to a worker that was found by DNS or Redis. Raises: FingerprintMismatch: the worker computes other
        KV than this router names, so it cannot serve here.
        """
        arithmetic, setup = status.arithmetic, status.setup
        self.check_arithmetic(role, address, fingerprint=status.fingerprint, arithmetic=arithmetic, setup=setup)
        self.leases.add_found(role, address, fingerprint=status.fingerprint, arithmetic=arithmetic, setup=setup)

    def check_arithmetic(self, role: str, address: str, *, fingerprint: bytes, arithmetic: str, setup: str) -> None:
        """If the router does not know the arithmetic yet, it takes the arithmetic of this worker. Otherwise the worker
        must have the arithmetic that the router knows.

        Raises:  FingerprintMismatch: this worker computes with another arithmetic.
        """
        if not arithmetic or arithmetic == self.arithmetic:
            return
        others = [*self.prefill.workers, *self.decode.workers]
        is_ours = fingerprint == self._fingerprint_of(arithmetic)
        if is_ours and not others and not self.config.arithmetic:
            self._adopt(arithmetic)
        elif is_ours:
            known = next((other for other in others if other.arithmetic), None)
            who = f"{known.role} worker {known.address}" if known else "this router's --arithmetic"
            here = Said(who=who, arithmetic=self.arithmetic, setup=known.setup if known else "a setting")
            who = f"{role} worker {address}"
            raise FingerprintMismatch(difference(here, Said(who=who, arithmetic=arithmetic, setup=setup)))

    def _feeds(self) -> list[StoreFeed]:
        """The feeds of all stores whose events are followed."""
        if not isinstance(self.store, ManyStores):
            return [self.feed]
        return [member.feed for member in self.store.members.stores if member.feed is not None]

    def metrics(self) -> Iterable[Metric]:
        """The router's metrics, apart from those of its HTTP server. Read in the event loop."""
        yield from accounts_metrics(self.front.accounts)
        yield from placement_metrics((self.prefill, self.decode), self.config.policy, self.memory.in_step)
        yield from lost_metrics(self.leases.lost(time.monotonic()))
        yield from finding_metrics(self.found)
        yield from hedge_metrics(self.budget)
        yield from shedding_metrics(self.front.shedding)
        yield from router_metrics(self.counters, self.memory, self.feed)
        yield from store_names_metrics(self._feeds())
        if (breaker := getattr(self.store, "breaker", None)) is not None:
            yield from breaker_metrics(breaker)
        yield from key_metrics(self.front.keys, self.key_changes)
        yield from reload_metrics(self.live_books)


def _finders(config: RouterConfig, keys: EventKeys) -> dict[WorkerRole, list[Source]]:
    return {
        WorkerRole.PREFILL: finders(config.prefill, config, role=Role.PREFILL, keys=keys),
        WorkerRole.DECODE: finders(config.decode, config, role=Role.DECODE, keys=keys),
    }
