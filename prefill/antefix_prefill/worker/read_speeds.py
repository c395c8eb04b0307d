"""The facts that a worker tells routers about the stores and tiers that it reads: their speeds, and which stores are
near.
"""

from __future__ import annotations

from collections.abc import Collection

from antefix.located import ReadSpeed
from antefix.store.api import Store
from antefix.store.many_stores import ManyStores
from antefix.store.tier import TierSpeed
from antefix_prefill.worker.engine import Engine


def near_stores(store: Store) -> list[str]:
    """Names of the stores that this worker writes to; empty if there is only one store."""
    return [member.tier.name for member in store.members.near] if isinstance(store, ManyStores) else []


def read_speeds(engine: Engine, names: Collection[str]) -> dict[str, ReadSpeed]:
    """Speeds by name: of the stores in `names`, near stores, and tiers that are not stores. Empty for one store.

    For a store whose files are read on this host, speeds are also given for its page cache and its disk, by their
    labels. The store's name alone then stands for a read of which it is not known how much is in the page cache: the
    share of the last minute is assumed.
    """
    store = engine.store
    if not isinstance(store, ManyStores):
        return {}
    members, token_bytes = store.members, engine.layout.block_bytes / engine.block_size
    speeds = {
        tier.name: _speed(tier.speed, token_bytes)
        for number, tier in enumerate(members.tiers)
        if tier.name in names or members.is_near(number) or number >= len(members.stores)
    }
    for member in members.stores:
        if member.page_cache is not None and member.tier.name in speeds:
            cache, disk = member.page_cache, member.tier
            speeds[cache.label], speeds[disk.label] = _speed(cache.speed, token_bytes), speeds[disk.name]
            read_bytes = cache.speed.recent_bytes + disk.speed.recent_bytes
            share = cache.speed.recent_bytes / read_bytes if read_bytes else 0.0
            speeds[disk.name] = _mixed(speeds[cache.label], speeds[disk.label], share)
    return speeds


def _speed(speed: TierSpeed, token_bytes: float) -> ReadSpeed:
    latency_s, seconds_per_byte = speed.coefficients
    return ReadSpeed(latency_s=latency_s, seconds_per_token=seconds_per_byte * token_bytes)


def _mixed(first: ReadSpeed, second: ReadSpeed, share: float) -> ReadSpeed:
    """share: the share of bytes that are read at the first speed."""
    return ReadSpeed(
        latency_s=share * first.latency_s + (1 - share) * second.latency_s,
        seconds_per_token=share * first.seconds_per_token + (1 - share) * second.seconds_per_token,
    )
