"""Tables of a store's writes, several stores and the object tier; benchmarks/tables.py says how tables are made."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from benchmarks.tables import ROUTING, Row, table

OBJECTS = ("antefix/objects", "kvstore/antefix_kvstore/object_upload.py", "kvstore/antefix_kvstore/upload_reads.py")
HIT = ("router", "prefill", "decode", "kvstore", "antefix")

_WRITES = (
    ("direct, 8 pieces of 1 MiB at a time from 8 threads, one sync", "threads"),
    ("the same with a sync per 56 MiB", "synced"),
    ("the same, but each write makes the file longer", "not_allocated"),
    ("the same over a file that has all its blocks", "written_over"),
    ("through the page cache, a sync per 56 MiB, new pages", "new_pages"),
    ("the same, pages of a file that was just deleted", "used_pages"),
    ("the store's put, through the page cache", "put_cached"),
    ("the store's put as it is", "put"),
)


@table("store_writes.json", "kvstore/antefix_kvstore/direct_writer.py", "kvstore/antefix_kvstore/segments.py")
def writes(record: Any) -> Iterable[Row]:
    yield "", "over fio's best durable writer (higher is better)", "half of the rounds lie in", "GB/s"
    for what, name in _WRITES:
        key = f"{name}_over_fio"
        spread = f"{record[f'{key}_low']:.2f} to {record[f'{key}_high']:.2f}"
        yield what, f"{record[key]:.2f}", spread, f"{record[f'{name}_gb_per_s']:.2f}"


@table("tier.json", *OBJECTS)
def object_tier(record: Any) -> Iterable[Row]:
    restore, upload = record["figures"]["restore"], record["figures"]["upload"]
    yield "", "figure", "wanted"
    yield "bare ranged reads over the tier, seconds (`range_ratio`)", f"{restore['range_ratio']:.2f}", "0.9 or more"
    yield "the tier, MB/s", f"{restore['tier_mb_per_s']:.0f}", ""
    yield "bare ranged reads by the same client, MB/s", f"{restore['bare_mb_per_s']:.0f}", ""
    peers = {
        "library": "the client library (obstore), MB/s",
        "boto3": "boto3, as many threads, MB/s",
        "lmcache": "LMCache's S3 connector, MB/s",
    }
    for name, named in peers.items():
        if f"speed_against_{name}" in restore:
            yield named, f"{restore[f'{name}_mb_per_s']:.0f}", ""
            yield "the tier's throughput over that", f"{restore[f'speed_against_{name}']:.2f}", "1 or more"
    yield "restores take longer while uploads run, by", f"{100 * upload['cost']:.1f}%", "5% or less"
    if "interval" in upload:
        low, high = (f"{100 * each:.1f}%" for each in upload["interval"])
        yield f"the 95% interval of that, {len(upload['costs'])} pairs", f"{low} to {high}", ""
    if "cost_with_server" in upload:
        yield "the same, with the S3 server on the same cores", f"{100 * upload['cost_with_server']:.1f}%", ""
    yield "uploads, MB/s, of 67 allowed", f"{upload['uploaded_mb_per_s']:.0f}", ""
    yield "uploads, processor seconds per GB", f"{upload['cpu_s_per_gb']:.2f}", ""


@table("object_faults.json", *OBJECTS, "antefix/store")
def answers_under_faults(record: Any) -> Iterable[Row]:
    yield (
        *("the server's answers are", "damaged", "answers", "unlike a cold run", "failed or stuck"),
        *("with a hit from the object tier", "longest, s", "memory grew by, MB"),
    )
    for row in record["answers"]:
        wrong, lost = row["different"], row["failed"] + row["stuck"]
        counts = (row["harmed"], row["answers"], wrong, lost, row["from_objects"])
        yield _damage(row["kind"]), *(str(each) for each in counts), f"{row['longest_s']:.1f}", f"{row['grown_mb']:.0f}"


@table("object_faults.json", *OBJECTS)
def reads_under_faults(record: Any) -> Iterable[Row]:
    yield (
        *("the server's answers are", "damaged", "reads", "complete", "blocks read", "wrong blocks"),
        *("longest, s", "memory grew by, MB"),
    )
    for row in record["reads"]:
        counts = (row["harmed"], row["reads"], row["whole"], row["blocks"], row["wrong_blocks"])
        yield (
            _damage(row["kind"]),
            *(f"{each:,}" for each in counts),
            f"{row['longest_s']:.1f}",
            f"{row['grown_mb']:.0f}",
        )


def _damage(kind: str) -> str:
    named = {"": "intact", "delay": "late", "truncate": "cut", "reset": "reset", "flip": "one bit flipped"}
    return "all of these" if "+" in kind else named.get(kind, kind)


@table("tier.json", "antefix/objects/object_index.py")
def object_index(record: Any) -> Iterable[Row]:
    yield "records", "bytes per record", "look-up of 128K tokens, ms", "look-up of 1M tokens, ms"
    for count, found in record["figures"]["index"].items():
        times = (found["look_up_128k_ms"], found["look_up_1m_ms"])
        yield f"{int(count):,}", f"{found['bytes_per_block']:.2f}", *(f"{each:.2f}" for each in times)


@table("simulate_index.json", "antefix/objects")
def simulated_index(record: Any) -> Iterable[Row]:
    yield "per process", "a worker, per hour", "a store, per hour", "a worker on a new host, once"
    worker, store, start = record["process"]["worker"], record["process"]["store"], record["start"]["worker"]
    for key, named in (("lists", "lists"), ("gets", "reads"), ("puts", "puts"), ("deletes", "deletes")):
        yield named, *(f"{each[key]:,.0f}" for each in (worker, store, start))
    yield "bytes, MB", *(f"{each['bytes'] / 1e6:,.0f}" for each in (worker, store, start))
    yield "processor seconds", *(f"{each['cpu_s']:.1f}" for each in (worker, store, start))
    yield "the longest refresh, processor seconds", *(f"{each['longest_cpu_s']:.2f}" for each in (worker, store)), ""
    found = record["look_ups"]
    for key, named in (("stale", "stale"), ("worst_stale", "stale, worst minute"), ("unknown", "unknown")):
        yield f"look-ups that are {named}", f"{100 * found[f'{key}_share']:.2f}%", "", ""


@table("simulate_index.json", "antefix/objects/janitor.py")
def simulated_tiles(record: Any) -> Iterable[Row]:
    yield "level", "bytes of a tile, MB", "seconds to write it", "hosts that write it", "without waiting"
    for row in record["tiles"]:
        sizes = (f"{row['bytes'] / 1e6:,.0f}", f"{row['write_s']:.1f}")
        yield str(row["level"]), *sizes, f"{row['writers']:.1f}", f"{row['together']:.0f}"


@table("ttft_tiers.json", *HIT)
def first_token_by_tier(record: Any) -> Iterable[Row]:
    tiers = {
        "memory": "memory, s",
        "page_cache": "page cache, s",
        "disk": "own disk, s",
        "peer": "another store, s",
        "object": "object tier, s",
    }
    yield "tokens, and 40 new ones", "cold, s", *tiers.values()
    for row in record["tiers"]:
        seconds = (f"{row[tier]['ttft_s']:.3f}" if tier in row else "" for tier in tiers)
        layers = f" ({row['layers']} layers)" if row.get("layers") else ""
        yield f"{row['tokens']:,}{layers}", f"{row['cold_s']:.2f}", *seconds


@table("waiting_prompts.json", *HIT)
def waiting_prompts(record: Any) -> Iterable[Row]:
    found = record["waiting"]
    yield "prompts that waited for a second or more", "figure", "wanted"
    yield "prompts", str(found["prompts"]), ""
    yield "stored blocks that they were to load", str(found["blocks_wanted"]), ""
    yield "of these in memory at their turn", f"{100 * found['share']:.1f}%", "90% or more"


@table("simulate_stores.json", *ROUTING)
def racks_and_fleets(record: Any) -> Iterable[Row]:
    yield (
        *("trace, scene", "stores", "hit rate, %", "memory, GB", "own disk, GB", "other stores, GB", "objects, GB"),
        *("uploaded, GB", "p50, s", "p90, s", "p99, s", "prompts, $", "objects, $"),
    )
    named = ""
    for row in record["rows"]:
        scene, nbytes = f"{row['trace']}, {row['scene']}", row["bytes_by_tier"]
        yield (
            scene * (scene != named),
            row["set_up"],
            f"{100 * row['token_hit_rate']:.2f}",
            *(f"{nbytes.get(tier, 0) / 1e9:.0f}" for tier in ("memory", "disk", "peer", "object", "uploaded")),
            *(f"{row[f'ttft_{percentile}_s']:.3g}" for percentile in ("p50", "p90", "p99")),
            f"{row['dollars']:.2f}",
            f"{row['object_dollars']:.2f}",
        )
        named = scene
