"""Tables of window strategies and replays, simulated and measured; benchmarks/tables.py says how tables are made."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from benchmarks.tables import Row, table

WINDOWS = ("antefix/window", "simulate/antefix_simulate")
_AGES = {"1 min": "within 1 min", "5 min": "5 min", "1 h": "1 h", "4 h": "4 h", "24 h": "24 h"}


@table("trace_habits.json", *WINDOWS)
def reuse_age(record: Any) -> Iterable[Row]:
    tables = {name: each["how auto's checkpoints are used"] for name, each in record["traces"].items()}
    head = next(iter(tables.values()))[0]
    yield "trace", *(_AGES.get(name, name) for name in head)
    for trace, (_, *rows) in tables.items():
        named = trace
        for row in rows:
            yield named, *row
            named = ""


@table("bounded_replay.json", "antefix/model")
def replay_errors(record: Any) -> Iterable[Row]:
    yield (
        *("windows", "tokens replayed", "largest error (lower is better)", "median"),
        *("KL divergence, nats per token", "likeliest token differs"),
    )
    for row in record["rows"]:
        yield (
            str(row["windows"]),
            str(row["replayed_tokens"]),
            *(f"{row[key]:.2g}" for key in ("max_error", "median_error", "mean_kl")),
            f"{row['argmax_differs']:.1%}",
        )


@table("step_compiled.json", "antefix/model")
def steps_on_a_cpu(record: Any) -> Iterable[Row]:
    yield (
        *("sequences", "compiled, ms (lower is better)", "compiled, one by one, ms", "torch alone, ms"),
        *("torch alone over compiled", "tokens/s, compiled (higher is better)"),
    )
    for row in record["rows"]:
        yield (
            str(row["sequences"]),
            *(f"{1000 * row[way]:.1f}" for way in ("together", "one by one", "torch alone")),
            f"{row['torch alone'] / row['together']:.1f}",
            f"{row['sequences'] / row['together']:.0f}",
        )
