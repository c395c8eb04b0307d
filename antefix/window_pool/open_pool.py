"""The `window_pool` setting: "disk" (none), "memory", or the URL of a Redis server or cluster."""

from __future__ import annotations

from antefix.config import require
from antefix.store.api import Store
from antefix.store_files.seal import Seals
from antefix.window_pool.pool_api import WindowPool
from antefix.window_pool.redis_pool import RedisWindowPool
from antefix.window_pool.store_memory import StoreMemoryPool

DISK, MEMORY = "disk", "memory"
_SCHEMES = ("redis://", "rediss://", "redis+cluster://", "unix://")


def check_address(address: str) -> None:
    """Raises:  ConfigError: none of the three."""
    require(
        address in (DISK, MEMORY) or address.startswith(_SCHEMES),
        f"window_pool must be disk, memory or a URL ({', '.join(_SCHEMES)}...), is {address!r}",
    )


def open_window_pool(address: str, store: Store, *, bytes_max: int, seals: Seals | None = None) -> WindowPool | None:
    """The pool, connected when first used; None where all checkpoints go to disk.

    bytes_max: of a Redis server's memory; the store service has its own bound (`handoff_bytes_max`).
    seals: of the deployment, for Redis; `store` has its own.
    """
    check_address(address)
    if address == DISK:
        return None
    if address == MEMORY:
        return StoreMemoryPool(store)
    return RedisWindowPool(address, bytes_max=bytes_max, seals=seals)
