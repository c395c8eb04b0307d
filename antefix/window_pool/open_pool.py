"""The `window_pool` setting: "disk" (none), "memory", or the URL of a Redis server or cluster."""

from __future__ import annotations

from antefix.config import require
from antefix.redis_access import SCHEMES, RedisAccess, check_redis_url
from antefix.store.api import Store
from antefix.store_files.seal import Seals
from antefix.window_pool.pool_api import WindowPool
from antefix.window_pool.redis_pool import RedisWindowPool
from antefix.window_pool.store_memory import StoreMemoryPool

DISK, MEMORY = "disk", "memory"
_SCHEMES = tuple(f"{scheme}://" for scheme in SCHEMES)


def check_address(address: str) -> None:
    """Raises:  ConfigError: none of the three, or a URL of Redis that may not be used."""
    if address in (DISK, MEMORY):
        return
    # The message does not quote the text, because a URL with a mistyped scheme may contain a password.
    require(address.startswith(_SCHEMES), f"window_pool must be disk, memory or a URL ({', '.join(_SCHEMES)}...)")
    check_redis_url(address, "window_pool")


def open_window_pool(
    address: str,
    store: Store,
    *,
    bytes_max: int,
    seals: Seals | None = None,
    password_file: str = "",
    ca_file: str = "",
) -> WindowPool | None:
    """The window pool, which connects when first used; None if all checkpoints go to disk.

    bytes_max: of a Redis server's memory; the store service has its own bound (`handoff_bytes_max`).
    seals: of the deployment, for Redis; `store` has its own.  password_file, ca_file: of Redis (`RedisAccess`).
    """
    check_address(address)
    if address == DISK:
        return None
    if address == MEMORY:
        return StoreMemoryPool(store)
    access = RedisAccess(url=address, password_file=password_file, ca_file=ca_file)
    return RedisWindowPool(access, bytes_max=bytes_max, seals=seals)
