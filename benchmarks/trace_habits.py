"""Where do requests leave stored prefixes, and how soon are checkpoints used again? The facts that `auto` rests on.

    python benchmarks/trace_habits.py --traces ../shared/traces

For each trace, with a checkpoint at every prompt's end and at every fork: how often a first request leaves a stretch
of new tokens, by the stretch's length, and in which fifth of it; then how `auto`'s checkpoints were used, by reason.
For the agent trace also: how often the next turn misses its prompt's last 64-token block, by what lay beyond it.
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
from collections import Counter
from pathlib import Path

from antefix.window import parse
from simulate.machine import RATE_CARDS, Machine, model_sizes
from simulate.replay import Setup, simulate
from simulate.report import align
from simulate.store import StoreLimits
from simulate.trace import Trace, load

SOURCES = (
    ("agents", "claude_code_80.jsonl.gz", "claude-code"),
    ("chat", "mooncake_conversation.jsonl.gz", "mooncake"),
    ("documents", "mooncake_synthetic.jsonl.gz", "mooncake"),
)
STRETCHES = (0, 2_048, 4_096, 8_192, 16_384, 32_768, 65_536)


def leaves(trace: Trace) -> str:
    """A table: stretches by length and by whether much lay before them, leaves a stretch, leaves by fifth of it."""
    owner: dict[int, int] = {}
    spans: list[tuple[int, int]] = []
    known: set[int] = set()
    left: list[tuple[int, float]] = []
    for index, request in enumerate(trace.requests):
        names = request.names.tolist()
        shared = next((i for i, name in enumerate(names) if name not in owner), len(names))
        if shared and names[shared - 1] not in known:
            donor = owner[names[shared - 1]]
            start, end = spans[donor]
            left.append((donor, (shared - start) / (end - start)))
            known.add(names[shared - 1])
        owner.update((name, index) for name in names[shared:])
        spans.append((shared, len(names)))
        if names:
            known.add(names[-1])
    counts: Counter[tuple[bool, int]] = Counter()
    fifths: Counter[tuple[bool, int, int]] = Counter()
    for start, end in spans:
        counts[_kind(start, end, trace.unit_tokens)] += 1
    for donor, share in left:
        fifths[(*_kind(*spans[donor], trace.unit_tokens), min(int(share * 5), 4))] += 1
    rows = [["ground", "stretch from", "stretches", "left inside", "per stretch", "by fifth"]]
    for new_ground, length in sorted(counts, key=lambda kind: (not kind[0], kind[1])):
        by_fifth = [fifths[(new_ground, length, fifth)] for fifth in range(5)]
        count = counts[(new_ground, length)]
        label = "new" if new_ground else "known"
        rows.append(
            [
                label,
                str(length),
                str(count),
                str(sum(by_fifth)),
                f"{sum(by_fifth) / count:.3f}",
                " ".join(map(str, by_fifth)),
            ]
        )
    return align(rows)


def _kind(start: int, end: int, unit_tokens: int) -> tuple[bool, int]:
    length = (end - start) * unit_tokens
    return end - start > 8 * start, max(limit for limit in STRETCHES if limit <= length)


def uses(trace: Trace) -> str:
    """A table: `auto`'s checkpoints by reason, share ever resumed from, and the ages of all uses."""
    setup = Setup(
        sizes=model_sizes("v4-flash"), machine=Machine(), card=RATE_CARDS["v4-flash"], limits=StoreLimits(), replay=True
    )
    reasons = simulate(trace, parse("auto"), setup).reasons
    rows = [["reason", "left", "ever used", "uses", *next(iter(reasons.values())).ages]]
    for reason, use in reasons.items():
        ages = [f"{share:.2%}" for share in use.ages.values()]
        rows.append([reason, str(use.left), f"{use.used / use.left:.1%}", str(use.uses), *ages])
    return align(rows)


def cue(path: Path) -> str:
    """A table: tokens beyond the last 64-token block of a prompt, and how often the next turn missed that block."""
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
                    # One block early and no more: a request that leaves far before the end says nothing about it.
                    hit = call["hash_ids"][:whole]
                    missed[label] += hit[: whole - 1] == ids[: whole - 1] and hit[-1:] != ids[whole - 1 : whole]
                previous = (call["hash_ids"], call["in"])
    rows = [["tokens beyond", "prompts", "last block missed"]]
    rows += [[label, str(total[label]), str(missed[label])] for label in sorted(total)]
    return align(rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traces", type=Path, required=True, help="directory of the trace files")
    args = parser.parse_args()
    for label, name, trace_format in SOURCES:
        path = args.traces / name
        if not path.is_file():
            sys.stderr.write(f"{path} is missing\n")
            continue
        trace = load(path, trace_format, block_size=128)
        print(
            f"{label}: where a stretch is left\n{leaves(trace)}\n",
            f"{label}: how auto's checkpoints are used\n{uses(trace)}\n",
            sep="\n",
        )
        if trace_format == "claude-code":
            print(f"{label}: the cue at the end of a prompt\n{cue(path)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
