"""Builds a fleet's router from its parts, and connects the parts. The calls that use these parts are in fleet_server.py
and fleet_door.py.
"""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client.core import Metric

from antefix.secret import Keyring
from antefix_router.fleet.engines import Engines
from antefix_router.fleet.fleet_config import FleetConfig
from antefix_router.fleet.fleet_door import FleetDoor
from antefix_router.fleet.fleet_metrics import fleet_metrics
from antefix_router.fleet.fleet_names import FleetNames
from antefix_router.fleet.fleet_placing import FleetPlacing
from antefix_router.fleet.passing import Passing
from antefix_router.fleet.prompt_tokens import PromptTokens
from antefix_router.front import BilledFront, open_books
from antefix_router.key_changes import follow_keys
from antefix_router.live_books import LiveBooks
from antefix_router.metrics import accounts_metrics, key_metrics, placement_metrics, reload_metrics
from antefix_router.page.prefix_forest import PrefixForest
from antefix_router.placement.directory import Directory
from antefix_router.placement.policy import make_policy
from antefix_router.placement.workers import WorkerRole, Workers


class FleetRouter:
    """All parts of a fleet's router behind its gRPC and HTTP calls. `start` must be called first, and `close` at the
    end.
    """

    def __init__(self, config: FleetConfig, keyring: Keyring) -> None:
        """Raises:  ConfigError: a file in the settings cannot be used.  LedgerCorrupt."""
        self.config = config
        policy = make_policy(config.policy, compute_weight=config.compute_weight)
        self.workers = Workers(WorkerRole.FOREIGN, policy)
        self.directory = Directory(config.directory_blocks)
        names = FleetNames(keyring)
        self.engines = Engines(config, self.workers, self.directory, names)
        self.forest = PrefixForest()
        self.placing = FleetPlacing(config, self.engines, self.workers, self.directory, names)
        self.passing = Passing(
            self.placing,
            self.workers,
            on_named=lambda prompt: self.forest.note(prompt.chain.hashes, prompt.owner),
        )
        # Records have the name of the requested model. The fingerprint of its blocks is known only to the workers.
        accounts, _, keys, signer = open_books(config, keyring)
        self.front = BilledFront(self.passing.run, accounts, keys=keys, signer=signer)
        self.key_changes = follow_keys(config, keys, keyring)
        self.live_books = LiveBooks(config, self.front)
        self.door = FleetDoor(self.front, config, self.engines, PromptTokens(self.engines.engines, self.workers))

    async def start(self) -> None:
        """Ask the workers which models they serve, and follow their events and changes of API keys."""
        if self.key_changes is not None:
            self.key_changes.start()
        self.front.start()
        self.live_books.start()
        await self.engines.start()

    async def close(self) -> None:
        await self.live_books.close()
        await self.front.close()
        if self.key_changes is not None:
            await self.key_changes.close()
        await self.engines.close()

    def metrics(self) -> Iterable[Metric]:
        """The router's metrics, apart from those of its HTTP server. Read in the event loop."""
        yield from accounts_metrics(self.front.accounts)
        known = {engine.place.address: engine.tells for engine in self.engines.engines}
        yield from placement_metrics((self.workers,), self.config.policy, lambda address: known.get(address, False))
        yield from fleet_metrics(self.engines, self.placing.counters)
        yield from key_metrics(self.front.keys, self.key_changes)
        yield from reload_metrics(self.live_books)
