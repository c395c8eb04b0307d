"""What an engine's store shows to whoever scrapes the engine's process."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from prometheus_client.core import Metric

from antefix.telemetry.shown import Shown, Table, families
from antefix_engines.engine_store import EngineCounters

ENGINE: Final[Table] = {
    "hit_blocks": Shown(name="antefix_engine_hit_blocks", help="Blocks that an engine looked up and the store has."),
    "missed_blocks": Shown(name="antefix_engine_missed_blocks", help="Blocks that it looked up and the store has not."),
    "stored_records": Shown(name="antefix_engine_stored_records", help="Blocks and checkpoints that it stored."),
    "sent_bytes": Shown(name="antefix_engine_sent_bytes", help="Payload bytes that it gave the store to keep."),
    "read_bytes": Shown(name="antefix_engine_read_bytes", help="Payload bytes that it read."),
    "refused_records": Shown(name="antefix_engine_refused_records", help="Records that the store did not take."),
    "damaged_records": Shown(
        name="antefix_engine_lost_reads",
        help="Reads of what had been found that gave less: damaged, or evicted in between. Recomputed.",
    ),
    "by_kind": Shown(
        name="antefix_engine_store_errors", help="Calls of the store that failed, by error. Misses.", key="kind"
    ),
}


def engine_metrics(engine: str, counters: EngineCounters) -> Iterable[Metric]:
    """engine: its name, the label that all of them have."""
    yield from families(ENGINE, counters, {"engine": engine})
