"""How many simulated histories pass all checks? Tries seeds for a given time, and prints failing seeds.

    python -m benchmarks.histories --minutes 10 --seed 1000 --json histories.json
    python -m benchmarks.histories --only 1234

Each history is a router, a store, two prefill and two decode workers, 11 clients and up to 7 faults, in one process on
a simulated clock, network and disk, with the real classes (tests/histories/). The program uses one core, and its exit
status is 1 if a history fails a check.
"""

from __future__ import annotations

import argparse
import gc
import logging
import statistics
import sys
import time
from collections import Counter
from pathlib import Path

from antefix.text_table import text_table
from benchmarks.run_record import write
from tests.histories.history import Outcome, run_history


class Sums:
    """Sums over all histories. recovery_s: simulated recovery times by kind of fault."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.operations: list[int] = []
        self.recovery_s: dict[str, list[float]] = {}
        self.failed: dict[int, str] = {}

    def add(self, outcome: Outcome) -> None:
        self.counts += outcome.counts
        self.operations.append(outcome.num_operations)
        for kind, seconds in outcome.recovery_s.items():
            self.recovery_s.setdefault(kind, []).extend(seconds)
        if outcome.error:
            self.failed[outcome.seed] = outcome.error

    def failures(self, *words: str) -> int:
        return sum(any(word in error for word in words) for error in self.failed.values())

    def rows(self) -> list[tuple[str, str]]:
        counts = self.counts
        return [
            ("histories", f"{len(self.operations):,}"),
            ("operations", f"{sum(self.operations):,} (at least {min(self.operations)} per history)"),
            ("faults", f"{counts['faults']:,}"),
            ("answers checked", f"{counts['answers checked']:,}"),
            ("stored records checked", f"{counts['records checked']:,}"),
            ("records of the bill checked", f"{counts['records of the bill checked']:,}"),
            ("wrong (0)", str(self.failures("WrongBytes", "was given", "wrong bytes", "tokens"))),
            ("acknowledged and lost (0)", str(self.failures("acknowledged"))),
            ("stuck (0)", str(self.failures("Stuck", "still counted"))),
            ("double billed (0)", str(self.failures("final records", "duplicates"))),
            ("failed in all (0)", str(len(self.failed))),
        ]

    def recoveries(self) -> list[tuple[str, str, str, str]]:
        rows = []
        for kind, seconds in sorted(self.recovery_s.items()):
            last = statistics.quantiles(seconds, n=100)[98] if len(seconds) > 1 else seconds[0]
            rows.append((kind, str(len(seconds)), f"{statistics.median(seconds):.2f}", f"{last:.2f}"))
        return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="first seed; the others follow")
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--only", type=int, help="run this seed alone")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    if args.only is not None:
        outcome = run_history(args.only)
        sys.stdout.write(f"{outcome.error or 'holds'}\ntrace {outcome.trace}\n{dict(outcome.counts)}\n")
        return int(bool(outcome.error))
    sums, seed = Sums(), args.seed
    # Imported objects stay alive, so the garbage collector need not scan them each time.
    gc.freeze()
    logging.disable(logging.CRITICAL)
    began, began_cpu = time.monotonic(), time.process_time()
    while time.monotonic() - began < 60 * args.minutes:
        outcome = run_history(seed)
        sums.add(outcome)
        if outcome.error:
            sys.stdout.write(f"seed {seed}: {outcome.error}\n")
            sys.stdout.flush()
        seed += 1
    cpu_s = time.process_time() - began_cpu
    rows = [*sums.rows(), ("histories per minute of one core's time", f"{60 * len(sums.operations) / cpu_s:.0f}")]
    sys.stdout.write(text_table(("", ""), rows) + "\n\n")
    heads = ("fault", "times", "simulated s to the next answer, p50", "p99")
    sys.stdout.write(text_table(heads, sums.recoveries()) + "\n")
    if args.json is not None:
        report = {"first seed": args.seed, "sums": dict(rows), "failed": sums.failed}
        write(args.json, {**report, "recovery": sums.recoveries()})
    return int(bool(sums.failed))


if __name__ == "__main__":
    sys.exit(main())
