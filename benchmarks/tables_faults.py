"""Tables of faults, overload and hours of use; benchmarks/tables.py says how tables are made."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from benchmarks.soak_samples import allowed_rise
from benchmarks.tables import Row, table

ROLES = ("router", "prefill", "decode", "kvstore", "antefix")


_RECOVERY = "faults_recovery.json"
_REAL = (
    _RECOVERY,
    "faults_disk_clock.json",
    "faults_mounts.json",
    "faults.json",
    "faults_redis.json",
    "faults_load.json",
)
_CAMPAIGN = ("histories.json", *_REAL, "soak_short_ttls.json", "fuzz.json")


# By the beginning of a fault's name, the kind of fault that a column's head names.
_KINDS = {
    "kill": "kills",
    "stop": "stops",
    "link": "links",
    "segment": "files",
    "few": "descriptors",
    "full": "disks",
    "read-only": "mounts",
    "clock": "clocks",
    "redis": "Redis",
}


def _kinds(record: Any) -> str:
    """The kinds of faults of a run."""
    names = record["by_fault"]
    return ", ".join(said for begin, said in _KINDS.items() if any(name.startswith(begin) for name in names))


def _clients(record: Any) -> str:
    number = record.get("clients", 1)
    return "one client" if number == 1 else f"{number} clients"


@table("+".join(_CAMPAIGN), "tests/histories", "tests/fuzz/targets.py", "benchmarks/fault_kinds.py", *ROLES)
def campaign(records: Any) -> Iterable[Row]:
    """All runs with faults: the number of checks, the counts that must be 0, the recovery times, the inputs."""
    sums, soak, fuzz = (records[name] for name in ("histories.json", "soak_short_ttls.json", "fuzz.json"))
    sums, done, real = sums["sums"], soak["requests"], [records[name] for name in _REAL]
    heads = [f"real processes, {_clients(each)}: {_kinds(each)}" for each in real]
    heads[_REAL.index(_RECOVERY)] += "; short prompts"
    yield "", "simulated histories", *heads, "load and kills, short TTLs", "wanted"

    def row(said: str, simulated: str, key: str | Callable[[Any], Any], hour: object = "", wanted: str = "") -> Row:
        found = (str(each[key] if isinstance(key, str) else key(each)) for each in real)
        return (said, simulated, *found, str(hour), wanted)

    def nothing(_: object) -> str:
        return ""

    yield row("histories, or minutes", sums["histories"], "minutes", soak["minutes"])
    yield row("operations", sums["operations"], nothing)
    yield row("faults", sums["faults"], "faults", f"{done['kills']} kills")
    yield row("answers checked", sums["answers checked"], "answers_checked", done["done"])
    yield row("wrong", sums["wrong (0)"], "wrong", done["wrong"], "0")
    lost = "acknowledged and lost (of real processes: answers without a record)"
    yield row(lost, sums["acknowledged and lost (0)"], lambda each: each["bill"].get("not_billed", ""), wanted="0")
    yield row("stuck", sums["stuck (0)"], "stuck", done["stuck"], "0")
    yield row("double billed", sums["double billed (0)"], lambda each: each["bill"]["double_billed"], wanted="0")
    yield row("unclear errors", "", "unclear_errors", wanted="0")
    yield row("not recovered", sums["failed in all (0)"], lambda each: len(each["not_recovered"]), wanted="0")
    yield row("manual steps", "", "manual_steps", 0, "0")
    yield row("recovery p50, s", "", "recovery_p50_s")
    yield row("recovery p99, s", "", "recovery_p99_s")
    yield row("an undisturbed request, p50, s", "", "undisturbed_p50_s")
    yield row("histories per minute of one core", sums["histories per minute of one core's time"], nothing, "", "1,000")
    yield row(f"inputs fuzzed in {fuzz['hours']:.1f} h", f"{fuzz['executions']:,}", nothing)
    yield row("inputs that broke a rule, all mended", str(fuzz["crashes"]), nothing, "", "0")


@table("histories.json", "tests/histories", *ROLES)
def simulated_recoveries(record: Any) -> Iterable[Row]:
    yield "fault", "times", "recovery p50, s (lower is better)", "p99, s"
    yield from record["recovery"]


@table("+".join(_REAL), "benchmarks/fault_kinds.py", *ROLES)
def recoveries(records: Any) -> Iterable[Row]:
    """One row per fault. The run with short prompts and most samples comes first; of the others, which had a busy
    machine and few samples, only the longest time is told.
    """
    yield (
        "fault",
        "times",
        "recovery p50, s (lower is better)",
        "p99, s",
        "in older, busy runs: times",
        "the longest, s",
    )
    best, others = records[_RECOVERY]["by_fault"], [records[file]["by_fault"] for file in _REAL if file != _RECOVERY]
    for name in sorted({name for found in (best, *others) for name in found}):
        told = ("", "", "")
        if found := best.get(name):
            told = (str(found["times"]), f"{found['recovery_p50_s']:.1f}", f"{found['recovery_p99_s']:.1f}")
        busy = [other[name] for other in others if name in other]
        times = str(sum(each["times"] for each in busy)) if busy else ""
        yield name, *told, times, f"{max(each['recovery_max_s'] for each in busy):.1f}" if busy else ""


@table("soak_short_ttls.json", *ROLES)
def an_hour_with_short_ttls(record: Any) -> Iterable[Row]:
    """Whether each series is flat, by the present rule of `benchmarks/soak_samples.py`."""
    minutes = record.get("warm_up_minutes")
    since, part = ("half-way", "in the last half") if minutes is None else (f"after {minutes:g} minutes", "since then")
    yield "", "at first", since, "at the end", f"rise {part} (0 is wanted)", "allowed", "flat"
    for role, kinds in record["growth"].items():
        for kind, found in kinds.items():
            if "rise" not in found or (kind not in _SERIES and found["flat"]):
                continue
            said = _SERIES.get(kind, kind)
            allowed = max(found["allowed"], allowed_rise(kind, found["half"]))
            figures = (f"{found[key] or 0:.3g}" for key in ("first", "half", "last", "rise"))
            is_flat = found["flat"] or found["rise"] <= allowed
            # A hard budget proves a bound, whereas a slope only suggests one.
            is_below = (role, kind) == ("files of store", "disk_mb") and found["last"] <= record.get(
                "store_mb_max", _STORE_MB
            )
            yield f"{role}: {said}", *figures, f"{allowed:.3g}", "yes" if is_flat else _BELOW if is_below else "no"
        if bounded := kinds.get("bounded_files"):
            opened = [str(bounded["segments"][at]) for at in (0, 10, -1)] if "segments" in bounded else ["0"] * 3
            most, of_store = bounded["segments_max"], bounded["segments_of_store_max"]
            said = f"never above its bound: {most} at most" if most <= of_store else "no"
            kept_s = bounded.get("deleted_segment_open_s", 0.0)
            if kept_s > bounded.get("deleted_segment_open_s_max", 0.0):
                said = f"no, a deleted one was open for {kept_s:.0f} s"
            yield f"{role}: open segments", *opened, "", str(of_store), said


_SERIES = {
    "memory_mb": "memory, MB",
    "files": "descriptors",
    "threads": "threads",
    "disk_mb": "MB",
    "segment files": "segments",
}
# Older records do not name the budget; their soaks were started with --store-bytes 6M.
_STORE_MB = 6 * 1.048576
_BELOW = "no, below its budget"


@table("environments.json", "tests/environments", "console/antefix_console", *ROLES)
def in_environments(record: Any) -> Iterable[Row]:
    yield "test", "passed", "skipped", "failed (0 wanted)"
    for name, counts in record["tests"].items():
        yield name, *(str(counts[key]) for key in ("passed", "skipped", "failed"))


_DISTURBANCES = {
    "idle": "10,000 idle connections",
    "long": "a prompt of 1M tokens (2 wanted at most)",
    "readers": "64 long streams, half of their readers asleep",
    "tenants": "another tenant with 32 requests at once",
}


@table("overload_parts.json", "router", "decode", "prefill")
def disturbed_by_connections_and_prompts(record: Any) -> Iterable[Row]:
    yield from _disturbed(record)


@table("overload_streams_tenants.json", "router", "decode", "prefill")
def disturbed_on_an_idle_machine(record: Any) -> Iterable[Row]:
    yield from _disturbed(record)


def _disturbed(record: Any) -> Iterable[Row]:
    yield "short requests next to", "p99 with over p99 without", "p50 without, ms", "p50 with, ms", "answers with"
    for key, said in _DISTURBANCES.items():
        if key in record:
            without, disturbed = record[key]["without"], record[key]["with"]
            yield (
                said,
                f"{record[key]['p99_with_to_without']:.2f}",
                *(f"{part['p50_ms']:,}" for part in (without, disturbed)),
                f"{disturbed['statuses'].get('200', 0)}",
            )


@table("tenant_shares.json", "prefill/antefix_prefill/worker", "decode/antefix_decode")
def next_to_a_greedy_tenant(record: Any) -> Iterable[Row]:
    yield "the modest tenant's request", "p50, ms", "the longest, ms", "times alone (2 is an equal share of the worker)"
    for said, key in (
        ("alone", "alone"),
        ("next to 32 long outputs of another tenant", "streams"),
        ("next to 32 requests of another tenant", "requests"),
    ):
        found = record[key]
        yield said, f"{found['p50_ms']:.1f}", f"{found['max_ms']:.1f}", f"{found['to_alone']:.2f}"
