"""What services report about themselves, as Python values. The fields have the names of the proto messages, which
document each field.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, TypeVar

from antefix.v1 import decode_pb2, prefill_pb2, router_pb2, window_pb2

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillStatus:
    """num_resident_blocks: blocks in the worker's memory, out of num_blocks in the pool, with KV that a prompt may hit.

    prefill_tokens_per_s: the speed that the worker measured for prompts without cached tokens. arithmetic: the name of
    the worker's arithmetic, measured at its start; workers with equal names compute equal bits. setup: the machine on
    which the name was measured, for people to read.
    """

    fingerprint: bytes
    num_running: int
    num_waiting: int
    num_blocks: int
    num_resident_blocks: int
    prefill_tokens_per_s: float
    arithmetic: str
    setup: str


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeStatus:
    """num_running: sequences in the decode batch. num_resident_blocks: blocks with KV in memory, out of num_blocks in
    the pool.

    arithmetic: the name of the worker's arithmetic, measured at its start; workers with equal names compute equal bits.
    setup: the machine on which the name was measured, for people to read.
    """

    fingerprint: bytes
    num_running: int
    num_waiting: int
    num_blocks: int
    num_resident_blocks: int
    decode_tokens_per_s: float
    arithmetic: str
    setup: str


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerState:
    """One worker as a router sees the worker. role: "prefill" or "decode".

    memory_known: whether the router has the worker's latest report of its memory; if not, the router guesses from the
        requests that it sent there. arithmetic, setup: as the worker reported; empty as long as the router has no
        report.
    """

    address: str
    role: str
    serving: bool
    num_requests: int
    num_tokens_queued: int
    draining: bool
    memory_known: bool
    arithmetic: str
    setup: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LostWorker:
    """A worker whose lease ran out within the last hour, without a goodbye and without a return.

    role: The worker's role, "prefill" or "decode". seconds_ago: how long ago its lease ran out.
    """

    address: str
    role: str
    seconds_ago: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterCounters:
    """Counts of requests since the router started. led: requests that computed their blocks themselves. followed:
    requests that first waited for the blocks of another request.

    refused: requests whose first token would have come too late. straight: requests sent straight to a decode worker,
    because few tokens were not cached. memory_events, memory_gaps, memory_snapshots: events about workers' memory that
    were applied, were missing, and snapshots taken. unstored: requests whose KV could not all be stored.
    unstored_reason: the reason for the last of them.
    """

    led: int
    followed: int
    gave_up_waiting: int
    refused: int
    straight: int
    memory_events: int
    memory_gaps: int
    memory_snapshots: int
    unstored: int
    unstored_reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerCounters:
    """The answers that a router holds for retries. running: answers that clients may read while they are generated.
    unattended: running answers that have no client now.

    kept, kept_bytes: finished answers that are kept for a retry. dropped: kept answers that were deleted for room,
    since the router's start. joined: retries that joined a running answer. given_again: retries that got a kept answer.
    """

    running: int
    unattended: int
    unattended_max: int
    kept: int
    kept_bytes: int
    kept_bytes_max: int
    dropped: int
    joined: int
    given_again: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterStatus:
    """The router's workers, the model that they serve, and what the router counted.

    arithmetic: the name of the arithmetic that all workers use; the name is part of every block's name. The
    arithmetic's name is empty until a worker has reported it. num_running: requests that were admitted and have not
    ended.
    """

    workers: tuple[WorkerState, ...]
    model: str
    fingerprint: bytes
    block_size: int
    counters: RouterCounters
    arithmetic: str
    num_running: int
    answers: AnswerCounters
    lost: tuple[LostWorker, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanKindStatus:
    """How accurately restores with one kind of plan were predicted since the worker started. Errors of predicted times
    are relative to the prediction.

    mean_error: a mean in which older errors count less. stated_error: a maximum that fades in the same way; every later
    plan states it as its possible error.
    """

    kind: str
    num_plans: int
    num_outcomes: int
    mean_error: float
    stated_error: float
    predicted_s: float
    actual_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedWay:
    """One way to restore a prefix that the planner considered. error_s: how far predicted_s may be wrong, judged by
    earlier restores.
    """

    kind: str
    resume_tokens: int
    replay_tokens: int
    prefill_tokens: int
    load_bytes: int
    checkpoint_tier: str
    predicted_s: float
    error_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedRestore:
    """One restore of a prefix: the plan that was used, the time that it took, and all plans that were considered,
    cheapest first. at_s: Unix time.
    """

    at_s: float
    prompt_tokens: int
    taken: PlannedWay
    actual_s: float
    weighed: tuple[PlannedWay, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowStatus:
    """A worker's settings and results for window state. bounded_windows 0: only exact hits are allowed. plans: the
    oldest plan first.

    align_tokens: the distance between positions where a hit may resume; 1 if every block boundary will do.
    checkpoint_bytes: bytes of checkpoints in the store, as the strategy's budget counts them.
    """

    namespace: str
    strategy: str
    bounded_windows: int
    align_tokens: int
    checkpoint_bytes: int
    kinds: tuple[PlanKindStatus, ...]
    plans: tuple[PlannedRestore, ...]


def prefill_status_from_wire(message: prefill_pb2.PrefillStatusResponse) -> PrefillStatus:
    return _plain(PrefillStatus, message)


def decode_status_from_wire(message: decode_pb2.DecodeStatusResponse) -> DecodeStatus:
    return _plain(DecodeStatus, message)


def router_status_from_wire(message: router_pb2.RouterStatusResponse) -> RouterStatus:
    return _plain(
        RouterStatus,
        message,
        workers=tuple(_plain(WorkerState, worker) for worker in message.workers),
        counters=_plain(RouterCounters, message.counters),
        answers=_plain(AnswerCounters, message.answers),
        lost=tuple(_plain(LostWorker, worker) for worker in message.lost),
    )


def window_status_from_wire(message: window_pb2.WindowStatusResponse) -> WindowStatus:
    return _plain(
        WindowStatus,
        message,
        kinds=tuple(_plain(PlanKindStatus, kind) for kind in message.kinds),
        plans=tuple(_restore(plan) for plan in message.plans),
    )


def _restore(message: window_pb2.PlanRecord) -> PlannedRestore:
    return _plain(
        PlannedRestore,
        message,
        taken=_plain(PlannedWay, message.taken),
        weighed=tuple(_plain(PlannedWay, way) for way in message.weighed),
    )


def _plain(value_type: type[T], message: Any, **nested: Any) -> T:
    """A value with the fields of a protobuf message; the fields named in `nested` are values themselves."""
    names = [field.name for field in dataclasses.fields(value_type)]  # type: ignore[arg-type]
    return value_type(**{name: nested[name] if name in nested else getattr(message, name) for name in names})
