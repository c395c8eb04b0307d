"""What a worker tells routers about the stores and tiers that it reads: their speeds, and which stores are near."""

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
    """Speeds by name: of the stores in `names`, near stores, and tiers that are not stores. Empty for one store."""
    store = engine.store
    if not isinstance(store, ManyStores):
        return {}
    members, token_bytes = store.members, engine.layout.block_bytes / engine.block_size
    return {
        tier.name: _speed(tier.speed, token_bytes)
        for number, tier in enumerate(members.tiers)
        if tier.name in names or members.is_near(number) or number >= len(members.stores)
    }


def _speed(speed: TierSpeed, token_bytes: float) -> ReadSpeed:
    latency_s, seconds_per_byte = speed.coefficients
    return ReadSpeed(latency_s=latency_s, seconds_per_token=seconds_per_byte * token_bytes)
