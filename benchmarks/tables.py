"""The tables that documents show, made from benchmarks/results/*.json; docs/generate_results.py puts them there.

A table is a function of its record that gives rows: the head first, then the body. `measures` names the code whose
changes may make the figures untrue, so that `python docs/generate_results.py --stale` can list old ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

Row = tuple[str, ...]
MakeRows = Callable[[Any], Iterable[Row]]


@dataclass(frozen=True)
class Table:
    """rows: the head, then the body.  measures: the measured code's files and folders, from the repository's root."""

    rows: MakeRows
    measures: tuple[str, ...]


TABLES: dict[tuple[str, str], Table] = {}
# Records that documents name but no table shows, and the code that each record measures.
NAMED: dict[str, tuple[str, ...]] = {
    "agents.json": ("router", "prefill", "decode", "antefix/model"),
    "agents_bound.json": ("antefix/model",),
    "break_even_services.json": ("router", "prefill", "decode", "kvstore", "simulate/antefix_simulate"),
    "grants.json": ("antefix/security",),
    "index_readers.json": ("antefix/store_files",),
    "threads_bound.json": ("antefix/model",),
    "unusable_kv.json": ("antefix/model/finite.py", "antefix/model/pool.py", "antefix/model/quant.py"),
    "ranks_on_cards_services.json": ("antefix/model", "prefill/antefix_prefill/worker"),
}
# Records of code that has been replaced. Documents show them next to the present figures, or as what was tried.
HISTORY = frozenset(
    {
        "agents_short_pieces.json",
        "card_restore.json",
        "decode_on_card_launched.json",
        "packed_candidates.json",
        "ranks_on_cards_before.json",
        "store.json",
    }
)


def table(file: str, *measures: str) -> Callable[[MakeRows], MakeRows]:
    """Registers a function under the record's file name and its own name."""

    def register(rows: MakeRows) -> MakeRows:
        TABLES[file, rows.__name__] = Table(rows, measures)
        return rows

    return register


def measured() -> Iterator[tuple[str, tuple[str, ...]]]:
    """Each record that a table shows, and the code that the record measures.

    A table may join several records with `+`.
    """
    for (files, _), each in TABLES.items():
        for file in files.split("+"):
            yield file, each.measures


# What the simulator runs of placement: not the modules that follow running workers (leases, feeds of events).
_PLACED = ("backlog", "directory", "loading", "moves", "pace", "policy", "sessions", "work", "workers")
ROUTING = (*(f"router/antefix_router/placement/{name}.py" for name in _PLACED), "simulate/antefix_simulate")


@table("placement.json", "router/antefix_router/placement", "antefix/block.py")
def decisions(record: Any) -> Iterable[Row]:
    yield "", "unit", "better", "figure"
    yield "decisions, growing conversations", "per second", "higher", f"{record['decisions_per_s']:,.0f}"
    yield "the same, median", "ms", "lower", f"{record['decision_p50_ms']:.2f}"
    yield "the same, 99th percentile", "ms", "lower", f"{record['decision_p99_ms']:.2f}"
    yield "decisions, prompts never seen", "per second", "higher", f"{record['unseens_per_s']:,.0f}"
    yield "the same, median", "ms", "lower", f"{record['unseen_p50_ms']:.2f}"
    yield "the same, 99th percentile", "ms", "lower", f"{record['unseen_p99_ms']:.2f}"
    yield "hashing the whole prompt, part of the above", "ms", "lower", f"{record['hashing_whole_prompt_ms']:.2f}"
    yield "directory, per block", "bytes", "lower", f"{record['directory_bytes_per_block']:.0f}"
    per_holder = record["directory_bytes_per_block_and_holder"]
    yield "directory, per block and worker that holds it", "bytes", "lower", f"{per_holder:.0f}"
    yield "events of stored blocks", "million per second", "higher", f"{record['stored_events_per_s'] / 1e6:.1f}"
    yield "events of evicted blocks", "million per second", "higher", f"{record['evicted_events_per_s'] / 1e6:.1f}"


@table("policies.json", *ROUTING)
def policies(record: Any) -> Iterable[Row]:
    yield (
        *("scene", "policy", "hit rate, %", "copied, %", "p50, s", "p90, s", "p99, s"),
        *("good requests per s", "busiest worker over the mean"),
    )
    for scene in record["scenes"]:
        store = "store" if scene["store"] else "no store"
        named = f"{scene['trace']}, {scene['workers']} workers, {store}, {scene['load']}, x{scene['speedup']:g}"
        for name, found in scene["policies"].items():
            yield (
                named,
                name,
                f"{100 * found['token_hit_rate']:.2f}",
                f"{100 * found['fetched_share']:.1f}",
                *(f"{found[f'ttft_{percentile}_s']:.3g}" for percentile in ("p50", "p90", "p99")),
                f"{found['goodput']:.2f}",
                f"{found['load_max_over_mean']:.2f}",
            )
            named = ""


@table("copy_weight.json", *ROUTING)
def hit_rate_or_wait(record: Any) -> Iterable[Row]:
    # The halves with 64 workers are in the record.
    scenes = [scene for scene in record["scenes"] if scene["workers"] == 8 or scene["part"] == "all"]
    named = [f"{scene['trace']}, {scene['part']}, {scene['workers']} workers" for scene in scenes]
    yield "hit rate, %; p90, s", *named
    for name in scenes[0]["policies"]:
        found = [scene["policies"][name] for scene in scenes]
        yield name, *(f"{100 * one['token_hit_rate']:.2f}; {one['ttft_p90_s']:.3g}" for one in found)


@table("kill_worker.json", *ROUTING)
def after_a_worker_died(record: Any) -> Iterable[Row]:
    yield "scene", "hit rate, %", "the same, nobody died", "p90, s", "the same, nobody died"
    for named, key in (("a store", "store"), ("no store", "no_store")):
        rates = [100 * record[f"{key}_{part}_hit_rate"] for part in ("killed", "undisturbed")]
        waits = [record[f"{key}_{part}_ttft_p90_s"] for part in ("killed", "undisturbed")]
        yield named, *(f"{rate:.2f}" for rate in rates), *(f"{wait:.2f}" for wait in waits)


@table("fleet.json", *ROUTING)
def a_thousand_workers(record: Any) -> Iterable[Row]:
    yield "workers", "requests", "documents", "blocks, million", "processor time, s", "peak memory, GB", "hit rate, %"
    yield (
        *(f"{record[key]:,}" for key in ("workers", "requests", "documents")),
        f"{record['blocks'] / 1e6:.0f}",
        f"{record['simulated_cpu_s']:.0f}",
        f"{record['peak_gb']:.1f}",
        f"{100 * record['token_hit_rate']:.2f}",
    )


@table("fuzz.json", "tests/fuzz/targets.py")
def fuzz_targets(record: Any) -> Iterable[Row]:
    yield "reader", "minutes (10 wanted)", "inputs", "broke a rule (0 wanted; all mended)"
    for name, found in sorted(record["targets"].items()):
        yield name, f"{found['seconds'] / 60:.1f}", f"{found['executions']:,}", str(found["crashes"])


@table("overload.json", "router/antefix_router/load_shedding.py", "router/antefix_router/gateway")
def overload(record: Any) -> Iterable[Row]:
    rates = record["rates"]
    yield (
        *("rate", "asked per s", "answered per s (higher is better)", "p50, ms", "p99, ms"),
        *("refused with 429", "p99 back after, s"),
    )
    for name, key in (
        ("one after the other", "idle"),
        ("as many as 16 clients get", "peak"),
        ("the highest rate with bounded p99", "highest"),
        ("2 times that", "times_2"),
        ("the highest rate again", "after_times_2"),
        ("10 times that", "times_10"),
        ("the highest rate again", "after_times_10"),
    ):
        found = rates[key]
        yield (
            name,
            f"{found['asked_per_s']:.1f}",
            f"{found['goodput_per_s']:.1f}",
            f"{found['p50_ms']:,}",
            f"{found['p99_ms']:,}",
            f"{found['statuses'].get('429', 0):,}",
            str(_back_after(found)) if "back_after_s" in found else "",
        )


@table("overload.json", "router/antefix_router/load_shedding.py", "router/antefix_router/gateway")
def overload_goals(record: Any) -> Iterable[Row]:
    rates = record["rates"]
    yield "", "2 times the highest rate", "10 times", "wanted"
    shares = (f"{rates[f'goodput_of_peak_times_{factor}']:.2f}" for factor in (2, 10))
    yield "answers per second, of the most at any rate", *shares, "0.9 or more"
    times = (str(_back_after(rates[f"after_times_{factor}"])) for factor in (2, 10))
    yield "seconds from the end until p99 is within 10% of before", *times, "10 or less"


def _back_after(found: Any) -> object:
    """None: it was not back within the half of the time that is looked at."""
    return "not in time" if found["back_after_s"] is None else found["back_after_s"]


# Each row: the figure's name, its key in the record, its digits, and its goal.
_LIMITS = (
    ("durable put over fio's best durable writer", "put_over_fio", 2, "0.95 or more"),
    ("cold restore over the best reader of the disk", "restore_over_best_reader", 2, "0.95 or more"),
    ("warm restore over the best preadv", "warm_ratio", 2, "0.85 or more"),
    ("the same without machine code", "warm_uncompiled_ratio", 2, "for comparison"),
    ("warm restore over preadv and XXH3 with nothing else", "warm_over_checked", 2, "for comparison"),
    ("the same without machine code", "warm_uncompiled_over_checked", 2, "1 at most"),
    ("preadv and XXH3 with nothing else over the best preadv", "checked_ratio", 2, "bound of two passes"),
    ("one pass with nothing else over the best preadv", "one_pass_ratio", 2, "bound of one pass"),
    ("warm restore over one pass with nothing else", "warm_over_one_pass", 2, "for comparison"),
    ("preadv and the sum of all words over the best preadv", "summed_ratio", 2, "for comparison"),
    ("fio's best durable writer over itself a moment before", "fio_over_fio", 2, "how much the disk varies"),
    ("naming 1M tokens and looking them up, ms", "lookup_ms", 1, "3 or less"),
    ("the same without machine code", "lookup_uncompiled_ms", 1, "for comparison"),
    ("of it the store's own part, ms", "lookup_store_ms", 1, ""),
    ("index, bytes per block, 992,251 blocks", "index_bytes_per_block", 0, "200 or less"),
    ("opening after a crash, s", "open_crashed_s", 2, "1 or less"),
    ("its peak of memory, MiB", "open_crashed_peak_mib", 0, "flat"),
    ("opening without an index, s", "open_without_index_s", 1, "8 or less"),
    ("its peak of memory, MiB", "open_without_index_peak_mib", 0, "flat"),
    ("eviction and compaction over put, blocks of 448 KiB", "upkeep_large_over_put", 2, "0.5 or more"),
    ("the same, small blocks", "upkeep_small_over_put", 2, "0.5 or more"),
    ("restore next to them over restore alone, 448 KiB", "upkeep_large_restore_over_alone", 2, "0.9 or more"),
    ("the same, small blocks", "upkeep_small_restore_over_alone", 2, "0.9 or more"),
    ("remote restores by 4 clients over those of one", "clients_get_4_over_1", 2, "1 or more"),
    ("the same by 8", "clients_get_8_over_1", 2, "1 or more"),
    ("durable puts by 4 clients over those of one", "clients_put_4_over_1", 2, "1 or more"),
    ("the same by 8", "clients_put_8_over_1", 2, "1 or more"),
    ("look-ups by 4 clients over those of one", "clients_lookup_4_over_1", 2, "1 or more"),
    ("the same by 8", "clients_lookup_8_over_1", 2, "1 or more"),
    ("a put next to 4 restores over its fair share", "clients_put_over_fair_share", 2, "1 or more"),
    ("a look-up next to 4 restores, p50, ms", "clients_lookup_next_to_gets_p50_ms", 1, "5 or less"),
)


@table("store_limits.json", "kvstore/antefix_kvstore", "antefix/store_files", "antefix/store")
def store_in_short(record: Any) -> Iterable[Row]:
    yield "", "ratio", "half of the rounds lie in", "wanted"
    for name, key, wanted in (
        ("durable put over fio's best durable writer", "put_over_fio", "0.95 or more"),
        ("cold restore over the best reader of the disk", "restore_over_best_reader", "0.95 or more"),
        ("warm restore, checked, over the best preadv without a check", "warm_ratio", "0.85 or more"),
        ("remote restore over a bare gRPC stream", "remote_ratio", ""),
    ):
        if key in record:
            spread = f"{record[f'{key}_low']:.2f} to {record[f'{key}_high']:.2f}" if f"{key}_low" in record else ""
            yield name, f"{record[key]:.2f}", spread, wanted


@table(
    "store_limits.json",
    "kvstore/antefix_kvstore",
    "antefix/store_files",
    "antefix/store",
    "antefix/block.py",
    "antefix/lane_hashes.py",
)
def limits(record: Any) -> Iterable[Row]:
    shown = [row for row in _LIMITS if row[1] in record]
    has_spread = any(f"{key}_low" in record for _, key, _, _ in shown)
    yield "", "figure", *(("half of the rounds lie in",) if has_spread else ()), "wanted"
    for name, key, digits, limit in shown:
        spread = [f"{record[f'{key}_{end}']:.{digits}f}" for end in ("low", "high") if f"{key}_{end}" in record]
        yield name, f"{record[key]:.{digits}f}", *((" to ".join(spread),) if has_spread else ()), limit


@table("store_clients.json", "kvstore/antefix_kvstore", "antefix/store_files", "antefix/store")
def many_clients(record: Any) -> Iterable[Row]:
    yield "", "figure", "half of the rounds lie in", "wanted"
    found = record["ratios"] | record
    for name, key, digits, limit in _LIMITS:
        if key.startswith("clients_"):
            value, low, high = (
                f"{found[key.removeprefix('clients_') + end]:.{digits}f}" for end in ("", "_low", "_high")
            )
            yield name, value, f"{low} to {high}", limit


@table("cpu_peers.json", "antefix/model")
def threads_next_to_transformers(record: Any) -> Iterable[Row]:
    yield (
        "tokens/s, higher is better",
        "ours, 1 thread",
        "2 threads",
        "2 over 1",
        "transformers, 1 thread",
        "2 threads",
        "best of ours over best of theirs",
    )
    for row in record["rows"]:
        ours, twice = (row["tokens"] / row[key] for key in ("ours_1", "ours_2"))
        theirs = [row["tokens"] / row[key] for key in ("theirs_1", "theirs_2") if key in row]
        yield (
            row["what"],
            f"{ours:,.0f}",
            f"{twice:,.0f}",
            f"{twice / ours:.2f}",
            *(f"{rate:,.0f}" for rate in theirs),
            *([""] * (2 - len(theirs))),
            f"{max(ours, twice) / max(theirs):.1f}" if theirs else "",
        )


@table("long_prompts_small.json", "router", "prefill", "decode", "kvstore", "antefix")
def memory_under_long_prompts(record: Any) -> Iterable[Row]:
    yield "PSS in MB", "idle before", "largest while asked", "afterwards", "CPU, s"
    for role, held in record["memory_mb"].items():
        most = max(held["peak of the first half"], held["peak of the second half"])
        yield role, *(f"{value:.0f}" for value in (held["idle"], most, held["after"], held["cpu_s"]))


VERIFIED = ("antefix/model", "antefix/window", "prefill", "decode", "kvstore", "console/antefix_console/verify")


@table("verify.json", *VERIFIED)
def verified_on_a_cpu(record: Any) -> Iterable[Row]:
    yield "strategy or part", "cases", "equal to the bit", "within bounds", "failed (0 wanted)"
    report = record["report"]
    for row in [*report["rows"], {**report, "strategy": "all"}]:
        counts = (row[key] for key in ("cases", "bit_identical", "within_bounds", "failed"))
        yield row["strategy"], *(f"{count:,}" for count in counts)


@table("worker_memory.json", "router", "prefill", "decode", "kvstore", "antefix")
def idle_memory(record: Any) -> Iterable[Row]:
    yield "MB, lower is better", "PSS when started", f"after {record['requests']} requests", "wanted", "RSS"
    for role, use in record["idle"].items():
        wanted = "450 or less" if role in ("prefill", "decode") else ""
        before = record["started"][role]["pss_mb"]
        yield role, f"{before:.0f}", f"{use['pss_mb']:.0f}", wanted, f"{use['rss_mb']:.0f}"


@table("ttft.json", "router", "prefill", "decode", "kvstore", "antefix")
def time_to_first_token(record: Any) -> Iterable[Row]:
    has_alone = all("floor_alone_s" in row for row in record["rows"])
    names = "tokens, hit and new", "cold, s", "hit in memory, ms", "hit on disk, ms", "times faster", "floor, ms"
    yield *names, *(("floor, model alone, ms",) if has_alone else ())
    for row in record["rows"]:
        yield (
            f"{row['hit_tokens']:,} + {row['miss_tokens']}",
            f"{row['cold_ttft_s']:.2f}",
            f"{1000 * row['memory_hit_ttft_s']:.0f}",
            f"{1000 * row['disk_hit_ttft_s']:.0f}",
            " to ".join(f"{times:.0f}" for times in sorted((row["disk_speedup"], row["memory_speedup"]))),
            f"{1000 * row['floor_s']:.0f}",
            *((f"{1000 * row['floor_alone_s']:.0f}",) if has_alone else ()),
        )


RANKS = ("antefix/model", "kernels/antefix_kernels", "prefill/antefix_prefill/worker")


def _steps_over_ranks(record: Any) -> Iterable[Row]:
    yield (
        "",
        "seconds",
        "tokens/s (higher is better)",
        "floor, s",
        "times the floor (lower is better)",
        "share in exchanges",
    )
    for row in record["decode"]:
        name = f"a decode step of {row['sequences']}, each behind {row['context']:,} tokens"
        yield name, *_over_floor(row, "step_s")
    for row in record["prefill"]:
        yield f"a chunk of {row['chunk']:,} behind {row['context']:,} tokens", *_over_floor(row, "chunk_s")


def _over_floor(row: Any, key: str) -> Row:
    figures = (f"{row[key]:.2f}", f"{row['tokens_per_s']:,.4g}", f"{row['floor_s']:.4f}", _times(row["over"]))
    return *figures, f"{row['exchange_share']:.2f}"


def _times(ratio: float) -> str:
    return f"{ratio:.1f}" if ratio < 10 else f"{ratio:,.0f}"


@table("ranks_on_cards.json", *RANKS)
def steps_over_ranks(record: Any) -> Iterable[Row]:
    return _steps_over_ranks(record)


@table("ranks_on_cards_before.json", *RANKS)
def steps_over_ranks_before(record: Any) -> Iterable[Row]:
    return _steps_over_ranks(record)


@table("ranks_on_cards_restore.json", *RANKS)
def restores_over_ranks(record: Any) -> Iterable[Row]:
    yield (
        *("prefix, tokens", "cold, s", "times its floor", "from disk, s", "of it reading", "computing 100 tokens"),
        *("floor of disk and computing, s", "cold over disk (higher is better)"),
    )
    for row in record["restore"]:
        cold, disk = row["cold"]["until_logits_s"], row["from_disk"]
        yield (
            f"{row['tokens']:,}",
            f"{cold:.1f}",
            f"{cold / row['cold_floor_s']:.1f}",
            f"{disk['until_logits_s']:.2f}",
            f"{disk['read_s']:.2f}",
            f"{disk['compute_s']:.2f}",
            f"{row['from_disk_floor_s']:.2f}",
            f"{row['times']:.1f}",
        )


@table("ranks_on_cards_verify.json", *RANKS)
def verified_over_ranks(record: Any) -> Iterable[Row]:
    yield "ranks, a GPU each", "cases", "equal to the bit", "within bounds", "failed (0 wanted)"
    for run in record["verify"]:
        report = run["report"]
        counts = (report[key] for key in ("cases", "bit_identical", "within_bounds", "failed"))
        yield str(run["ranks"]), *(str(count) for count in counts)
