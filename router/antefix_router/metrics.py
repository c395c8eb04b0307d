"""The names of a router's metrics. Each part of the router counts its own."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import Final

from prometheus_client.core import Metric

from antefix.events.event_seal import DropReason
from antefix.store.store_feed import StoreFeed
from antefix.telemetry.shown import Kind, Shown, Table, counter, families, gauge
from antefix_billing.key_register import KeyRegister
from antefix_billing.usage_commit import LedgerWriter
from antefix_router.accounting import Accounts
from antefix_router.gateway.access import HttpMeasures
from antefix_router.gateway.connections import Connections, QuietAccepting
from antefix_router.gateway.notes import IgnoredFields
from antefix_router.gateway.strict_http import HttpFaults
from antefix_router.hedging import HedgeBudget
from antefix_router.key_changes import KeyChanges
from antefix_router.live_books import LiveBooks
from antefix_router.load_shedding import LoadShedding
from antefix_router.placement.found_workers import FoundWorkers
from antefix_router.placement.memory_feed import MemoryFeed
from antefix_router.placement.pace import slow_ones
from antefix_router.placement.workers import WorkerRole, Workers
from antefix_router.prefill_calls import PrefillingCounters
from antefix_router.shared_bill.shared_bill import SharedBill

# How many ignored fields are shown by name: the first ones. Their names come from clients.
NUM_FIELDS_MAX: Final = 50

_PREFILLS = "antefix_router_prefills"
_PREFILLS_HELP = (
    "Prompts by what was done: led (computed for themselves), followed (waited for another's blocks), gave_up_waiting,"
    " refused (the first token would be too late), straight (left to decode)."
)
# `prefill_calls.PrefillingCounters`.
PREFILLING: Final[Table] = {
    "num_led": Shown(name=_PREFILLS, help=_PREFILLS_HELP, labels=(("way", "led"),)),
    "num_followed": Shown(name=_PREFILLS, help=_PREFILLS_HELP, labels=(("way", "followed"),)),
    "num_gave_up_waiting": Shown(name=_PREFILLS, help=_PREFILLS_HELP, labels=(("way", "gave_up_waiting"),)),
    "num_refused": Shown(name=_PREFILLS, help=_PREFILLS_HELP, labels=(("way", "refused"),)),
    "num_straight": Shown(name=_PREFILLS, help=_PREFILLS_HELP, labels=(("way", "straight"),)),
    "num_hedged": Shown(
        name="antefix_router_hedged_prefills",
        help="Prompts sent to a second prefill worker because the first worker was late.",
    ),
    "num_hedges_won": Shown(
        name="antefix_router_won_hedges",
        help="Prompts sent to a second prefill worker that finished before the first worker.",
    ),
    "num_left": Shown(
        name="antefix_router_left_prefills",
        help="Prompts that no prefill worker finished, so that a decode worker computed them.",
    ),
    "overhead_s": Shown(
        name="antefix_router_prefill_overhead_seconds",
        help="Measured fixed time of a call to an idle prefill worker.",
        kind=Kind.GAUGE,
    ),
}
_RETRIES, _RETRIES_HELP = "antefix_router_retries", "Requests that came again under the same id."
# `AnswerCounters`, which RouterStatus has too.
ANSWERS: Final[Table] = {
    "running": Shown(
        name="antefix_answers_running",
        help="Answers in progress that a retry of the same request may join.",
        kind=Kind.GAUGE,
    ),
    "unattended": Shown(
        name="antefix_answers_unattended", help="Answers in progress whose client has gone.", kind=Kind.GAUGE
    ),
    "unattended_max": Shown(
        name="antefix_answers_unattended_limit",
        help="Largest number of answers that may continue after their client has gone.",
        kind=Kind.GAUGE,
    ),
    "kept": Shown(
        name="antefix_answers_kept", help="Finished answers that are kept for a retry of the request.", kind=Kind.GAUGE
    ),
    "kept_bytes": Shown(name="antefix_answers_kept_bytes", help="Bytes that kept answers take.", kind=Kind.GAUGE),
    "kept_bytes_max": Shown(
        name="antefix_answers_kept_limit_bytes",
        help="Most bytes that answers kept for retries may use.",
        kind=Kind.GAUGE,
    ),
    "dropped": Shown(
        name="antefix_answers_dropped", help="Answers kept for retries that were dropped to make room for others."
    ),
    "joined": Shown(name=_RETRIES, help=_RETRIES_HELP, labels=(("way", "joined"),)),
    "given_again": Shown(name=_RETRIES, help=_RETRIES_HELP, labels=(("way", "given_again"),)),
}
# `usage_commit.CommitCounters`.
COMMITS: Final[Table] = {
    "batches": Shown(name="antefix_ledger_batches", help="Writes to the ledger file, with one sync to disk per write."),
    "entries": Shown(name="antefix_ledger_entries", help="Entries written to the ledger, two per request."),
}
_SHARED, _SHARED_HELP = (
    "antefix_shared_bill_requests",
    (
        "Requests of the routers' shared bill: claimed, elsewhere (another router ran the request), taken_over (from"
        " a router that died), told (to Redis), unshared (Redis was out; told later), refused (Redis was out),"
        " credited (charged twice)."
    ),
)
# `shared_bill.SharedCounters`.
SHARED: Final[Table] = {
    name: Shown(name=_SHARED, help=_SHARED_HELP, labels=(("what", name),))
    for name in ("claimed", "elsewhere", "taken_over", "told", "unshared", "refused", "credited")
}
# `antefix.events.follower.FollowCounters`: of workers' memory, and of the store's events where they are followed.
FOLLOW: Final[Table] = {
    "num_events": Shown(name="antefix_router_events", help="Events that were processed.", key="source"),
    "num_gaps": Shown(
        name="antefix_router_event_gaps", help="Gaps in the sequence numbers of received events.", key="source"
    ),
    "num_snapshots": Shown(name="antefix_router_snapshots", help="Snapshots that were processed.", key="source"),
}


def accounts_metrics(accounts: Accounts) -> Iterable[Metric]:
    """Metrics of requests, tokens, money, retries and the ledger."""
    yield from accounts.measures.metrics()
    yield gauge(
        "antefix_running_requests", "Requests that were admitted and have not ended.", {(): float(accounts.num_running)}
    )
    yield from families(ANSWERS, accounts.retries.counts())
    yield counter(
        "antefix_unstored_requests",
        "Requests whose KV could not all be stored.",
        {(): float(accounts.num_unstored)},
    )
    writer = accounts.writer
    if isinstance(writer, LedgerWriter):
        yield from families(COMMITS, writer.counters)
        yield from writer.ledger.sync_s.collect()
        yield gauge(
            "antefix_ledger_reserve_bytes",
            "Bytes that the ledger can still write when the disk is full.",
            {(): float(writer.ledger.reserve_bytes)},
        )
    if (anchoring := accounts.anchoring) is not None:
        yield gauge(
            "antefix_ledger_anchored_entry", "The last entry anchored in all places.", {(): anchoring.anchored_to}
        )
        yield counter("antefix_ledger_failed_anchors", "Anchors that failed.", {(): float(anchoring.num_failed)})
    if accounts.shared is not None:
        yield from shared_bill_metrics(accounts.shared)


def reload_metrics(books: LiveBooks) -> Iterable[Metric]:
    """Of tenants and rate cards."""
    found = {("taken",): float(books.num_changes), ("refused",): float(books.num_refused)}
    help_text = "Times that tenants and rate cards were read again, by outcome: taken, or refused as a whole."
    yield counter("antefix_bill_reloads", help_text, found, ("outcome",))


def shared_bill_metrics(shared: SharedBill) -> Iterable[Metric]:
    """Metrics of what this router tells other routers through Redis."""
    yield from families(SHARED, shared.counters)
    yield gauge("antefix_shared_bill_out", "1 while the shared bill cannot rely on Redis.", {(): float(shared.is_out)})
    yield gauge(
        "antefix_shared_bill_untold",
        "Records of the shared bill that Redis does not have yet.",
        {(): float(shared.num_untold)},
    )
    yield counter(
        "antefix_shared_bill_alone_reservations",
        "Requests that were limited by this router's own counts alone, because Redis was out.",
        {(): float(shared.quotas.num_alone)},
    )


def placement_metrics(groups: Sequence[Workers], policy: str, knows_memory: Callable[[str], bool]) -> Iterable[Metric]:
    """Metrics of the workers, and of what was placed on them."""
    now = time.monotonic()
    known = [worker for group in groups for worker in group.workers]
    where = {(worker.role.value, worker.address): worker for worker in known}
    labels = ("role", "worker")
    yield gauge(
        "antefix_worker_serving",
        "1 for a worker that requests are placed on, 0 for one that failed just now or drains.",
        {key: float(not worker.is_shunned(now) and not worker.draining) for key, worker in where.items()},
        labels,
    )
    yield gauge(
        "antefix_worker_silent",
        "1 for a worker that gives no sign of life: it hangs, or cannot be heard.",
        {key: float(worker.is_silent) for key, worker in where.items()},
        labels,
    )
    slow = {id(worker) for group in groups for worker in slow_ones(group.workers)}
    yield gauge(
        "antefix_worker_slow",
        "1 for a worker that is far slower than the others of its role; it gets a request now and then.",
        {key: float(id(worker) in slow) for key, worker in where.items()},
        labels,
    )
    yield gauge(
        "antefix_worker_answer_seconds",
        "The worker's usual time to answer a health check.",
        {key: worker.pulse.rtt_s for key, worker in where.items() if worker.pulse is not None and worker.pulse.rtt_s},
        labels,
    )
    yield gauge(
        "antefix_worker_placed_requests",
        "Requests of this router that run at the worker.",
        {key: float(worker.num_requests) for key, worker in where.items()},
        labels,
    )
    yield gauge(
        "antefix_worker_placed_tokens",
        "Tokens of work in this router's requests at the worker.",
        {key: float(worker.num_tokens) for key, worker in where.items()},
        labels,
    )
    yield gauge(
        "antefix_worker_memory_known",
        "1 if the router knows what the worker last said of its memory.",
        {key: float(knows_memory(worker.address)) for key, worker in where.items()},
        labels,
    )
    yield counter(
        "antefix_placements",
        "Requests placed on a worker, the first time and again after one failed.",
        {
            (group.role.value, policy, attempt): float(number)
            for group in groups
            for attempt, number in group.num_placed.items()
        },
        ("role", "policy", "attempt"),
    )
    yield counter(
        "antefix_worker_calls",
        "How calls of workers ended.",
        {(group.role.value, outcome): float(number) for group in groups for outcome, number in group.num_ended.items()},
        ("role", "outcome"),
    )


def lost_metrics(lost: Sequence[tuple[WorkerRole, str, float]]) -> Iterable[Metric]:
    """lost: the result of `Leases.lost`."""
    numbers = Counter(role.value for role, _, _ in lost)
    yield gauge(
        "antefix_lost_workers",
        "Workers whose lease ran out within the last hour, and that neither said goodbye nor came back.",
        {(role.value,): float(numbers[role.value]) for role in WorkerRole},
        ("role",),
    )


def finding_metrics(found: FoundWorkers) -> Iterable[Metric]:
    """Metrics of workers that are found by DNS names or leases in Redis."""
    yield counter(
        "antefix_router_failed_lookups",
        "Failed look-ups of workers by name or lease; the workers that were known stay known.",
        {(role.value,): float(number) for role, number in found.num_failed.items()},
        ("role",),
    )
    yield counter(
        "antefix_router_refused_workers",
        "Workers that were found and cannot serve here: other weights, arithmetic or version.",
        {(role.value,): float(found.num_refused[role]) for role in found.num_failed},
        ("role",),
    )


def hedge_metrics(budget: HedgeBudget) -> Iterable[Metric]:
    yield counter(
        "antefix_router_hedges",
        "Requests that may have been done twice, or moved, because a worker was late.",
        {(): float(budget.num_hedges)},
    )
    yield counter(
        "antefix_router_denied_hedges",
        "Late requests that were not sent again, because too many had been.",
        {(): float(budget.num_denied)},
    )


def router_metrics(prefilling: PrefillingCounters, memory: MemoryFeed, store: StoreFeed) -> Iterable[Metric]:
    yield from families(PREFILLING, prefilling)
    sources = {"memory": memory.counters, "store": store.counters}
    yield from families(
        FOLLOW, {field: {name: getattr(each, field) for name, each in sources.items()} for field in FOLLOW}
    )
    feeds = {"memory": memory.dropped, "store": store.dropped}
    yield counter(
        "antefix_router_dropped_events",
        "Entries in Redis that were not trusted: forged (not signed by this deployment), replayed (told before, or"
        " too old), malformed.",
        {(name, why.value): float(dropped.get(why, 0)) for name, dropped in feeds.items() for why in DropReason},
        ("source", "reason"),
    )


def store_names_metrics(feeds: Iterable[StoreFeed]) -> Iterable[Metric]:
    """Metrics of the names of stored blocks that the router knows from the stores' events."""
    feeds = list(feeds)
    yield gauge(
        "antefix_router_store_names",
        "Blocks and checkpoints in stores' events: held in the router's memory, or left out, so that the store is"
        " asked.",
        {
            ("held",): float(sum(len(feed) for feed in feeds)),
            ("left_out",): float(sum(feed.num_left_out for feed in feeds)),
        },
        ("state",),
    )


def shedding_metrics(shedding: LoadShedding) -> Iterable[Metric]:
    """Metrics of requests that wait for a first token, and of requests refused because they would wait too long."""
    waiting = {(): float(shedding.num_waiting)}
    yield gauge("antefix_router_waiting_requests", "Requests that wait for their first token.", waiting)
    yield counter(
        "antefix_router_shed_requests",
        "Requests that were refused by their head, because they would have waited too long.",
        {(): float(shedding.num_refused)},
    )


def key_metrics(keys: KeyRegister, changes: KeyChanges | None) -> Iterable[Metric]:
    """API keys. These metrics show neither keys nor tenants' names."""
    states = keys.states()
    yield gauge(
        "antefix_api_keys",
        "API keys by state; those of a tenants file are valid.",
        {(state,): float(states[state]) for state in ("valid", "expired", "revoked")},
        ("state",),
    )
    yield counter(
        "antefix_refused_api_keys",
        "Requests that were refused for their API key, by reason.",
        {(why.value,): float(number) for why, number in keys.refused_counts().items()},
        ("reason",),
    )
    if changes is not None:
        yield gauge(
            "antefix_api_keys_number", "Number of the book of API keys that is in force.", {(): float(keys.number)}
        )
        yield counter(
            "antefix_api_keys_errors",
            "Times that API keys could not be read or were not trusted; those known before stay in force.",
            {(source,): float(number) for source, number in changes.num_errors.items()},
            ("source",),
        )


def connection_metrics(connections: Connections, accepting: QuietAccepting) -> Iterable[Metric]:
    """The HTTP door's connections."""
    yield gauge("antefix_http_connections", "Connections that are open.", {(): float(len(connections))})
    yield gauge("antefix_http_connections_limit", "Most open HTTP connections.", {(): float(connections.most)})
    yield counter(
        "antefix_http_closed_connections",
        "Connections that the door closed: refused (too many, and none was idle), displaced (idle, for another one),"
        " silent (no whole head in time), unread (the client took nothing of its answer),"
        " failed (no descriptor was left to accept it).",
        {
            ("refused",): float(connections.num_refused),
            ("displaced",): float(connections.num_displaced),
            ("silent",): float(connections.num_silent),
            ("unread",): float(connections.num_unread),
            ("failed",): float(accepting.num_failed),
        },
        ("why",),
    )


def http_metrics(measures: HttpMeasures, ignored: IgnoredFields, faults: HttpFaults) -> Iterable[Metric]:
    """The HTTP door."""
    yield from measures.metrics()
    yield counter(
        "antefix_http_malformed_requests",
        "Connections that were closed because what came was no request, or could be cut into requests in two ways.",
        {(): float(faults.num_malformed)},
    )
    yield counter(
        "antefix_http_requests_with_ignored_fields",
        "Requests that had a field which changes nothing here.",
        {(): float(ignored.num_requests)},
    )
    # In order of arrival, so that a field once shown stays shown.
    shown = dict(islice(ignored.counts.items(), NUM_FIELDS_MAX))
    others = sum(ignored.counts.values()) - sum(shown.values())
    rows = {(name,): float(number) for name, number in shown.items() if name != IgnoredFields.OTHERS}
    rows[(IgnoredFields.OTHERS,)] = float(others + shown.get(IgnoredFields.OTHERS, 0))
    yield counter(
        "antefix_http_ignored_fields", "How often each field that changes nothing here came.", rows, ("field",)
    )
