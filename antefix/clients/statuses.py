"""What services say of themselves, as values. Fields are named as in the protos, which say more about each."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, TypeVar

from antefix.v1 import decode_pb2, prefill_pb2, router_pb2, window_pb2

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillStatus:
    """num_resident_blocks: of the pool's num_blocks, with KV in them that a prompt may hit.

    prefill_tokens_per_s: as the worker measured it, without context.
    arithmetic: what it computes, as measured at its start: equal names mean equal bits.  setup: where, for people.
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
    """num_running: sequences in the batch.  num_resident_blocks: of the pool's num_blocks, with KV in them.

    arithmetic: what it computes, as measured at its start: equal names mean equal bits.  setup: where, for people.
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
    """One worker as a router sees it. role: "prefill" or "decode".

    memory_known: whether the router knows what the worker last said of its memory; if not, it goes by its own
        placements.
    arithmetic, setup: as the worker said; empty while the router has not heard it.
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
    """A worker whose lease ran out within the last hour, and that neither said goodbye nor came back.

    role: "prefill" or "decode".  seconds_ago: when its lease ran out.
    """

    address: str
    role: str
    seconds_ago: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterCounters:
    """Requests since the router started. led, followed: computed for themselves; waited for another's blocks first.

    refused: the first token would have taken too long.  straight: left to decode, their uncached rest was short.
    memory_events, memory_gaps, memory_snapshots: of workers' memory: taken in, noticed, taken.
    unstored: requests whose KV could not all be stored.  unstored_reason: why it could not the last time.
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
    """What a router holds for retries. running, unattended: answers that clients may read while they are made; and
    those of them that have no client now.

    kept, kept_bytes: finished answers, for a retry.  dropped, joined, given_again: since the router started: let go for
    room, retries that joined a running answer, and that were given a kept one.
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

    arithmetic: of all workers: part of every name.  Empty until one has said it.  num_running: requests that were
    admitted and have not ended.
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
    """How well one kind of plan was predicted since the worker started. Errors are relative to the prediction.

    mean_error, stated_error: a fading mean, and a fading maximum, which is what is stated with every later plan.
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
    """One way to restore that was weighed. error_s: how far predicted_s may be off, by experience."""

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
    """One restore: what was taken, what it took, and all ways that were weighed, cheapest first. at_s: Unix time."""

    at_s: float
    prompt_tokens: int
    taken: PlannedWay
    actual_s: float
    weighed: tuple[PlannedWay, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowStatus:
    """What a worker does about window state. bounded_windows 0: exact only.  plans: oldest first.

    align_tokens: between positions where a hit may resume; 1 where every block boundary will do.
    checkpoint_bytes: of checkpoints that the store holds, as the strategy's budget counts them.
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
    """A value with the message's fields; `nested` are those that are values themselves."""
    names = [field.name for field in dataclasses.fields(value_type)]  # type: ignore[arg-type]
    return value_type(**{name: nested[name] if name in nested else getattr(message, name) for name in names})
