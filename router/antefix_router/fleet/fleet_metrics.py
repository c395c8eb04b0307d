"""The metrics that a fleet's router has about its workers: their names. The counters themselves belong to the router's
parts.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

from prometheus_client.core import Metric

from antefix.telemetry.shown import Shown, Table, counter, families, gauge
from antefix_router.fleet.engines import Engines
from antefix_router.fleet.fleet_placing import PassingCounters

_PLACED, _PLACED_HELP = (
    "antefix_fleet_odd_requests",
    (
        "Requests placed without knowing their tokens (unnamed), or refused: all workers were full (full), or the"
        " first token would be too late (late)."
    ),
)
# Names for `fleet_placing.PassingCounters`.
PASSING: Final[Table] = {
    "num_unnamed": Shown(name=_PLACED, help=_PLACED_HELP, labels=(("what", "unnamed"),)),
    "num_full": Shown(name=_PLACED, help=_PLACED_HELP, labels=(("what", "full"),)),
    "num_late": Shown(name=_PLACED, help=_PLACED_HELP, labels=(("what", "late"),)),
}
_TOKENS, _TOKENS_HELP = (
    "antefix_fleet_hit_tokens",
    (
        "Prompt tokens by worker: hits that the router expected (expected), hits that the worker reported"
        " (reported), expected but not reported hits (lost), reported but not expected hits (found)."
    ),
)
# Names for `engines.HitCounters`, per worker.
HITS: Final[Table] = {
    "num_answers": Shown(name="antefix_fleet_answers", help="Complete answers, by worker.", key="worker"),
    "num_unreported": Shown(
        name="antefix_fleet_unreported_answers",
        help="Answers in which the worker did not report its cache hits.",
        key="worker",
    ),
    "num_other_prompts": Shown(
        name="antefix_fleet_prompt_mismatches",
        help="Answers whose prompt had another number of tokens at the worker than at the router.",
        key="worker",
    ),
    **{
        part: Shown(name=_TOKENS, help=_TOKENS_HELP, key="worker", labels=(("what", part),))
        for part in ("expected", "reported", "lost", "found")
    },
}
# Names for `kv_subscriber.KvFollowCounters`, per worker.
EVENTS: Final[Table] = {
    "num_batches": Shown(
        name="antefix_fleet_event_batches", help="Messages with KV events that the router processed.", key="worker"
    ),
    "num_events": Shown(name="antefix_fleet_events", help="KV events that were processed.", key="worker"),
    "num_unread": Shown(
        name="antefix_fleet_unread_events", help="KV events that the router could not use.", key="worker"
    ),
    "num_gaps": Shown(
        name="antefix_fleet_event_gaps", help="Gaps in the sequence numbers of messages with KV events.", key="worker"
    ),
    "num_replays": Shown(
        name="antefix_fleet_event_replays",
        help="Requests of the router to a worker to send messages again.",
        key="worker",
    ),
    "num_lives": Shown(
        name="antefix_fleet_worker_lives", help="Restarts of the worker that the router detected.", key="worker"
    ),
    "num_forgotten": Shown(
        name="antefix_fleet_forgotten_workers",
        help="Times that the router discarded all its knowledge of the worker's cache.",
        key="worker",
    ),
}


def fleet_metrics(engines: Engines, passing: PassingCounters) -> Iterable[Metric]:
    yield from families(PASSING, passing)
    by_worker = {engine.place.address: engine for engine in engines.engines}
    yield from families(HITS, _by_field({name: each.hits for name, each in by_worker.items()}, HITS))
    following = {name: each.subscriber.counters for name, each in by_worker.items() if each.subscriber is not None}
    yield from families(EVENTS, _by_field(following, EVENTS))
    rows = {name: float(each.is_up) for name, each in by_worker.items()}
    yield gauge("antefix_fleet_worker_up", "1 for a worker that answered its last health check.", _keyed(rows), _WORKER)
    rows = {name: float(len(each.index)) for name, each in by_worker.items()}
    yield gauge(
        "antefix_fleet_worker_blocks", "Blocks that the worker holds, by its own events.", _keyed(rows), _WORKER
    )
    rows = {name: float(each.index.num_unnamed) for name, each in by_worker.items()}
    yield counter(
        "antefix_fleet_unnamed_blocks",
        "Blocks that could not be named, because they depend on pictures or on an unknown parent.",
        _keyed(rows),
        _WORKER,
    )


_WORKER: Final = ("worker",)


def _keyed(rows: dict[str, float]) -> dict[tuple[str, ...], float]:
    return {(name,): value for name, value in rows.items()}


def _by_field(rows: dict[str, Any], table: Table) -> dict[str, dict[str, Any]]:
    return {field: {name: getattr(each, field) for name, each in rows.items()} for field in table}
