"""Simulations as text: one table per store size, with the ideal and the strategies as columns."""

from __future__ import annotations

from collections.abc import Callable

from antefix.text_table import text_table
from antefix_simulate.replay_result import Simulation, StrategyResult

_COLUMNS: tuple[tuple[str, Callable[[StrategyResult], str]], ...] = (
    ("strategy", lambda r: r.strategy),
    ("hit", lambda r: f"{r.token_hit_rate:.2%}"),
    ("of ideal", lambda r: f"{r.share_of_ideal:.2%}"),
    ("spared", lambda r: f"{r.work_share_of_ideal:.2%}"),
    ("ckpt/req", lambda r: f"{r.checkpoints_per_request:.2f}"),
    ("kept", lambda r: human_bytes(r.bytes_kept)),
    ("windows", lambda r: human_bytes(r.checkpoint_bytes_kept)),
    ("written", lambda r: human_bytes(r.bytes_written)),
    ("recomputed", lambda r: f"{r.recomputed_tokens / 1e6:.2f}M"),
    ("p50 s", lambda r: f"{r.ttft_p50_s:.3f}"),
    ("p90 s", lambda r: f"{r.ttft_p90_s:.3f}"),
    ("p99 s", lambda r: f"{r.ttft_p99_s:.3f}"),
    ("dollars", lambda r: f"{r.dollars:.2f}"),
)

LEGEND = """\
hit: share of prompt tokens that did not run; replayed tokens count as run
of ideal: "hit" divided by the hit rate of an endless store with window state everywhere
spared: the same by work, since a replayed token runs through about half of the layers
ckpt/req: checkpoints written per request
kept: bytes in the store at the end; windows: the part of these bytes that checkpoints take
written: bytes written to the store
recomputed: tokens that ran again although they were stored
p50 to p99: time to first token, without waiting in queues
dollars: price of all prompt tokens"""


def as_text(simulation: Simulation) -> str:
    """A heading and an aligned table."""
    store = "endless store" if simulation.store_bytes is None else f"store of {human_bytes(simulation.store_bytes)}"
    ideal = simulation.results[0].ideal_token_hit_rate if simulation.results else 0.0
    in_store = simulation.store_ideal_token_hit_rate
    bounded = f", {in_store:.2%} with free window state in this store" if in_store < ideal else ""
    heading = (
        f"{simulation.trace}: {simulation.num_requests} requests, {simulation.prompt_tokens / 1e6:.1f}M prompt tokens, "
        f"{simulation.model}, {store}, ideal hit rate {ideal:.2%}{bounded}"
    )
    head = [name for name, _ in _COLUMNS]
    rows = [[cell(result) for _, cell in _COLUMNS] for result in simulation.results]
    return heading + "\n" + text_table(head, rows)


def human_bytes(nbytes: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.2f} TB"
