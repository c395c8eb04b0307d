"""A small stand-in for the parts of SGLang that the HiCache tier uses: its storage interface and its host pools.

The names, fields and signatures are SGLang 0.5.23's. `test_sglang_hicache.py` compares them with SGLang itself,
and runs its tests over SGLang's own classes too, in the environment that `make test-engines` makes.
"""

from __future__ import annotations

import contextlib
import enum
import hashlib
import sys
import types
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch


@dataclass
class HiCacheStorageConfig:
    tp_rank: int
    tp_size: int
    pp_rank: int
    pp_size: int
    attn_cp_rank: int
    attn_cp_size: int
    is_mla_model: bool
    enable_storage_metrics: bool
    is_page_first_layout: bool
    model_name: str | None
    tp_lcm_size: int | None = None
    should_split_heads: bool = False
    dp_rank: int = 0
    extra_config: dict | None = None
    dcp_size: int = 1
    dcp_rank: int = 0
    logical_page_size: int | None = None


@dataclass
class HiCacheStorageExtraInfo:
    prefix_keys: list[str] | None = None
    extra_info: dict | None = None


class PoolName(enum.StrEnum):
    KV = "kv"
    MAMBA = "mamba"
    SWA = "swa"
    DEEPSEEK_V4_C4 = "deepseek_v4_c4"
    DEEPSEEK_V4_C4_INDEXER = "deepseek_v4_c4_indexer"
    DEEPSEEK_V4_C128 = "deepseek_v4_c128"
    DEEPSEEK_V4_C4_STATE = "deepseek_v4_c4_state"

    def __str__(self):
        return self.value


class PoolHitPolicy(enum.StrEnum):
    ALL_PAGES = "all_pages"
    TRAILING_PAGES = "trailing_pages"
    BLOCK_GROUPS = "block_groups"


@dataclass
class PoolTransfer:
    name: PoolName
    host_indices: torch.Tensor | None = None
    device_indices: torch.Tensor | None = None
    keys: list[str] | None = None
    hit_policy: PoolHitPolicy = PoolHitPolicy.ALL_PAGES
    nodes_to_load: list | None = None
    indices_from_pool: PoolName | None = None
    block_pages: int = 0
    group_pages: int = 0


@dataclass
class PoolTransferResult:
    kv_hit_pages: int
    extra_pool_hit_pages: dict[str, int]
    restorable_prefix_pages: list[int] | None = None


class HiCacheStorage(ABC):
    def register_mem_pool_host(self, mem_pool_host):
        self.mem_pool_host = mem_pool_host

    def register_mem_host_pool_v2(self, host_pool, host_pool_name):
        self.registered_pools = {**getattr(self, "registered_pools", {}), host_pool_name: host_pool}

    def on_host_pools_registered(self):
        return None

    def batch_exists_v2(self, keys, pool_transfers=None, extra_info=None):
        return None

    def batch_get_v2(self, transfers, extra_info=None):
        return None

    def batch_set_v2(self, transfers, extra_info=None):
        return None

    def batch_get_v1(self, keys, host_indices, extra_info=None):
        return None

    def batch_set_v1(self, keys, host_indices, extra_info=None):
        return None

    @abstractmethod
    def get(self, key, target_location=None, target_sizes=None): ...

    @abstractmethod
    def batch_get(self, keys, target_locations=None, target_sizes=None): ...

    @abstractmethod
    def set(self, key, value=None, target_location=None, target_sizes=None): ...

    @abstractmethod
    def batch_set(self, keys, values=None, target_locations=None, target_sizes=None): ...

    @abstractmethod
    def exists(self, key): ...

    def batch_exists(self, keys, extra_info=None):
        return None

    def clear(self):
        return None

    def get_stats(self):
        return None


STORAGE = (
    *(HiCacheStorageConfig, HiCacheStorageExtraInfo, PoolName, PoolHitPolicy),
    *(PoolTransfer, PoolTransferResult, HiCacheStorage),
)


class LogicalHostPool:
    """V4's anchor pool, which has page slots but no memory."""

    kv_buffer = None

    def __init__(self, size: int, page_size: int, layout: str = "layer_first"):
        self.size, self.page_size, self.layout = size, page_size, layout
        self.layer_num, self.dtype, self.size_per_token = 0, torch.uint8, 0


class DeepSeekV4PagedHostPool:
    """Pages of uint8 rows, one row per layer."""

    def __init__(
        self,
        pool_name,
        device_buffers,
        item_bytes,
        num_host_pages,
        slot_page_size,
        layout="layer_first",
        pin_memory=True,
    ):
        self.pool_name, self.item_bytes, self.layout = pool_name, item_bytes, layout
        self.page_size = self.slot_page_size = slot_page_size
        self.layer_num, self.size_per_token, self.dtype = len(device_buffers), item_bytes, torch.uint8
        if layout == "layer_first":
            self.kv_buffer: Any = [torch.zeros(num_host_pages, item_bytes, dtype=torch.uint8) for _ in device_buffers]
        else:
            self.kv_buffer = torch.zeros(num_host_pages, self.layer_num, item_bytes, dtype=torch.uint8)

    def get_dummy_flat_data_page(self):
        return torch.zeros(self.layer_num * self.item_bytes, dtype=torch.uint8)

    def get_data_page(self, index, flat=True):
        row = int(index) // self.page_size
        if self.layout == "layer_first":
            return torch.cat([layer[row] for layer in self.kv_buffer])
        return self.kv_buffer[row].flatten()

    def get_page_buffer_meta(self, indices):
        rows = [int(index) // self.page_size for index in indices.reshape(-1, self.page_size)[:, 0]]
        if self.layout == "layer_first":
            pointers = [layer[row].data_ptr() for row in rows for layer in self.kv_buffer]
            return pointers, [self.item_bytes] * len(pointers)
        return [self.kv_buffer[row].data_ptr() for row in rows], [self.layer_num * self.item_bytes] * len(rows)


def get_storage_hash_str(key, prior_hash=None, page_size=None):
    """A chain of SHA-256 over pages in hex, which is of the same kind as SGLang's hash but not equal to it."""
    hashes = []
    for start in range(0, len(key) - page_size + 1, page_size):
        page = ",".join(map(str, key[start : start + page_size]))
        prior_hash = hashlib.sha256(f"{prior_hash}:{page}".encode()).hexdigest()
        hashes.append(prior_hash)
    return hashes


@contextlib.contextmanager
def stand_in():
    """Within this context SGLang's storage module is importable.

    Modules imported on top of it are dropped afterwards.
    """
    before = dict(sys.modules)
    names = ("sglang", "sglang.srt", "sglang.srt.mem_cache", "sglang.srt.mem_cache.hicache_storage")
    for name in names:
        module = types.ModuleType(name)
        module.__path__ = []
        sys.modules[name] = module
    for kind in STORAGE:
        setattr(sys.modules[names[-1]], kind.__name__, kind)
    try:
        yield
    finally:
        for name in list(sys.modules):
            if name.split(".")[0] == "sglang" or name == "antefix_engines.sglang.hicache":
                del sys.modules[name]
        sys.modules.update({name: module for name, module in before.items() if name.split(".")[0] == "sglang"})
