"""Typed clients, one file per service: they take and return value types, raise Antefix's errors, and set a deadline on
every call.
"""

from antefix.block import TokenArray as Tokens
from antefix.clients.decode import DecodeClient, Decoded
from antefix.clients.fleet import CandidateEngine, EngineStatus, ExplainedRequest, FleetClient
from antefix.clients.prefill import PrefillClient, Prefilled
from antefix.clients.router import Generated, RouterClient
from antefix.clients.statuses import (
    AnswerCounters,
    DecodeStatus,
    PlanKindStatus,
    PlannedRestore,
    PlannedWay,
    PrefillStatus,
    RouterCounters,
    RouterStatus,
    WindowStatus,
    WorkerState,
)
from antefix.clients.window import WindowClient

__all__ = [
    "AnswerCounters",
    "CandidateEngine",
    "DecodeClient",
    "DecodeStatus",
    "Decoded",
    "EngineStatus",
    "ExplainedRequest",
    "FleetClient",
    "Generated",
    "PlanKindStatus",
    "PlannedRestore",
    "PlannedWay",
    "PrefillClient",
    "PrefillStatus",
    "Prefilled",
    "RouterClient",
    "RouterCounters",
    "RouterStatus",
    "Tokens",
    "WindowClient",
    "WindowStatus",
    "WorkerState",
]
