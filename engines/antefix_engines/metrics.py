"""Prometheus metrics of an engine's store, served by the engine's process."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from prometheus_client.core import Metric

from antefix.security.listening import check_listening, parse_address
from antefix.telemetry.exposition import MetricsServer, Registry
from antefix.telemetry.shown import Shown, Table, families
from antefix_engines.engine_store import EngineCounters

ENGINE: Final[Table] = {
    "hit_blocks": Shown(name="antefix_engine_hit_blocks", help="Blocks that an engine looked up and the store had."),
    "missed_blocks": Shown(
        name="antefix_engine_missed_blocks", help="Blocks that an engine looked up and the store did not have."
    ),
    "stored_records": Shown(name="antefix_engine_stored_records", help="Blocks and checkpoints that an engine stored."),
    "sent_bytes": Shown(
        name="antefix_engine_sent_bytes", help="Uncompressed bytes of the records that an engine stored."
    ),
    "read_bytes": Shown(
        name="antefix_engine_read_bytes", help="Uncompressed bytes of the records that an engine read."
    ),
    "refused_records": Shown(
        name="antefix_engine_refused_records", help="Records that an engine offered and the store did not accept."
    ),
    "damaged_records": Shown(
        name="antefix_engine_lost_reads",
        help=(
            "Reads that returned less than the look-up before them had found, because records were damaged or "
            "evicted meanwhile. The rest is recomputed."
        ),
    ),
    "by_kind": Shown(
        name="antefix_engine_store_errors",
        help="Failed calls to the store, by error; each became a cache miss.",
        key="kind",
    ),
}


def serve_metrics(engine: str, counters: EngineCounters, address: str) -> MetricsServer:
    """Serve an engine's counters to Prometheus at "host:port" until `close`, for engines that do not show them
    themselves.

    Raises:  ConfigError: not an address, an address that other hosts can reach, or one that is in use.
    """
    check_listening(address, has_tls=False, flag="metrics_address")
    registry = Registry(engine)
    registry.add(lambda: engine_metrics(engine, counters))
    return MetricsServer(registry, *parse_address(address))


def engine_metrics(engine: str, counters: EngineCounters) -> Iterable[Metric]:
    """engine: its name, a label on all of the metrics."""
    yield from families(ENGINE, counters, {"engine": engine})


VLLM_TIER: Final[Table] = {
    "restored_blocks": Shown(
        name="antefix_vllm_restored_blocks", help="KV blocks (for other models: KV rows) given to vLLM."
    ),
    "restored_windows": Shown(name="antefix_vllm_restored_windows", help="Window states of a V4 model given to vLLM."),
    "stored_blocks": Shown(
        name="antefix_vllm_stored_blocks", help="KV blocks (for other models: KV rows) of vLLM that were stored."
    ),
    "stored_windows": Shown(
        name="antefix_vllm_stored_windows", help="Window states of a V4 model in vLLM that were stored."
    ),
    "lost_rows": Shown(
        name="antefix_vllm_lost_rows",
        help=(
            "KV rows that a look-up of vLLM found and the load after it did not return, because they were damaged "
            "or evicted."
        ),
    ),
    "dropped_rows": Shown(
        name="antefix_vllm_dropped_rows",
        help="KV rows of vLLM not stored because too many writes were waiting for the store.",
    ),
    "orphaned_rows": Shown(
        name="antefix_vllm_orphaned_rows", help="Blocks of vLLM not stored because the block before them is not known."
    ),
    "unfinished_windows": Shown(
        name="antefix_vllm_unfinished_windows",
        help="Window states of vLLM not stored because some of their rows never arrived.",
    ),
    "late_lookups": Shown(
        name="antefix_vllm_late_lookups",
        help="Block keys of vLLM that counted as missing because the store did not answer in time.",
    ),
    "unequal_ranks": Shown(
        name="antefix_vllm_unequal_ranks",
        help="KV rows of vLLM not stored because two ranks disagreed on data that must be equal.",
    ),
    "weak_hashes": Shown(
        name="antefix_vllm_weak_hashes", help="Block keys of vLLM not used because its block hash is not SHA-256."
    ),
}
