"""The window pool: checkpoints that are used within minutes or never, in memory, so that the disk is spared them.

One interface, two homes: the memory of the store service (one host), or Redis (any number of hosts). What is lost with
a pool costs a replay, never an answer. docs/WINDOW_STATE.md, "Window pool", has keys and bytes.
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
