"""Tables of window strategies and replays, simulated and measured; benchmarks/tables.py says how tables are made."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from benchmarks.tables import Row, table

WINDOWS = ("antefix/window", "simulate/antefix_simulate")
_AGES = {"1 min": "within 1 min", "5 min": "5 min", "1 h": "1 h", "4 h": "4 h", "24 h": "24 h"}


def _replayed(record: Any) -> list[Any]:
    return [each for each in record["simulations"] if "no replay" not in each["trace"]]


@table("simulate_windows.json", *WINDOWS)
def endless_stores(record: Any) -> Iterable[Row]:
    yield (
        *("trace", "strategy", "hit rate", "of ideal", "of ideal, by work", "checkpoints per request"),
        *("stored at most, GB", "written, GB", "recomputed, million tokens", "TTFT p50 / p90, s", "input price, $"),
    )
    for each in _replayed(record):
        if each["store_bytes"] is not None:
            continue
        ideal = next(iter(each["strategies"].values()))["ideal_token_hit_rate"]
        named = f"{each['trace']}, ideal {ideal:.2%}"
        for name, found in each["strategies"].items():
            yield (
                named,
                f"`{name}`",
                *(f"{found[key]:.2%}" for key in ("token_hit_rate", "share_of_ideal", "work_share_of_ideal")),
                f"{found['checkpoints_per_request']:.2f}",
                f"{found['bytes_kept_max'] / 1e9:.0f}",
                f"{found['bytes_written'] / 1e9:.0f}",
                f"{found['recomputed_tokens'] / 1e6:.2f}",
                f"{found['ttft_p50_s']:.3f} / {found['ttft_p90_s']:.3f}",
                f"{found['dollars']:.2f}",
            )
            named = ""


@table("simulate_windows.json", *WINDOWS)
def without_replay(record: Any) -> Iterable[Row]:
    simulated = [each for each in record["simulations"] if "no replay" in each["trace"]]
    yield "of ideal, without exact replay", *(each["trace"].partition(",")[0] for each in simulated)
    for name in simulated[0]["strategies"]:
        yield f"`{name}`", *(f"{each['strategies'][name]['share_of_ideal']:.2%}" for each in simulated)


@table("simulate_windows_limited.json", *WINDOWS)
def limited_stores(record: Any) -> Iterable[Row]:
    bounded = [each for each in _replayed(record) if each["store_bytes"] is not None]
    yield "trace and store", *(f"`{name}`" for name in bounded[0]["strategies"]), "free window state"
    for each in bounded:
        yield (
            f"{each['trace']}, {each['store_bytes'] / 1e9:.0f} GB",
            *(
                f"{found['token_hit_rate']:.2%} ({found['bytes_written'] / 1e9:.0f})"
                for found in each["strategies"].values()
            ),
            f"{each['store_ideal_token_hit_rate']:.2%}",
        )


def _age(seconds: float) -> str:
    return f"{seconds / 3600:g} h" if seconds >= 3600 else f"{seconds / 60:g} min"


@table("simulate_windows.json", *WINDOWS)
def best_strategies(record: Any) -> Iterable[Row]:
    yield "prefix", "age", "next turn: fastest", "per byte", "left inside: fastest", "per byte"
    for row in record["break_even"]:
        if row["disk_bytes_per_s"] == 1.5e9:
            best = ("continue_fastest", "continue_per_byte", "leave_fastest", "leave_per_byte")
            yield f"{row['prefix_tokens']:,}", _age(row["age_s"]), *(f"`{row[key]}`" for key in best)


@table("simulate_windows.json", *WINDOWS)
def saved_per_byte(record: Any) -> Iterable[Row]:
    yield (
        "prefix",
        "age",
        "strategy",
        "stored, MB",
        "next turn, s",
        "saved s per GB",
        "left inside, s",
        "saved s per GB",
    )
    for row in record["break_even"]:
        named = f"{row['prefix_tokens']:,}", _age(row["age_s"])
        for found in row.get("outcomes", ()):
            gigabytes = found["stored_bytes"] / 1e9
            yield (
                *named,
                f"`{found['strategy']}`",
                f"{1000 * gigabytes:.1f}",
                f"{found['continue_ttft_s']:.3f}",
                f"{found['continue_saved_s'] / gigabytes:.1f}",
                f"{found['leave_ttft_s']:.3f}",
                f"{found['leave_saved_s'] / gigabytes:.1f}",
            )
            named = "", ""


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


@table("window_quality.json", "antefix/model", "antefix/window")
def text_after_replays(record: Any) -> Iterable[Row]:
    yield (
        *("hit at", "replayed", "bits per byte 0-64 (lower is better)", "64-256", "256-1,024"),
        *("divergence, bits per token", "largest logit difference"),
        *("facts at 40, 200, 800 tokens, of 16", "question cut by the hit, of 16"),
    )
    documents = record["documents"]
    for offset, lengths in record["offsets"].items():
        named = offset
        for windows, found in lengths.items():
            exact = f"{record['replay_tokens']} tokens: exact"
            replayed = {"0": "none", "1": "1 window", "exact": exact}.get(windows, f"{windows} windows")
            answered = [round(documents * found[f"retrieval_{kind}"]) for kind in ("near", "beyond", "far", "cut")]
            yield (
                *(named, replayed),
                *(f"{found[f'bits_{low}_{high}']:.4f}" for low, high in ((0, 64), (64, 256), (256, 1024))),
                f"{found['divergence_bits']:.1e}" if found["divergence_bits"] else "0",
                f"{found['largest_difference']:.3g}",
                ", ".join(str(count) for count in answered[:3]),
                str(answered[3]),
            )
            named = ""


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
