"""Tables of other engines that use the store, and of a fleet; benchmarks/tables.py says how tables are made."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from benchmarks.tables import Row, table

ENGINES = ("engines/antefix_engines", "antefix/store", "kvstore/antefix_kvstore")


@table("engines_vllm_tiers.json", *ENGINES)
def next_to_the_file_tier(record: Any) -> Iterable[Row]:
    yield "16,384 tokens in V4-Flash's rows (lower is better)", "Antefix", "vLLM's files"
    ours, theirs = record["antefix"], record["files"]
    yield "on disk, MB", *(f"{one['disk_bytes'] / 1e6:.1f}" for one in (ours, theirs))
    for said, key in (
        ("restore from the disk, s", "restore_disk_s"),
        ("restore with what was written in memory, s", "restore_cached_s"),
        ("store, in the background, s", "store_s"),
    ):
        yield said, *(f"{one[key]:.2f}" for one in (ours, theirs))


@table("engines_vllm.json", *ENGINES)
def vllm_processes(record: Any) -> Iterable[Row]:
    names = ("Antefix", "files, a window every 256", "files, as they come")
    runs = [record[name] for name in names]
    yield "a small V4", "Antefix, a window every 256 tokens", "files, the same", "files, vLLM's default"
    yield "windows on disk, MB", *(f"{run['windows_bytes'] / 1e6:.1f}" for run in runs)
    yield "hit after a restart, of 540 tokens; equal to cold", *(_hits(run["whole"]) for run in runs)
    yield "fork at token 360", *(_hits(run["a fork inside it"]) for run in runs)
    yield "five prompts at once, 270 tokens each", *(_hits(run["prompts at once"]) for run in runs)
    flips = [run["after flipped bytes"] for run in runs]
    yield (
        "after a flipped byte in blocks up to 512",
        *(
            f"{flip['hit_tokens']} hit, {'**other tokens**' if flip['difference'] else 'answer right'}"
            for flip in flips
        ),
    )
    yield "reading, all loads of that process, s", *(f"{run['read_s']:.2f}" for run in runs)


def _hits(found: Any) -> str:
    tokens = sorted(set(found["hit_tokens"]))
    return f"{', '.join(str(number) for number in tokens)}; {'equal' if found['equal'] else '**not equal**'}"


@table("engines_vllm_restore_v4.json", *ENGINES)
def restores_of_v4(record: Any) -> Iterable[Row]:
    yield from _restores(record)


@table("engines_vllm_restore_plain.json", *ENGINES)
def restores_of_a_plain_model(record: Any) -> Iterable[Row]:
    yield from _restores(record)


def _restores(record: Any) -> Iterable[Row]:
    ours, theirs = record["Antefix"], record["files, a window every 256"]
    yield f"a load of {ours['hit_tokens'][0]} tokens, as vLLM counts it, ms (lower is better)", "Antefix", "files"
    for said, key in (("median of 10", "load_ms"), ("the least", "load_ms_least")):
        yield said, f"{ours[key]:.1f}", f"{theirs[key]:.1f}"


@table("fleet_engines.json", "router/antefix_router/fleet", "router/antefix_router/placement")
def hits_of_a_fleet(record: Any) -> Iterable[Row]:
    yield (
        *("policy", "requests", "prompt tokens hit, % (higher is better)", "expected by the router, %"),
        "lost tokens (0 wanted)",
    )
    for row in record["policies"]:
        shares = (f"{100 * row[key] / row['prompt_tokens']:.1f}" for key in ("hit_tokens", "expected_tokens"))
        yield f"`{row['policy']}`", str(row["num_requests"]), *shares, f"{row['lost_tokens']:,}"


@table("engines_three_way.json", "engines/antefix_engines/v4_entries.py", "antefix/model")
def entries_of_three_engines(record: Any) -> Iterable[Row]:
    names = {"antefix": "Antefix", "vllm": "vLLM", "transformers": "transformers"}
    pairs = [" and ".join(names[one] for one in pair.split(" against ")) for pair in record["pairs"]]
    yield "layer and group", *pairs
    for found in zip(*record["pairs"].values(), strict=True):
        group = found[0]["group"].replace("_", " ")
        cells = (f"{100 * each['share_rounded']:.0f}%, {each['largest']:.2f}" for each in found)
        yield f"{found[0]['layer']} {group}", *cells
