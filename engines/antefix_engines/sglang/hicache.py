"""The class that SGLang loads by `--hicache-storage-backend dynamic`: its storage interface over Antefix's store.

SGLang's IO threads make the calls, which wait for the store. A page that is damaged, evicted or unreachable is reported
as missing, and SGLang computes it again.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Sequence
from typing import Any, Final

from sglang.srt.mem_cache.hicache_storage import (
    HiCacheStorage,
    HiCacheStorageExtraInfo,
    PoolHitPolicy,
    PoolTransfer,
    PoolTransferResult,
)

from antefix.errors import InvalidRequest
from antefix.telemetry.exposition import MetricsServer
from antefix_engines.engine_store import EngineStore
from antefix_engines.metrics import serve_metrics
from antefix_engines.sglang.pages import PageMemory, PoolPages
from antefix_engines.sglang.pool_records import PoolName, PoolRecords
from antefix_engines.sglang.settings import HiCacheSettings, arithmetic, shard_of

log = logging.getLogger("antefix.engines.sglang")

# SGLang's name for the main pool, on which the other pools depend.
ANCHOR: Final = "kv"
# Pool name for pages that are stored by a single key: SGLang does not tell which pages precede them.
_BY_KEY: Final = "by-key"


class AntefixHiCache(HiCacheStorage):  # type: ignore[misc]
    """storage_config: SGLang's `HiCacheStorageConfig`.  kwargs: not used.

    Raises:  ConfigError: a setting that is missing, unknown or impossible; SGLang then does not start.
    """

    def __init__(self, storage_config: Any, kwargs: dict[str, Any] | None = None) -> None:
        self._config: Final = storage_config
        self._settings: Final = HiCacheSettings.of(storage_config)
        self.store: Final = EngineStore.open(self._settings.store)
        self._lock: Final = threading.Lock()
        self._pages: Final[dict[str, PoolPages]] = {}
        self._records: Final[dict[tuple[str, bool], PoolRecords]] = {}
        self._told_of_orphans = False
        self._metrics: MetricsServer | None = None
        if self._settings.metrics_address:
            self._metrics = serve_metrics("sglang", self.store.counters, self._settings.metrics_address)

    def register_mem_pool_host(self, mem_pool_host: Any) -> None:
        super().register_mem_pool_host(mem_pool_host)
        self._pages[ANCHOR] = PoolPages(mem_pool_host)

    def register_mem_host_pool_v2(self, host_pool: Any, host_pool_name: Any) -> None:
        super().register_mem_host_pool_v2(host_pool, host_pool_name)
        self._pages[str(host_pool_name)] = PoolPages(host_pool)

    def batch_exists(self, keys: list[str], extra_info: HiCacheStorageExtraInfo | None = None) -> int:
        """How many of the first keys are stored."""
        return self._of(ANCHOR).lookup(keys).num_blocks

    def batch_exists_v2(
        self,
        keys: list[str],
        pool_transfers: list[PoolTransfer] | None = None,
        extra_info: HiCacheStorageExtraInfo | None = None,
    ) -> PoolTransferResult:
        """The page boundaries at which every pool can be restored."""
        num_stored = self._of(ANCHOR).lookup(keys).num_blocks
        hits = {ANCHOR: num_stored} if num_stored else {}
        ends = set(range(1, num_stored + 1))
        for transfer in pool_transfers or []:
            if transfer.hit_policy == PoolHitPolicy.BLOCK_GROUPS:
                # A second form of pages, on which no hit depends; it is not stored.
                continue
            reachable = self._reachable(transfer, keys[:num_stored])
            if reachable:
                hits[str(transfer.name)] = max(reachable)
            ends &= reachable
        return PoolTransferResult(max(ends, default=0), hits, sorted(ends))

    def batch_get_v1(
        self, keys: list[str], host_indices: Any, extra_info: HiCacheStorageExtraInfo | None = None
    ) -> list[bool]:
        return self._get(ANCHOR, keys, host_indices)

    def batch_set_v1(
        self, keys: list[str], host_indices: Any, extra_info: HiCacheStorageExtraInfo | None = None
    ) -> list[bool]:
        return self._set(ANCHOR, keys, host_indices, extra_info)

    def batch_get_v2(
        self, transfers: list[PoolTransfer], extra_info: HiCacheStorageExtraInfo | None = None
    ) -> dict[str, list[bool]]:
        return {
            transfer.name: self._get(
                str(transfer.name), transfer.keys or [], transfer.host_indices, is_trailing=self._is_trailing(transfer)
            )
            for transfer in transfers
        }

    def batch_set_v2(
        self, transfers: list[PoolTransfer], extra_info: HiCacheStorageExtraInfo | None = None
    ) -> dict[str, list[bool]]:
        done = {}
        for transfer in transfers:
            if transfer.hit_policy == PoolHitPolicy.BLOCK_GROUPS:
                done[transfer.name] = [False] * len(transfer.keys or [])
                continue
            done[transfer.name] = self._set(
                str(transfer.name),
                transfer.keys or [],
                transfer.host_indices,
                extra_info,
                is_trailing=self._is_trailing(transfer),
            )
        return done

    def get(self, key: str, target_location: Any = None, target_sizes: Any = None) -> Any:
        """Read one page of the anchor pool into a tensor; None if the page is not stored."""
        if target_location is None:
            raise InvalidRequest("a get needs target_location, a tensor with the size of a page")
        page = _page_of(target_location)
        return target_location if self._of(_BY_KEY, page.nbytes).get([key], [page])[0] else None

    def batch_get(self, keys: list[str], target_locations: Any = None, target_sizes: Any = None) -> list[Any]:
        return [self.get(key, target) for key, target in zip(keys, target_locations or [None] * len(keys), strict=True)]

    def set(self, key: str, value: Any = None, target_location: Any = None, target_sizes: Any = None) -> bool:
        """Store one page separately, since SGLang does not tell which pages precede it."""
        tensor = target_location if value is None else value
        if tensor is None:
            return False
        page = _page_of(tensor.contiguous())
        return self._of(_BY_KEY, page.nbytes).put([key], [page], [])[0]

    def batch_set(
        self, keys: list[str], values: Any = None, target_locations: Any = None, target_sizes: Any = None
    ) -> bool:
        given = values if values is not None else target_locations
        if given is None:
            return False
        done = [self.set(key, value) for key, value in zip(keys, given, strict=True)]
        return all(done)

    def exists(self, key: str) -> bool:
        if self._of(ANCHOR).lookup([key]).num_blocks:
            return True
        with self._lock:
            by_key = [records for (pool, _), records in self._records.items() if pool.startswith(_BY_KEY)]
        return any(records.lookup([key]).num_blocks for records in by_key)

    def clear(self) -> None:
        """Clearing does nothing, because other processes share the store, which has a size limit and lifetimes of its
        own (docs/ENGINES.md).
        """
        log.warning(
            "SGLang asked to clear its storage; nothing is deleted, because Antefix's store is shared with others"
        )

    def get_stats(self) -> None:
        """None: SGLang makes its own gauges of transfers, and our metrics are `antefix_engine_*`."""

    def close(self) -> None:
        if self._metrics is not None:
            self._metrics.close()
            self._metrics = None
        self.store.close()

    def _reachable(self, transfer: PoolTransfer, keys: Sequence[str]) -> frozenset[int]:
        """The prefix lengths, in pages, that this pool can restore."""
        is_trailing = self._is_trailing(transfer)
        found = self._of(str(transfer.name), is_trailing=is_trailing).lookup(keys)
        if not is_trailing:
            return frozenset(range(1, found.num_blocks + 1))
        # The pool needs the last `width` pages of a prefix, or all pages of a shorter prefix.
        width, have, run, ends = max(1, len(transfer.keys or ())), frozenset(found.checkpoints), 0, []
        for end in range(1, len(keys) + 1):
            run = run + 1 if end in have else 0
            if run >= min(width, end):
                ends.append(end)
        return frozenset(ends)

    def _is_trailing(self, transfer: PoolTransfer) -> bool:
        return bool(transfer.hit_policy == PoolHitPolicy.TRAILING_PAGES)

    def _get(self, pool: str, keys: Sequence[str], host_indices: Any, *, is_trailing: bool = False) -> list[bool]:
        try:
            pages = self._pool(pool).at(host_indices, len(keys))
        except InvalidRequest as err:
            log.error("pages of KV of %s cannot be read: %s", pool, err)  # noqa: TRY400 (SGLang's mistake, not a fault here)
            return [False] * len(keys)
        return self._of(pool, is_trailing=is_trailing).get(keys, pages)

    def _set(
        self,
        pool: str,
        keys: Sequence[str],
        host_indices: Any,
        extra_info: HiCacheStorageExtraInfo | None,
        *,
        is_trailing: bool = False,
    ) -> list[bool]:
        prefix = None if extra_info is None else extra_info.prefix_keys
        if prefix is None:
            if not self._told_of_orphans:
                self._told_of_orphans = True
                log.error(
                    "no KV can be stored: set hicache_storage_pass_prefix_keys to true in the extra config of SGLang"
                )
            self.store.count(refused_records=len(keys))
            return [False] * len(keys)
        try:
            pages = self._pool(pool).at(host_indices, len(keys))
        except InvalidRequest as err:
            log.error("pages of KV of %s cannot be stored: %s", pool, err)  # noqa: TRY400
            return [False] * len(keys)
        return self._of(pool, is_trailing=is_trailing).put(keys, pages, prefix)

    def _pool(self, pool: str) -> PoolPages:
        """Raises:  InvalidRequest: SGLang did not register this pool."""
        if pool not in self._pages:
            raise InvalidRequest(f"no pool {pool} was registered")
        return self._pages[pool]

    def _of(self, pool: str, page_bytes: int | None = None, *, is_trailing: bool = False) -> PoolRecords:
        """The records of a pool. page_bytes: the size of a page, for pages that come by a single key, whose pool is not
        known.
        """
        name = pool if page_bytes is None else f"{pool}-{page_bytes}"
        with self._lock:
            records = self._records.get((name, is_trailing))
            if records is None:
                records = self._records[name, is_trailing] = self._made(pool, name, page_bytes, is_trailing)
        return records

    def _made(self, pool: str, name: str, page_bytes: int | None, is_trailing: bool) -> PoolRecords:
        pages = self._pages.get(ANCHOR if page_bytes is not None else pool)
        description = {} if pages is None else pages.description
        page_size = 1 if pages is None else pages.page_size
        return PoolRecords(
            self.store,
            PoolName(
                pool=name,
                is_trailing=is_trailing,
                weights_revision=self._settings.weights_revision,
                kv_format=self._settings.kv_cache_dtype,
                arithmetic=arithmetic(),
                namespace=self._settings.namespace,
                shard=shard_of(self._config, pool),
                page_size=page_size,
                page_bytes=page_bytes if page_bytes is not None else (0 if pages is None else pages.page_bytes),
                description=json.dumps(description, sort_keys=True),
            ),
        )


def _page_of(tensor: Any) -> PageMemory:
    raw = tensor.view(-1).view(_uint8())
    return PageMemory((memoryview(raw.numpy()).cast("B"),))


def _uint8() -> Any:
    import torch

    return torch.uint8
