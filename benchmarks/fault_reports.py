"""The reports of `faults.py`: what a run counted and timed, the sum of several runs, and the percentiles."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from antefix_billing.ledger_files import read_settled


@dataclass(slots=True)
class Tally:
    """Counts of requests by outcome. unclear: errors that show a bug in Antefix."""

    num_checked: int = 0
    num_wrong: int = 0
    num_stuck: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    num_unclear: int = 0
    wrong: list[dict[str, Any]] = field(default_factory=list)
    recovery_s: dict[str, list[float]] = field(default_factory=dict)
    undisturbed_s: list[float] = field(default_factory=list)
    not_recovered: list[str] = field(default_factory=list)


def bill(ledger_dir: Path, answered: Iterable[str]) -> dict[str, int]:
    """Errors in the ledger: requests that have two records, whose counts do not add up, or that were answered in full
    and have no record.

    answered: the ids of the requests that were answered. Their records were acknowledged.
    """
    records = [settled.record for settled in read_settled(ledger_dir)]
    charged = Counter(record.request_id for record in records if record.is_final)
    return {
        "records": len(records),
        "double_billed": sum(number > 1 for number in charged.values()),
        "not_billed": sum(request_id not in charged for request_id in answered),
        "not_adding_up": sum(
            record.cache_hit_tokens + record.cache_miss_tokens not in (0, record.prompt_tokens) for record in records
        ),
    }


def joined(before: Any, now: Any) -> Any:
    """The sum of two reports, field by field: numbers are added, lists are put together."""
    if isinstance(now, dict):
        return {
            name: joined(before[name], now[name]) if name in before and name in now else (before | now)[name]
            for name in before | now
        }
    return before + now


def summed_up(found: dict[str, Any]) -> dict[str, Any]:
    """A report with its percentiles."""
    every = [seconds for times in found["recovery_s"].values() for seconds in times]
    return {
        **found,
        "answers_per_s": round(found["answers_checked"] / max(60 * found["minutes"], 1e-9), 2),
        "undisturbed_p50_s": round(statistics.median(found["undisturbed_s"]), 2) if found["undisturbed_s"] else None,
        "undisturbed_max_s": max(found["undisturbed_s"], default=None),
        "recovery_p50_s": round(float(np.quantile(every, 0.5)), 2) if every else None,
        "recovery_p99_s": round(float(np.quantile(every, 0.99)), 2) if every else None,
        "by_fault": {
            name: {
                "times": len(times),
                "recovery_p50_s": round(statistics.median(times), 2),
                "recovery_p99_s": round(float(np.quantile(times, 0.99)), 2),
                "recovery_max_s": max(times),
            }
            for name, times in sorted(found["recovery_s"].items())
        },
    }


def earlier(file: Path | None, num_clients: int) -> dict[str, Any] | None:
    """The runs that the file has already.

    Raises:  SystemExit: these runs had another number of clients, so their times cannot be compared.
    """
    if file is None or not file.exists():
        return None
    before: dict[str, Any] = json.loads(file.read_text())
    if "recovery_s" not in before:
        raise SystemExit(f"{file} is of an older version, which kept no single times: write to another file")
    if before["clients"] != num_clients:
        raise SystemExit(f"{file} has runs with {before['clients']} clients, not {num_clients}")
    return before


def added(before: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """The report together with those of earlier runs, which are listed under "runs"."""
    about_it = {name: before[name] for name in ("commit", "date", "machine", "command", "seed", "minutes")}
    once = {name: found[name] for name in ("seed", "clients")}
    sums = joined(
        {name: before[name] for name in found if name not in once},
        {name: found[name] for name in found if name not in once},
    )
    return {**once, **sums, "minutes": round(sums["minutes"], 1), "runs": [*before.get("runs", []), about_it]}
