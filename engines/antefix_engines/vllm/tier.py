"""`AntefixTier`: the class that vLLM loads by `secondary_tiers`, written for vLLM 0.32 and 0.33.

All methods are called by vLLM's scheduler. The methods never block, except that `drain_jobs` and `shutdown` wait for
our own threads.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable
from functools import partial
from typing import Any, ClassVar, Final

import numpy as np
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.metrics import OffloadingConnectorStats
from vllm.v1.kv_offload.base import (
    Locality,
    LookupResult,
    Medium,
    OffloadingCounterMetadata,
    OffloadingEvent,
    RequestOffloadingContext,
)
from vllm.v1.kv_offload.tiering.base import JobResult, SecondaryTierManager

from antefix_engines.engine_store import EngineStore
from antefix_engines.metrics import VLLM_TIER
from antefix_engines.vllm.aligned import POSITIONS
from antefix_engines.vllm.lookups import Lookups
from antefix_engines.vllm.naming import HASH_BYTES_MIN, identity_of
from antefix_engines.vllm.platform import default_arithmetic
from antefix_engines.vllm.prompt import Asked, Prompt, Row
from antefix_engines.vllm.row_store import Restored, RowStore, Stored, TierCounters
from antefix_engines.vllm.shape import Shape, split_key
from antefix_engines.vllm.tier_settings import TierSettings
from antefix_engines.vllm.transfers import Finished, Transfers
from antefix_engines.vllm.v4_pages import V4Pages
from antefix_engines.vllm.v4_rows import V4Rows
from antefix_engines.vllm.whole_rows import WholeRows

log = logging.getLogger("antefix.engines.vllm")

_WANTED_HASH: Final = "--prefix-caching-hash-algo sha256"
# Set by `antefix_engines.vllm.spec.AntefixSpec`: hits end at the ends of blocks only.
ALIGNED: Final = "antefix_aligned_hits"


class AntefixTier(SecondaryTierManager):  # type: ignore[misc]
    """KV in an Antefix store: compact, checked, bounded, named by weights and layout."""

    medium: ClassVar[Medium] = Medium.STORAGE

    def __init__(
        self,
        offloading_spec: Any,
        primary_kv_view: memoryview,
        tier_type: str,
        backpressure_detector: Any = None,
        **settings: Any,
    ) -> None:
        """settings: those of `TierSettings`, as in vLLM's configuration.

        Raises:  ConfigError: a setting is wrong, there is no store, or the weights cannot be identified.
        """
        super().__init__(offloading_spec, primary_kv_view, tier_type, backpressure_detector)
        self.settings: Final = TierSettings.from_mapping(settings)
        self.locality = Locality.LOCAL if self.settings.is_local else Locality.REMOTE
        self.counters: Final = TierCounters()
        memory = np.asarray(primary_kv_view).view(np.uint8)
        shape = Shape.of(offloading_spec, memory.shape[1])
        identity = identity_of(
            shape,
            weights_revision=self.settings.weights_revision,
            arithmetic=self.settings.arithmetic,
            default_arithmetic=default_arithmetic(),
            namespace=self.settings.namespace,
        )
        self._store: Final = EngineStore.open(self.settings.store)
        pages = V4Pages.of(shape, compact=bool(getattr(offloading_spec, ALIGNED, False)))
        self.rows: Final[RowStore] = (
            V4Rows(pages, memory, self._store, identity, self.counters, num_readers=self.settings.load_threads)
            if pages is not None
            else WholeRows(shape, memory, self._store, identity, self.counters)
        )
        log.info("rows are stored %s", _told(pages))
        self._row_bytes: Final = shape.row_stride
        self._prompts: dict[str, Prompt] = {}
        self._loads: dict[int, tuple[Prompt, list[bytes]]] = {}
        self._lookups: Final = Lookups(
            self.rows.find,
            wait_s=self.settings.lookup_wait_s,
            on_late=lambda number: self.counters.count(late_lookups=number),
        )
        self._transfers: Final[Transfers[Stored | Restored]] = Transfers(
            num_load_threads=self.settings.load_threads, queue_bytes_max=self.settings.queue_bytes_max
        )
        self._shown: dict[str, int] = {}
        self._events: list[OffloadingEvent] = []
        self._tells_events: Final = (
            self.settings.enable_kv_events and offloading_spec.kv_events_config.enable_kv_cache_events
        )

    # --- looking up ----------------------------------------------------------------------------------------------

    def on_new_request(self, req_context: Any) -> RequestOffloadingContext:
        self._prompts[req_context.req_id] = Prompt(req_context.req_id)
        return RequestOffloadingContext()

    def lookup(self, key: bytes, req_context: Any) -> LookupResult:
        prompt = self._prompt(req_context)
        found = prompt.verdicts.get(key)
        if found is None:
            asked = self._asked(prompt, key, req_context)
            found = self._lookups.ask(prompt, asked) if asked is not None else False
        if found is None:
            return LookupResult.RETRY
        return LookupResult.HIT if found else LookupResult.MISS

    def on_schedule_end(self, context: Any) -> None:
        self._lookups.flush()

    def on_request_finished(self, req_context: Any) -> None:
        self._prompts.pop(req_context.req_id, None)

    # --- moving --------------------------------------------------------------------------------------------------

    def submit_store(self, job_metadata: Any) -> None:
        prompt, rows = self._rows_of(job_metadata)
        self._learn(prompt, job_metadata.req_context)
        work = partial(self.rows.put, prompt, rows)
        if not self._transfers.store(job_metadata.job_id, len(rows) * self._row_bytes, work):
            self.counters.count(dropped_rows=len(rows))

    def submit_load(self, job_metadata: Any) -> None:
        prompt, rows = self._rows_of(job_metadata)
        self._loads[job_metadata.job_id] = (prompt, list(job_metadata.keys))
        self._transfers.load(job_metadata.job_id, partial(self.rows.get, prompt, rows))

    def get_finished_jobs(self) -> Iterable[JobResult]:
        return [self._result(done) for done in self._transfers.finished()]

    def drain_jobs(self) -> None:
        self._transfers.drain()

    def shutdown(self) -> None:
        """Finish running jobs and release vLLM's memory, which vLLM could not unmap otherwise.

        Closing never raises, because vLLM would then skip the rest of its own shutdown.
        """
        self._transfers.close()
        self._lookups.close()
        try:
            self._store.close()
        except Exception:
            log.exception("closing the store failed; the next start of the store checks its files")
        self.rows.close()

    # --- telling -------------------------------------------------------------------------------------------------

    def take_events(self) -> Iterable[OffloadingEvent]:
        events, self._events = self._events, []
        return events

    @classmethod
    def build_metric_definitions(cls, extra_config: dict[str, Any]) -> dict[str, Any]:
        return {shown.name: OffloadingCounterMetadata(documentation=shown.help) for shown in VLLM_TIER.values()}

    def get_stats(self) -> OffloadingConnectorStats | None:
        """The counts since the last call."""
        stats = OffloadingConnectorStats()
        for name, shown in VLLM_TIER.items():
            number = getattr(self.counters, name)
            if more := number - self._shown.get(name, 0):
                stats.increase_counter(shown.name, more)
                self._shown[name] = number
        return None if stats.is_empty() else stats

    # --- inside --------------------------------------------------------------------------------------------------

    def _prompt(self, req_context: Any) -> Prompt:
        return self._prompts.get(req_context.req_id) or self._prompts.setdefault(
            req_context.req_id, Prompt(req_context.req_id)
        )

    def _asked(self, prompt: Prompt, key: bytes, req_context: Any) -> Asked | None:
        """The lookup for a key; None if the key cannot be in the store."""
        hash, group = split_key(key)
        position = req_context.get_offload_key_position(key)
        if position is None or self._is_weak(hash):
            return None
        asked = Asked(key, hash, group, position)
        if not self.rows.may_have(asked):
            return None
        if self.rows.remembers(group):
            prompt.rows[group, position] = hash
        return asked

    def _rows_of(self, job: Any) -> tuple[Prompt, list[Row]]:
        prompt, rows = self._prompt(job.req_context), []
        for key, chunk in zip(job.keys, job.chunk_ids, strict=True):
            hash, group = split_key(key)
            position = job.req_context.get_offload_key_position(key)
            if position is None or self._is_weak(hash):
                continue
            if self.rows.remembers(group):
                prompt.rows[group, position] = hash
            rows.append(Row(key, hash, group, position, int(chunk)))
        return prompt, rows

    def _learn(self, prompt: Prompt, req_context: Any) -> None:
        """Copy the hashes of all blocks from vLLM, because it asks no tier for blocks in its own cache."""
        positions = getattr(req_context, POSITIONS, {})
        if len(positions) == prompt.num_learned:
            return
        prompt.num_learned = len(positions)
        for key, position in positions.items():
            hash, group = split_key(key)
            if self.rows.remembers(group):
                prompt.rows[group, position] = hash

    def _is_weak(self, hash: bytes) -> bool:
        if len(hash) >= HASH_BYTES_MIN:
            return False
        if not self.counters.weak_hashes:
            log.warning("vLLM's block hash is not SHA-256, so nothing is stored: start vLLM with %s", _WANTED_HASH)
        self.counters.count(weak_hashes=1)
        return True

    def _result(self, done: Finished[Stored | Restored]) -> JobResult:
        prompt, keys = self._loads.pop(done.job_id, (None, []))
        outcome, result = done.outcome, partial(JobResult, job_id=done.job_id, transfer_time=done.seconds)
        if prompt is not None:
            good = set(outcome.keys) if outcome is not None else set()
            lost = [key for key in keys if key not in good]
            self._lookups.lose(prompt, lost)
            self._tell(lost, removed=True)
            num_bytes = outcome.num_bytes if outcome is not None else 0
            return result(success=not lost, successful_keys=list(good) or None, transfer_bytes=num_bytes)
        if not isinstance(outcome, Stored):
            return result(success=False)
        self._tell(outcome.keys, removed=False)
        return result(success=outcome.is_right, transfer_bytes=outcome.num_bytes)

    def _tell(self, keys: Collection[bytes], *, removed: bool) -> None:
        if self._tells_events and keys:
            event = OffloadingEvent(keys=list(keys), medium=self.medium, removed=removed, locality=self.locality)
            self._events.append(event)


def _told(pages: V4Pages | None) -> str:
    if pages is None:
        return "whole: this is no V4 cache as Antefix knows it"
    if pages.compact:
        return f"as V4 blocks of {pages.block_bytes} bytes and windows of {pages.window_bytes}"
    return (
        f"as V4 blocks of {pages.block_bytes} bytes and windows of {pages.window_bytes}, with all states: with"
        ' "spec_name": "AntefixSpec" windows are a quarter of that'
    )
