"""Everything that the page shows, as one JSON object. This module reads the router's state and changes nothing."""

from __future__ import annotations

import asyncio
import datetime
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, Final

from antefix.clients.about import ask_about
from antefix.errors import AntefixError
from antefix.security.identity import Role
from antefix.store.api import Store
from antefix.store.many_stores import ManyStores
from antefix.store.open_store import store_addresses
from antefix.store.store_stats import StoreTotals, sum_of
from antefix.version import __version__
from antefix_billing.limits import QuotaBook
from antefix_router.assembly import Router
from antefix_router.page.activity import Activity
from antefix_router.page.explained import explained
from antefix_router.page.prefix_forest import PrefixForest, Run

_REQUESTS_SHOWN: Final = 100
_TENANTS_SHOWN: Final = 50
_RUNS_SHOWN: Final = 150
# How many runs' checkpoints are looked up. Each takes one look-up, and a page refreshes every few seconds.
_RUNS_LOOKED_UP: Final = 12
_STORE_FRESH_S: Final = 2.0
# How long a process's version is cached. It changes only when the process is replaced.
_VERSIONS_FRESH_S: Final = 30.0
# Upper bounds in seconds of the time since a prefix was used; the last bucket holds the rest.
AGES_S: Final = (60, 600, 3600, 86_400)


class View:
    """The page's data for one router."""

    def __init__(self, router: Router, store: Store, activity: Activity, forest: PrefixForest) -> None:
        self._router = router
        self._store = store
        self._activity = activity
        self._forest = forest
        self._totals: StoreTotals | None = None
        # Set if there are several stores.
        self._by_store: dict[str, StoreTotals] = {}
        self._checkpoints: dict[bytes, tuple[int, ...]] = {}
        self._store_error = ""
        self._store_read_at = -_STORE_FRESH_S
        self._versions: dict[str, str] = {}
        self._versions_read_at = -_VERSIONS_FRESH_S

    async def data(self, seconds: int) -> dict[str, Any]:
        """seconds: the length of the time series before now."""
        activity, router = self._activity, self._router
        await asyncio.gather(self._read_store(), self._read_versions())
        return {
            "at": time.time(),
            "version": __version__,
            "model": router.identity.name,
            "arithmetic": router.arithmetic,
            "block_size": router.identity.geometry.block_size,
            "policy": router.config.policy,
            "started_at": activity.started_at,
            "running": router.front.accounts.num_running,
            "refused": router.counters.num_refused,
            "total": asdict(activity.total),
            "over": {str(span): asdict(activity.over(span)) for span in (60, 300, 3600)},
            "series": activity.series(seconds),
            "miss_tokens": dict(activity.miss_tokens.most_common()),
            "workers": self._workers(),
            "store": self._store_data(),
            "forest": prefix_rows(self._forest, router.identity.geometry.block_size, self._checkpoints),
            "requests": request_rows(activity),
            "tenants": tenant_rows(activity, router.front.accounts.quotas),
        }

    def _workers(self) -> list[dict[str, Any]]:
        now = time.monotonic()
        return [
            {
                "role": worker.role.value,
                "address": worker.address,
                "serving": not worker.is_shunned(now),
                "draining": worker.draining,
                "requests": worker.num_requests,
                "tokens_queued": worker.num_tokens,
                "served": worker.num_served,
                "memory_known": self._router.memory.in_step(worker.address),
                "arithmetic": worker.arithmetic,
                "setup": worker.setup,
                "version": self._versions.get(worker.address, ""),
            }
            for workers in (self._router.prefill, self._router.decode)
            for worker in workers.workers
        ]

    async def _read_versions(self) -> None:
        if time.monotonic() - self._versions_read_at < _VERSIONS_FRESH_S:
            return
        self._versions_read_at = time.monotonic()
        workers = [(worker.role, worker.address) for worker in self._router.prefill.workers]
        workers += [(worker.role, worker.address) for worker in self._router.decode.workers]
        asked = [(Role(role.value), address) for role, address in workers]
        asked += [(Role.KVSTORE, address) for address in self._store_addresses()]
        found = await asyncio.gather(*(_version(role, address) for role, address in asked if address))
        self._versions = dict(zip((address for _, address in asked if address), found, strict=True))

    async def _read_store(self) -> None:
        if time.monotonic() - self._store_read_at < _STORE_FRESH_S:
            return
        self._store_read_at = time.monotonic()
        try:
            if isinstance(self._store, ManyStores):
                self._by_store = await self._store.stats_by_store()
                self._totals = sum_of(list(self._by_store.values()))
            else:
                self._totals = await self._store.stats()
            self._checkpoints = {
                run.hashes[0]: await self._checkpoints_of(run) for run in largest_runs(self._forest)[:_RUNS_LOOKED_UP]
            }
            self._store_error = ""
        except AntefixError as err:
            self._store_error = str(err)

    async def _checkpoints_of(self, run: Run) -> tuple[int, ...]:
        """The numbers of blocks, counted from the run's beginning, after which the store has window state."""
        path = run.path
        found = await self._store.lookup(path, fingerprint=self._router.fingerprint)
        before = len(path) - len(run.hashes)
        return tuple(at - before for at in found.checkpoints if at > before)

    def _store_data(self) -> dict[str, Any]:
        if self._totals is None:
            return {"error": self._store_error or "not read yet"}
        shown = asdict(self._totals)
        shown["kinds"] = [{"kind": kind.name.lower(), **asdict(kinds)} for kind, kinds in self._totals.kinds.items()]
        addresses = self._store_addresses()
        version = next((known for each in addresses if (known := self._versions.get(each, ""))), "")
        more = {"error": self._store_error, "ages": self._ages(), "version": version, "stores": self._stores_data()}
        return shown | more

    def _store_addresses(self) -> list[str]:
        if isinstance(self._store, ManyStores):
            return [member.address for member in self._store.members.stores]
        return [where.address for where in store_addresses(self._router.config)]

    def _stores_data(self) -> list[dict[str, Any]]:
        """One row per store if there are several stores; empty if there is only one."""
        store = self._store
        if not isinstance(store, ManyStores):
            return []
        return [
            {
                "name": tier.name,
                "answers": tier.name in self._by_store and not tier.is_shunned,
                "failures": tier.num_failures,
                "used_bytes": found.used_bytes,
                "budget_bytes": found.limit_bytes or found.budget_bytes,
                "records": sum(kind.num_records for kind in found.kinds.values()),
                "evictions": found.evictions,
                "stopped": found.stopped,
            }
            for tier in store.tiers
            for found in [self._by_store.get(tier.name, StoreTotals())]
        ]

    def _ages(self) -> list[dict[str, Any]]:
        """How many tokens the prefixes that this router has seen contain, by the time since the prefixes were last
        used.
        """
        size, now = self._router.identity.geometry.block_size, time.time()
        tokens = [0] * (len(AGES_S) + 1)
        for run in self._forest.walk():
            bucket = next((i for i, bound in enumerate(AGES_S) if now - run.used_at <= bound), len(AGES_S))
            tokens[bucket] += len(run.hashes) * size
        return [{"up_to_s": bound, "tokens": count} for bound, count in zip((*AGES_S, None), tokens, strict=True)]


def _parent_kept(run: Run, kept: set[int]) -> bool:
    while run.parent is not None:
        if id(run.parent) not in kept:
            return False
        run = run.parent
    return True


def largest_runs(forest: PrefixForest) -> list[Run]:
    """The runs ordered by how many tokens sharing them saves; a run always comes after its parent."""
    saved = sorted(forest.walk(), key=lambda run: -len(run.hashes) * run.num_prompts)[:_RUNS_SHOWN]
    kept = {id(run) for run in saved}
    return [run for run in forest.walk() if id(run) in kept and _parent_kept(run, kept)]


def prefix_rows(
    forest: PrefixForest, block_size: int, checkpoints: Mapping[bytes, Sequence[int]] | None = None
) -> list[dict[str, Any]]:
    """checkpoints: for each run, by its first hash, the numbers of blocks after which the store has window state."""
    numbers: dict[int, int] = {}
    shown = []
    for number, run in enumerate(largest_runs(forest)):
        numbers[id(run)] = number
        shown.append(
            {
                "parent": None if run.parent is None else numbers[id(run.parent)],
                "tokens": len(run.hashes) * block_size,
                "prompts": run.num_prompts,
                "tenants": len(run.tenants),
                "used_at": run.used_at,
                "name": run.hashes[-1].hex()[:12],
                "checkpoints": [at * block_size for at in (checkpoints or {}).get(run.hashes[0], ())],
            }
        )
    return shown


def request_rows(activity: Activity) -> list[dict[str, Any]]:
    """The newest requests first, each with the reason why its prompt hit or missed."""
    newest = reversed(list(activity.newest)[-_REQUESTS_SHOWN:])
    return [ended.as_dict() | {"explained": explained(ended.record)} for ended in newest]


def tenant_rows(activity: Activity, quotas: QuotaBook) -> list[dict[str, Any]]:
    """The busiest tenants first, with their remaining limits."""
    now = datetime.datetime.now(datetime.UTC)
    rows = []
    for name, tenant in activity.busiest(_TENANTS_SHOWN):
        limits = quotas.limits_of(name)
        windows = []
        for limit in limits.limits:
            tokens, money = quotas.used(name, limit.window, now)
            windows.append(
                {
                    "window": limit.window.value,
                    "tokens": limit.tokens,
                    "used_tokens": tokens,
                    "money": None if limit.money is None else str(limit.money),
                    "used_money": str(money),
                }
            )
        rows.append(
            {
                "tenant": name,
                **asdict(tenant.totals),
                "miss_tokens": dict(tenant.miss_reasons.most_common(5)),
                "limits": windows,
                "requests_max": limits.requests,
            }
        )
    return rows


async def _version(role: Role, address: str) -> str:
    """The version of a process; empty if the process does not report its version, as older versions do not."""
    try:
        return (await ask_about(address, role=role)).version
    except AntefixError:
        return ""
