"""Tables of hits, stores, the HTTP API and the bill; benchmarks/tables.py says how tables are made."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from benchmarks.tables import Row, table

HIT = ("router", "prefill", "decode", "kvstore", "antefix")
STORE = ("kvstore/antefix_kvstore", "antefix/store")


@table("where_time_goes.json", *HIT)
@table("where_time_goes_compiled.json", *HIT)
def parts_of_a_hit(record: Any) -> Iterable[Row]:
    columns = [(row, way) for row in record["rows"] for way in ("memory", "disk")]
    yield "part, ms (lower is better)", *(f"{row['tokens'] // 1024}K {way}" for row, way in columns)
    for said, hops in (
        ("decode: the forward pass of the 40 tokens", ["decode: prefill chunk"]),
        ("decode: restore", ["decode: restore"]),
        ("decode: reading blocks and checkpoints", ["decode: read"]),
        ("decode: look-up and plan", ["decode: look-up", "decode: plan"]),
        (
            "decode: the rest of the call",
            ["decode: Decode", "decode: decode steps", "decode: handoff", "decode: store"],
        ),
        ("router: look-up and placing", ["router: look-up", "router: place"]),
        ("router: the rest, admission and the ledger included", ["router: Generate"]),
    ):
        yield said, *(f"{1000 * sum(row['hops_s'][way].get(hop, 0) for hop in hops):.1f}" for row, way in columns)
    yield "time to first token, as the client sees it", *(f"{1000 * row['ttft_s'][way]:.1f}" for row, way in columns)
    yield "floor, new tokens at the cold run's rate", *(f"{1000 * row['floor_s'][way]:.1f}" for row, way in columns)
    if all("floor_alone_s" in row for row in record["rows"]):
        alone = [(row["ttft_s"][way], row["floor_alone_s"][way]) for row, way in columns]
        yield "floor, new tokens as the model alone computes them", *(f"{1000 * floor:.1f}" for _, floor in alone)
        yield "times this floor (2 or less wanted)", *(f"{ttft / floor:.2f}" for ttft, floor in alone)


@table("tls_cost.json", "router/antefix_router/gateway", "antefix/security", "kvstore/antefix_kvstore")
def tls_at_the_door(record: Any) -> Iterable[Row]:
    yield "", "plain", "TLS", "TLS over plain"
    for said, key in (
        ("HTTP door, kept connections: the router's processor ms per request", "door_kept_server_cpu_ms_per_request"),
        ("the same, a connection per request", "door_fresh_server_cpu_ms_per_request"),
        ("requests per second, kept connections (higher is better)", "door_kept_requests_per_s"),
        ("the same, a connection per request", "door_fresh_requests_per_s"),
        ("a hit from a store over the network, all roles: processor ms per request", "cpu_ms_per_request"),
        ("its time to first token, ms", "ttft_ms"),
    ):
        found = record[key]
        yield said, f"{found['plain']:.3g}", f"{found['tls']:.3g}", f"{found['ratio']:.2f}"


@table("tracing_cost.json", "antefix/telemetry", "router", "prefill", "decode")
def traces(record: Any) -> Iterable[Row]:
    yield "with every span sent, over none sent", "ratio (lower is better)"
    yield "the whole request", f"{record['request_ratio']:.2f}"
    yield "time to first token", f"{record['ttft_ratio']:.2f}"
    yield "processor time of all roles", f"{record['processor_ratio']:.2f}"


@table("data_planes.json", *STORE)
def ways_to_carry_payloads(record: Any) -> Iterable[Row]:
    yield (
        *("way", "processor s per GiB, both sides (lower is better)", "with TLS"),
        *("GB/s (higher is better)", "with TLS"),
    )
    for said, key in (
        ("a bare gRPC stream of 1 MiB chunks", "grpc"),
        ("the same in two halves, over two connections", "grpc_2"),
        ("a bare TCP socket (sendfile; with TLS a buffer at a time)", "socket"),
        ("the same in two halves, over two connections", "socket_2"),
        ("bare Arrow Flight", "flight"),
        ("the store's restore, every block verified, 1 reader", "restore_1"),
        ("the same, 4 readers, in all", "restore_4"),
        ("the same, 8 readers, in all", "restore_8"),
    ):
        cpu, rate = record["cpu_s_per_gib"], record["bytes_per_s"]
        yield (
            said,
            *(f"{cpu[f'{key}{tls}']:.2f}" for tls in ("", "_tls")),
            *(f"{rate[f'{key}{tls}'] / 1e9:.2f}" for tls in ("", "_tls")),
        )


@table("encryption.json", "antefix/store_files", "kvstore/antefix_kvstore")
def encrypted_over_plain(record: Any) -> Iterable[Row]:
    yield "", "encrypted over plain: throughput (higher is better)", "processor time (lower is better)"
    for name, key in (("writing", "write"), ("reading from the page cache", "read")):
        found = record["figures"][key]
        yield name, f"{found['speed_ratio']:.2f}", f"{found['processor_ratio']:.2f}"


@table("many_stores.json", "antefix/store")
def over_two_stores(record: Any) -> Iterable[Row]:
    found = record["figures"]
    yield "", "one store", "two, one behind the other", "two, in turns of 256 blocks"
    yield (
        "looking up 1M tokens, processor ms (lower is better)",
        *(f"{found[f'look_up_{where}_cpu_ms']:.2f}" for where in ("one", "behind", "halves")),
    )
    yield (
        "restoring 131,072 tokens, GB/s (higher is better)",
        *(f"{found[f'restore_{where}_gb_s']:.2f}" for where in ("one", "behind", "halves")),
    )


@table("ledger_sqlite.json", "billing/antefix_billing")
def ledger_next_to_sqlite(record: Any) -> Iterable[Row]:
    yield "requests waiting at a time", "our files, requests/s", "SQLite over ours", "processor time, SQLite over ours"
    for row in record["requests"]:
        yield (
            str(row["concurrent"]),
            f"{row['files_requests_per_s']:,}",
            f"{row['sqlite_to_files_throughput']:.2f}",
            f"{row['sqlite_cpu_us'] / row['files_cpu_us']:.2f}",
        )


@table("bill_routers.json", "billing/antefix_billing", "router/antefix_router")
def bill_of_several_routers(record: Any) -> Iterable[Row]:
    counts, received = record["counts"], record["received"]
    errors = sum(number for name, number in counts.items() if name.startswith("error "))
    broken = sum(number for name, number in record["statuses"].items() if name != "length")
    yield "", "figure", "wanted"
    yield "requests; seconds", f"{record['requests']:,}; {record['seconds']:,}", ""
    for said, key in (
        ("kills of routers", "router kills"),
        ("kills of decode workers", "decode kills"),
        ("kills of the one store", "kvstore kills"),
        ("kills of Redis", "redis kills"),
        ("kills of pushers", "pusher kills"),
        ("steps of the clock", "clock steps"),
        ("reloads of limits", "reloads"),
        ("faulty files of limits, refused", "faulty files"),
        ("changes of the price", "price changes"),
    ):
        yield said, str(counts[key]), ""
    yield "errors that clients saw; records that broke off", f"{errors:,}; {broken:,}", ""
    yield "entries, of them adjustments", f"{record['entries']:,}; {record['adjustments']}", ""
    yield "ledgers with their adjustments, US dollars and tokens", f"{record['price']}; {record['tokens']:,}", ""
    for name, found in received.items():
        yield f"received by {name}", f"{found['price']}; {found['tokens']:,}", "the same"
    yield "faults found by the checks", str(record["faults"]), "0"


@table("million.json", *HIT)
def a_million_tokens(record: Any) -> Iterable[Row]:
    yield (
        *("prompt, tokens", "of them hit", "plan", "first token, s (lower is better)", "restore, s", "compute, s"),
        *("the rest, s", "replayed tokens", "read, MB"),
    )
    for row in (*record["cold"], *record["hits"]):
        times = (f"{row[key]:.2f}" for key in ("ttft_s", "restore_s", "compute_s", "other_s"))
        yield (
            f"{row['prompt_tokens']:,}",
            f"{row['hit_tokens']:,}",
            row["plan"],
            *times,
            f"{row['replayed_tokens']:,}",
            f"{row['bytes_read'] / 1e6:.2f}",
        )


@table("million.json", *HIT)
def memory_of_a_million(record: Any) -> Iterable[Row]:
    runs = [*record["cold"], record["hits"][0]]
    yield "peak memory, MB", *(f"after {row['prompt_tokens']:,}" for row in record["cold"]), "of a hit at 1M"
    for role in ("kvstore", "prefill", "decode", "router"):
        yield role, *(f"{row['peak_mb'][role]:.0f}" for row in runs)


@table("grammar.json", "router/antefix_router/chat", "decode/antefix_decode")
def grammars(record: Any) -> Iterable[Row]:
    yield "", "figure (lower is better)"
    for said, key in (("a JSON schema", "json"), ("a forced call", "forced call")):
        yield f"{said}: a new grammar, ms", f"{record[key]['ready_ms']:.1f}"
        yield f"{said}: a token's mask, us", f"{record[key]['mask_us']:.0f}"
    yield "penalties over 8K prompt and 1K output tokens, us per token", f"{record['penalties_us']:.0f}"
    yield "a token at a temperature, without any of these, us", f"{record['choose_us']:,.0f}"


@table("ledger.json", "billing/antefix_billing")
def ledger_throughput(record: Any) -> Iterable[Row]:
    yield (
        "requests waiting at a time",
        "requests/s, durable (higher is better)",
        "requests per sync",
        "CPU per request, us",
    )
    for row in record["requests"]:
        yield (
            str(row["concurrent"]),
            f"{row['requests_per_s']:,}",
            f"{row['requests_per_sync']:g}",
            f"{row['cpu_us_per_request']:.0f}",
        )


@table("gateway.json", "router/antefix_router")
def http_next_to_grpc(record: Any) -> Iterable[Row]:
    yield "", "latency, one caller, ms", "requests/s (higher is better)", "server CPU per request, ms"
    for said, key in (("gRPC, streamed", "grpc"), ("HTTP, whole", "http"), ("HTTP, streamed", "http_stream")):
        row = record[key]
        cpu_ms = row["server_cpu_ms_per_request"]
        yield said, f"{row['latency_ms']:.2f}", f"{row['requests_per_s']:,.0f}", f"{cpu_ms:.2f}"


@table("short_next_to_long.json", "prefill/antefix_prefill")
def short_prompts(record: Any) -> Iterable[Row]:
    yield "order of the work", "alone, ms", "next to long prompts, ms", "times alone (lower is better)"
    for row in record["rows"]:
        alone, loaded = row["alone_s"], row["next_to_long_s"]
        yield row["order"], f"{1000 * alone:.0f}", f"{1000 * loaded:.0f}", f"{loaded / alone:.1f}"


@table("follow_events.json", "router/antefix_router/fleet", "antefix/events", "antefix/lane_hashes.py")
def following_events(record: Any) -> Iterable[Row]:
    yield "", "figure (lower is better)"
    yield "memory per block, directory included, bytes", str(record["one_event_per_prompt"]["bytes_per_block"])
    for said, key in (
        ("processor time per block, all blocks of a prompt in one event, us", "one_event_per_prompt"),
        ("the same, an event per block, us", "one_event_per_block"),
    ):
        yield said, f"{record[key]['cpu_us_per_block']:.1f}"


@table("checksums.json", "antefix/store_files/seal.py")
def payload_macs(record: Any) -> Iterable[Row]:
    yield "checksum or MAC of a payload", "GB/s of one core (higher is better)"
    for name, rate in record["payload_gb_per_s"].items():
        yield name, f"{rate:.1f}"


@table("checksums.json", "antefix/lane_hashes.py")
def block_names(record: Any) -> Iterable[Row]:
    yield f"hashes of {record['num_blocks']:,} blocks of 512 bytes", "ms (lower is better)"
    for name, ms in record["names_ms"].items():
        yield name, f"{ms:.1f}"
