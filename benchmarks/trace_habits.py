"""Where do requests diverge from stored prefixes, and how soon are checkpoints used again? `auto` relies on this.

    python benchmarks/trace_habits.py --traces ../shared/traces --json benchmarks/results/trace_habits.json

Each trace is replayed with a checkpoint at every prompt's end and at every fork. For each stretch of new tokens, the
program counts how often a later request shares only a part of it, by what lay before the stretch, by the stretch's
length, and by the fifth of it where the request diverges. Then it counts the uses of `auto`'s checkpoints, by reason.
For the agent trace it also counts how often the next turn misses its prompt's last 64-token block, by the number of
tokens beyond this block.
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
from collections import Counter
from pathlib import Path

from antefix.text_table import text_table
from antefix.window import parse
from antefix.window.auto import NEW_GROUND_RATIO, NEW_GROUND_TOKENS
from antefix_simulate.machine import RATE_CARDS, Machine, model_sizes
from antefix_simulate.simulated_store import StoreLimits
from antefix_simulate.trace import Trace, load
from antefix_simulate.trace_replay import ReplaySetup, simulate
from benchmarks.run_record import write

SOURCES = (
    ("agents", "claude_code_80.jsonl.gz", "claude-code"),
    ("chat", "mooncake_conversation.jsonl.gz", "mooncake"),
    ("documents", "mooncake_synthetic.jsonl.gz", "mooncake"),
)
STRETCHES = (0, 2_048, 4_096, 8_192, 16_384, 32_768, 65_536)


def leaves(trace: Trace) -> list[list[str]]:
    """A table of stretches of new tokens, by ground and length: how many, and where later requests diverge inside them.

    A stretch's ground is "new" (as `auto` defines it), "behind an end" of an earlier request, or "behind a fork" that
    the trace had not seen before.
    """
    owner: dict[int, int] = {}
    spans: list[tuple[int, int]] = []
    kinds: list[tuple[str, int]] = []
    known: set[int] = set()
    left: list[tuple[int, int]] = []
    for index, request in enumerate(trace.requests):
        names = request.names.tolist()
        shared = next((i for i, name in enumerate(names) if name not in owner), len(names))
        forked = bool(shared) and names[shared - 1] not in known
        if forked:
            left.append((owner[names[shared - 1]], shared))
            known.add(names[shared - 1])
        owner.update((name, index) for name in names[shared:])
        spans.append((shared, len(names)))
        kinds.append(_kind(shared, len(names), forked, trace.unit_tokens))
        if names:
            known.add(names[-1])
    counts = Counter(kinds)
    fifths: Counter[tuple[tuple[str, int], int]] = Counter()
    first_units: Counter[tuple[str, int]] = Counter()
    for donor, end in left:
        start, stop = spans[donor]
        fifths[(kinds[donor], min((end - start) * 5 // (stop - start), 4))] += 1
        first_units[kinds[donor]] += end == start + 1
    rows = [["ground", "stretch from", "stretches", "left inside", "per stretch", "after one unit", "by fifth"]]
    for kind in sorted(counts):
        by_fifth = [fifths[(kind, fifth)] for fifth in range(5)]
        per_stretch = f"{sum(by_fifth) / counts[kind]:.3f}"
        cells = [kind[1], counts[kind], sum(by_fifth), per_stretch, first_units[kind], " ".join(map(str, by_fifth))]
        rows.append([kind[0], *map(str, cells)])
    return rows


def _kind(start: int, end: int, forked: bool, unit_tokens: int) -> tuple[str, int]:
    length = (end - start) * unit_tokens
    is_new = end - start > NEW_GROUND_RATIO * start or length >= NEW_GROUND_TOKENS
    ground = "new" if is_new else "behind a fork" if forked else "behind an end"
    return ground, max(limit for limit in STRETCHES if limit <= length)


def uses(trace: Trace) -> list[list[str]]:
    """A table of `auto`'s checkpoints by reason: the share that was ever used, and the ages of all uses."""
    setup = ReplaySetup(
        sizes=model_sizes("v4-flash"), machine=Machine(), card=RATE_CARDS["v4-flash"], limits=StoreLimits(), replay=True
    )
    reasons = simulate(trace, parse("auto"), setup).reasons
    rows = [["reason", "left", "ever used", "uses", *next(iter(reasons.values())).ages]]
    for reason, use in reasons.items():
        ages = [f"{share:.2%}" for share in use.ages.values()]
        rows.append([reason, str(use.left), f"{use.used / use.left:.1%}", str(use.uses), *ages])
    return rows


def cue(path: Path) -> list[list[str]]:
    """A table by number of tokens after a prompt's last 64-token block: how often the next turn missed that block."""
    total: Counter[str] = Counter()
    missed: Counter[str] = Counter()
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            previous: tuple[list[int], int] | None = None
            for call in json.loads(line)["requests"]:
                if call["type"] == "subagent":
                    continue
                if previous is not None:
                    ids, tokens = previous
                    whole = tokens // 64
                    beyond = tokens % 64
                    label = str(beyond) if beyond < 4 else "4 to 63"
                    total[label] += 1
                    # Count only requests that miss just the last block. A request that diverges far before says nothing
                    # about it.
                    hit = call["hash_ids"][:whole]
                    missed[label] += hit[: whole - 1] == ids[: whole - 1] and hit[-1:] != ids[whole - 1 : whole]
                previous = (call["hash_ids"], call["in"])
    rows = [["tokens beyond", "prompts", "last block missed"]]
    rows += [[label, str(total[label]), str(missed[label])] for label in sorted(total)]
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traces", type=Path, required=True, help="directory of the trace files")
    parser.add_argument("--json", type=Path, help="also write the record here")
    args = parser.parse_args()
    record: dict[str, dict[str, list[list[str]]]] = {}
    for label, name, trace_format in SOURCES:
        path = args.traces / name
        if not path.is_file():
            sys.stderr.write(f"{path} is missing\n")
            continue
        trace = load(path, trace_format, block_size=128)
        found = {"where a stretch is left": leaves(trace), "how auto's checkpoints are used": uses(trace)}
        if trace_format == "claude-code":
            found["the cue at the end of a prompt"] = cue(path)
        for name, rows in found.items():
            print(f"{label}: {name}\n{text_table(rows[0], rows[1:])}\n")
        record[label] = found
    if args.json:
        write(args.json, {"traces": record}, "numpy")
    return 0


if __name__ == "__main__":
    sys.exit(main())
