"""The result of a simulated fleet under one placement policy, as numbers and as a table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from antefix.text_table import text_table
from antefix.window import Sizes
from antefix_simulate.replay_result import percentile
from antefix_simulate.simulated_objects import ObjectBill

# After a worker was lost, the fleet is measured again after this time.
RECOVERY_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyResult:
    """The result of one policy on one trace.

    bytes_by_tier: bytes of blocks used from memory, loaded from the host's own disk, and from another host's store;
    "copied": bytes copied to a second store because they are read often.  dollars: price of the prompts at the fleet's
    token prices.
    object_bill: requests to the object store and their price.
    token_hit_rate: share of prompt tokens that no worker ran.  fetched_share: share that was loaded from a store.
    ttft_*: time from arrival to first token: waiting, loading, computing.  goodput: requests per second within both
    limits.
    load_max_over_mean: busy seconds of the busiest prefill worker over the mean.  coalesced_share: share of requests
    that waited for blocks that another request computed.  before_*, after_*: windows before the first kill and from a
    minute after.
    """

    policy: str
    bytes_by_tier: dict[str, int]
    dollars: float
    object_bill: ObjectBill
    token_hit_rate: float
    fetched_share: float
    ttft_p50_s: float
    ttft_p90_s: float
    ttft_p99_s: float
    ttft_mean_s: float
    goodput: float
    load_max_over_mean: float
    utilisation: float
    coalesced_share: float
    num_moved: int
    before_hit_rate: float | None
    after_hit_rate: float | None
    before_ttft_p90_s: float | None
    after_ttft_p90_s: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterSimulation:
    """All policies on one trace and one fleet. engines: where other engines' workers resume; empty: the workers are
    ours.
    """

    trace: str
    num_requests: int
    prompt_tokens: int
    unit_tokens: int
    num_prefill: int
    num_decode: int
    shared_store: bool
    num_stores: int = 1
    object_bytes: int = 0
    engines: str = ""
    results: tuple[PolicyResult, ...]

    def as_dict(self) -> dict[str, Any]:
        shared = {name: value for name, value in asdict(self).items() if name != "results"}
        return shared | {"policies": {result.policy: _as_dict(result) for result in self.results}}


@dataclass(slots=True)
class Outcomes:
    """Arrays with one row per finished request."""

    finished_s: list[float] = field(default_factory=list)
    arrived_s: list[float] = field(default_factory=list)
    prompt_tokens: list[int] = field(default_factory=list)
    hit_tokens: list[int] = field(default_factory=list)
    fetched_tokens: list[int] = field(default_factory=list)
    tpot_s: list[float] = field(default_factory=list)
    num_coalesced: int = 0
    num_moved: int = 0

    def bytes_in_memory(self, sizes: Sizes) -> int:
        """Bytes of blocks that were hit in memory, so that nothing was loaded."""
        tokens = sum(max(0, hit - fetched) for hit, fetched in zip(self.hit_tokens, self.fetched_tokens, strict=True))
        return tokens // sizes.block_size * sizes.block_bytes

    @property
    def ttft_s(self) -> list[float]:
        return [finished - arrived for finished, arrived in zip(self.finished_s, self.arrived_s, strict=True)]

    def window(self, start_s: float, end_s: float) -> tuple[float | None, float | None]:
        """Hit rate and p90 time of the requests that arrived in this window; None if no request arrived."""
        arrived = np.asarray(self.arrived_s)
        rows = np.flatnonzero((arrived >= start_s) & (arrived < end_s))
        if not len(rows):
            return None, None
        tokens, hits = np.asarray(self.prompt_tokens)[rows], np.asarray(self.hit_tokens)[rows]
        return float(hits.sum() / tokens.sum()), percentile(np.asarray(self.ttft_s)[rows].tolist(), 0.9)


_COLUMNS: tuple[tuple[str, Callable[[PolicyResult], str]], ...] = (
    ("policy", lambda r: r.policy),
    ("hit", lambda r: f"{r.token_hit_rate:.2%}"),
    ("fetched", lambda r: f"{r.fetched_share:.2%}"),
    ("p50 s", lambda r: f"{r.ttft_p50_s:.3f}"),
    ("p90 s", lambda r: f"{r.ttft_p90_s:.3f}"),
    ("p99 s", lambda r: f"{r.ttft_p99_s:.3f}"),
    ("goodput/s", lambda r: f"{r.goodput:.2f}"),
    ("max/mean", lambda r: f"{r.load_max_over_mean:.2f}"),
    ("busy", lambda r: f"{r.utilisation:.0%}"),
    ("coalesced", lambda r: f"{r.coalesced_share:.2%}"),
)
_STORE_COLUMNS: tuple[tuple[str, Callable[[PolicyResult], str]], ...] = (
    ("own GB", lambda r: f"{r.bytes_by_tier['disk'] / 1e9:.1f}"),
    ("others' GB", lambda r: f"{r.bytes_by_tier['peer'] / 1e9:.1f}"),
    ("objects GB", lambda r: f"{r.bytes_by_tier['object'] / 1e9:.1f}"),
    ("copied GB", lambda r: f"{r.bytes_by_tier['copied'] / 1e9:.1f}"),
    ("uploaded GB", lambda r: f"{r.bytes_by_tier['uploaded'] / 1e9:.1f}"),
    ("prompts $", lambda r: f"{r.dollars:.2f}"),
    ("objects $", lambda r: f"{r.object_bill.dollars:.2f}"),
)
_KILL_COLUMNS: tuple[tuple[str, Callable[[PolicyResult], str]], ...] = (
    ("hit before", lambda r: _shown(r.before_hit_rate, "{:.2%}")),
    ("hit after", lambda r: _shown(r.after_hit_rate, "{:.2%}")),
    ("p90 before", lambda r: _shown(r.before_ttft_p90_s, "{:.3f}")),
    ("p90 after", lambda r: _shown(r.after_ttft_p90_s, "{:.3f}")),
)


def _as_dict(result: PolicyResult) -> dict[str, Any]:
    fields = asdict(result)
    fields["object_bill"]["dollars"] = result.object_bill.dollars
    return fields


def cluster_text(simulation: ClusterSimulation) -> str:
    """A heading and an aligned table."""
    store = "with the shared store" if simulation.shared_store else "without a shared store"
    if simulation.num_stores > 1:
        store = f"with {simulation.num_stores} stores"
    if simulation.object_bytes:
        store += f" and an object tier of {simulation.object_bytes / 1e12:.1f} TB"
    workers = f"{simulation.num_prefill} prefill and {simulation.num_decode} decode workers, {store}"
    if simulation.engines:
        where = "any block" if simulation.engines == "full" else "where window state was left"
        workers = (
            f"{simulation.num_prefill} workers of other engines, each with its own memory, which continue at {where}"
        )
    heading = (
        f"{simulation.trace}: {simulation.num_requests} requests, {simulation.prompt_tokens / 1e6:.1f}M prompt tokens, "
        f"{workers}"
    )
    columns: Sequence[tuple[str, Callable[[PolicyResult], str]]] = _COLUMNS
    if any(result.after_hit_rate is not None for result in simulation.results):
        columns = (*_COLUMNS, *_KILL_COLUMNS)
    if simulation.num_stores > 1 or simulation.object_bytes:
        columns = (*columns, *_STORE_COLUMNS)
    head = [name for name, _ in columns]
    rows = [[cell(result) for _, cell in columns] for result in simulation.results]
    return heading + "\n" + text_table(head, rows)


def _shown(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)
