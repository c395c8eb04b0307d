"""The window pool: memory for checkpoints that are used within minutes or never, which saves disk writes.

The window pool has one interface and two implementations: the store service's memory (one host), or Redis (any number
of hosts). If a checkpoint in the window pool is lost, its window state is computed again; no answer is lost.
docs/WINDOW_STATE.md, "Window pool", has keys and bytes.
"""

from antefix.window_pool.open_pool import DISK, MEMORY, check_address, open_window_pool
from antefix.window_pool.pool_api import POOL_TIER, Found, WindowPool
from antefix.window_pool.redis_pool import RedisWindowPool
from antefix.window_pool.store_memory import StoreMemoryPool

__all__ = [
    "DISK",
    "MEMORY",
    "POOL_TIER",
    "Found",
    "RedisWindowPool",
    "StoreMemoryPool",
    "WindowPool",
    "check_address",
    "open_window_pool",
]
