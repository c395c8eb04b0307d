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
    "hit_blocks": Shown(name="antefix_engine_hit_blocks", help="Blocks that an engine looked up and the store has."),
    "missed_blocks": Shown(
        name="antefix_engine_missed_blocks", help="Blocks that an engine looked up and the store does not have."
    ),
    "stored_records": Shown(name="antefix_engine_stored_records", help="Blocks and checkpoints that an engine stored."),
    "sent_bytes": Shown(name="antefix_engine_sent_bytes", help="Payload bytes that an engine stored."),
    "read_bytes": Shown(name="antefix_engine_read_bytes", help="Payload bytes that an engine read."),
    "refused_records": Shown(
        name="antefix_engine_refused_records", help="Records of an engine that the store did not take."
    ),
    "damaged_records": Shown(
        name="antefix_engine_lost_reads",
        help="Reads that returned less than the look-up had found, because records were damaged or evicted in"
        " between. The rest is recomputed.",
    ),
    "by_kind": Shown(
        name="antefix_engine_store_errors",
        help="Calls to the store that failed, by error; each became a miss.",
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
        name="antefix_vllm_restored_blocks", help="Blocks, or rows of other models, given to vLLM."
    ),
    "restored_windows": Shown(name="antefix_vllm_restored_windows", help="Windows of a V4 model given to vLLM."),
    "stored_blocks": Shown(name="antefix_vllm_stored_blocks", help="Blocks, or rows of other models, stored."),
    "stored_windows": Shown(name="antefix_vllm_stored_windows", help="Windows of a V4 model stored."),
    "lost_rows": Shown(
        name="antefix_vllm_lost_rows",
        help="Rows that a look-up had found and a load did not return: damaged or evicted.",
    ),
    "dropped_rows": Shown(
        name="antefix_vllm_dropped_rows", help="Rows not stored because too much was waiting for the store."
    ),
    "orphaned_rows": Shown(
        name="antefix_vllm_orphaned_rows", help="Blocks not stored because their preceding block is not known."
    ),
    "unfinished_windows": Shown(
        name="antefix_vllm_unfinished_windows", help="Windows not stored because some of their rows never came."
    ),
    "late_lookups": Shown(
        name="antefix_vllm_late_lookups", help="Keys that counted as missing because the store did not answer in time."
    ),
    "unequal_ranks": Shown(
        name="antefix_vllm_unequal_ranks", help="Rows not stored because ranks differ in what should be equal."
    ),
    "weak_hashes": Shown(
        name="antefix_vllm_weak_hashes", help="Keys not used because vLLM's block hash is not SHA-256."
    ),
}
