"""Tables of several stores and the object tier; benchmarks/tables.py says how tables are made."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from benchmarks.tables import Row, table

OBJECTS = ("antefix/objects", "kvstore/antefix_kvstore/object_upload.py", "kvstore/antefix_kvstore/upload_reads.py")
HIT = ("router", "prefill", "decode", "kvstore", "antefix")


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


@table("tier.json", "antefix/objects/object_index.py")
def object_index(record: Any) -> Iterable[Row]:
    yield "records", "bytes per record", "look-up of 128K tokens, ms", "look-up of 1M tokens, ms"
    for count, found in record["figures"]["index"].items():
        times = (found["look_up_128k_ms"], found["look_up_1m_ms"])
        yield f"{int(count):,}", f"{found['bytes_per_block']:.2f}", *(f"{each:.2f}" for each in times)


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
        yield f"{row['tokens']:,}", f"{row['cold_s']:.2f}", *seconds


@table("waiting_prompts.json", *HIT)
def waiting_prompts(record: Any) -> Iterable[Row]:
    found = record["waiting"]
    yield "prompts that waited for a second or more", "figure", "wanted"
    yield "prompts", str(found["prompts"]), ""
    yield "stored blocks that they were to load", str(found["blocks_wanted"]), ""
    yield "of these in memory at their turn", f"{100 * found['share']:.1f}%", "90% or more"


@table("simulate_stores.json", "simulate/antefix_simulate", "router/antefix_router/placement")
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
