"""Tables of faults, overload and hours of use; benchmarks/tables.py says how tables are made."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from benchmarks.tables import Row, table

ROLES = ("router", "prefill", "decode", "kvstore", "antefix")


@table("faults_disk_clock.json", *ROLES)
def recoveries(record: Any) -> Iterable[Row]:
    yield "fault", "recovery, s (lower is better)"
    for name, found in sorted(record["by_fault"].items()):
        yield name, f"{found['recovery_p50_s']:.1f}"


@table("soak_short_ttls.json", *ROLES)
def an_hour_with_short_ttls(record: Any) -> Iterable[Row]:
    yield "", "at first", "half-way", "at the end", "rise in the last half (0 is wanted)", "allowed", "flat"
    for role, kinds in record["growth"].items():
        for kind, found in kinds.items():
            said = kind.replace("memory_mb", "memory, MB").replace("disk_mb", "MB").replace("files", "descriptors")
            figures = (f"{found[key] or 0:.3g}" for key in ("first", "half", "last", "rise", "allowed"))
            yield f"{role}: {said}", *figures, "yes" if found["flat"] else "no"


@table("faults_disk_clock.json", *ROLES)
def faults_of_processes(record: Any) -> Iterable[Row]:
    yield "faults of real processes, links, disks, clocks", "figure", "wanted"
    yield from _faults(record)


@table("faults_mounts.json", *ROLES)
def faults_of_mounts(record: Any) -> Iterable[Row]:
    yield "parts of the data directory made read-only mounts", "figure", "wanted"
    yield from _faults(record)


def _faults(record: Any) -> Iterable[Row]:
    yield "faults", f"{record['faults']}", ""
    yield "answers checked against the bare model", f"{record['answers_checked']}", ""
    for said, key in (("wrong", "wrong"), ("stuck", "stuck"), ("unclear errors", "unclear_errors")):
        yield said, f"{record[key]}", "0"
    yield "not recovered", f"{len(record['not_recovered'])}", "0"
    yield "double billed", f"{record['bill']['double_billed']}", "0"
    yield "manual steps", f"{record['manual_steps']}", "0"
    yield "roles started again by `antefix up`", f"{record['restarts']}", ""
    yield "recovery p50, s", f"{record['recovery_p50_s']:.1f}", ""
    yield "recovery p99, s", f"{record['recovery_p99_s']:.1f}", ""
    yield "an undisturbed request, p50, s", f"{record['undisturbed_p50_s']:.1f}", ""
    yield "an undisturbed request, the longest, s", f"{record['undisturbed_max_s']:.1f}", ""


@table("histories.json", "tests/histories", "router", "kvstore", "billing", "antefix/events")
def histories(record: Any) -> Iterable[Row]:
    yield "simulated histories", "figure"
    yield from record["sums"].items()


_DISTURBANCES = {
    "idle": "10,000 idle connections",
    "long": "a prompt of 1M tokens (2 wanted at most)",
    "readers": "64 long streams, half of their readers asleep (2 wanted at most)",
    "tenants": "another tenant with 32 requests at once",
}


@table("overload_parts.json", "router", "decode", "prefill")
def disturbed_on_a_busy_machine(record: Any) -> Iterable[Row]:
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
    yield "the modest tenant's request", "p50, ms", "the longest, ms", "times alone (2 wanted at most)"
    for said, key in (
        ("alone", "alone"),
        ("next to 32 long outputs of another tenant", "streams"),
        ("next to 32 requests of another tenant", "requests"),
    ):
        found = record[key]
        yield said, f"{found['p50_ms']:.1f}", f"{found['max_ms']:.1f}", f"{found['to_alone']:.2f}"
