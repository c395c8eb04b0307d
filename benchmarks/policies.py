"""Which placement policy gives the first token soonest? Simulates all policies with chat and agents' traces.

    python benchmarks/policies.py --json benchmarks/results/policies.json --plot docs/plots/policies.svg

The scenes are independent: `--trace chat --store no --json part.json` runs some of them, and several such
parts are merged by `--parts part.json ... --json benchmarks/results/policies.json --plot ...`.

Each scene is a trace over a fleet, with or without the shared store, at moderate load or near saturation. The clock's
speed-up is chosen once per scene so that eight workers under least_work have this load. Every policy then runs at this
speed-up. Eight workers get the trace once. A larger fleet gets one copy for every eight workers (of chat, the first
2,500 requests), each with different prompts and a shifted start. The agents' trace is cut where most conversations have
ended and only some continue for a day.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from antefix.window import parse
from antefix_console.commands.simulate_cluster import UNIT_TOKENS, copies
from antefix_simulate.baselines import ALL_POLICIES
from antefix_simulate.cluster import Fleet, simulate_cluster
from antefix_simulate.cluster_result import PolicyResult
from antefix_simulate.machine import model_sizes
from antefix_simulate.plot import load_pyplot
from antefix_simulate.trace import Trace, load
from benchmarks.run_record import write

TRACES = Path(__file__).parents[2] / "shared" / "traces"
# Half of the agents' requests arrive within this time.
AGENTS_S = 4500.0
# A large fleet gets several copies of the chat trace. This many requests of each copy, a fifth of all, run in minutes.
COPIED_REQUESTS = {"chat": 2_500}
# The share of time that a worker is busy on average. Agents come and go and wait for their own answers, so eight
# workers are saturated at a lower share: at 56% the median request waits, and no speed-up brings the workers near to
# 88%.
LOADS = {"chat": {"moderate": 0.60, "saturated": 0.88}, "agents": {"moderate": 0.40, "saturated": 0.56}}
# A panel spans at least this many percentage points of hit rate.
HIT_POINTS_MIN = 1.0
# Where the search for the speed-up begins, by trace and by whether there is a shared store.
SPEEDUPS = {("chat", True): 3.2, ("chat", False): 2.7, ("agents", True): 18.0, ("agents", False): 10.0}


def traces() -> dict[str, Trace]:
    chat = load(TRACES / "mooncake_conversation.jsonl.gz", "mooncake", block_size=UNIT_TOKENS)
    agents = load(TRACES / "claude_code_80.jsonl.gz", "claude-code", block_size=UNIT_TOKENS)
    first_hour = tuple(request for request in agents.requests if request.at_s < AGENTS_S)
    return {"chat": chat, "agents": replace(agents, requests=first_hour)}


def run(name: str, trace: Trace, policy: str, workers: int, speedup: float, *, shared_store: bool) -> PolicyResult:
    """Simulate one copy of the trace, or of its first requests, for every eight workers."""
    num_copies = max(1, workers // 8)
    if num_copies > 1:
        trace = replace(trace, requests=trace.requests[: COPIED_REQUESTS.get(name)])
    return simulate_cluster(
        copies(trace, num_copies, speedup),
        total=len(trace.requests) * num_copies,
        unit_tokens=trace.unit_tokens,
        policy=policy,
        strategy=parse("auto"),
        sizes=model_sizes("v4-flash"),
        fleet=Fleet(num_prefill=workers, num_decode=workers, shared_store=shared_store),
    )


def speedup_for(name: str, trace: Trace, busy: float, start: float, *, shared_store: bool) -> float:
    """The speed-up at which eight workers under least_work are busy for this share of the time, within about 0.01."""
    speedup = start
    for _ in range(5):
        found = run(name, trace, "least_work", 8, speedup, shared_store=shared_store).utilisation
        if abs(found - busy) < 0.01:
            break
        speedup = round(speedup * min(2.0, busy / found), 2)
    return speedup


def scenes(args: argparse.Namespace) -> list[dict[str, Any]]:
    found = []
    for name, trace in traces().items():
        if name not in args.trace:
            continue
        for shared_store in [each == "yes" for each in args.store]:
            start = SPEEDUPS[name, shared_store]
            for load_name, busy in LOADS[name].items():
                start = speedup_for(name, trace, busy, start, shared_store=shared_store)
                for workers in args.workers:
                    scene = {"trace": name, "store": shared_store, "load": load_name, "workers": workers}
                    policies = {}
                    for policy in args.policy or ALL_POLICIES:
                        begun = time.monotonic()
                        policies[policy] = asdict(run(name, trace, policy, workers, start, shared_store=shared_store))
                        sys.stderr.write(f"{scene} {policy}: {time.monotonic() - begun:.0f} s\n")
                    found.append({**scene, "speedup": start, "policies": policies})
                    if args.json:
                        write(args.json, {"scenes": found}, "numpy")
    return found


def table(found: list[dict[str, Any]]) -> str:
    """A Markdown table with our policy, and the best other policy for each figure."""
    lines = [
        "| trace, workers | store | load | hit | p50 s | p90 s | p99 s | best other: hit | p50 s | p90 s | p99 s |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for scene in found:
        ours = scene["policies"]["least_work"]
        others = {name: result for name, result in scene["policies"].items() if name != "least_work"}
        cells = [f"{scene['trace']}, {scene['workers']}", "yes" if scene["store"] else "no", scene["load"]]
        cells += [f"{ours['token_hit_rate']:.2%}", *(f"{ours[f'ttft_{q}_s']:.3g}" for q in ("p50", "p90", "p99"))]
        name = max(others, key=lambda each: others[each]["token_hit_rate"])
        cells.append(f"{others[name]['token_hit_rate']:.2%} {name}")
        for quantile in ("p50", "p90", "p99"):
            name = min(others, key=lambda each: others[each][f"ttft_{quantile}_s"])
            cells.append(f"{others[name][f'ttft_{quantile}_s']:.3g} {name}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(found: list[dict[str, Any]], path: Path) -> None:
    """Plot each policy's p90 against its hit rate, with one panel per scene."""
    pyplot = load_pyplot()
    columns = 4
    rows = -(-len(found) // columns)
    figure, axes = pyplot.subplots(rows, columns, figsize=(15, 3.4 * rows), layout="constrained", squeeze=False)
    for panel, scene in zip(axes.flat, found, strict=False):
        for name, result in scene["policies"].items():
            marker = "*" if name == "least_work" else "o"
            size = 180 if name == "least_work" else 45
            hit = 100 * result["token_hit_rate"]
            panel.scatter(hit, result["ttft_p90_s"], marker=marker, s=size, label=name, alpha=0.8)
        panel.set_yscale("log")
        panel.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        panel.yaxis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "235" else "")
        panel.tick_params(axis="y", which="minor", labelsize=7)
        panel.ticklabel_format(axis="x", useOffset=False)
        # Equal hits look equal.
        low, high = panel.get_xlim()
        if high - low < HIT_POINTS_MIN:
            middle = (low + high) / 2
            panel.set_xlim(middle - HIT_POINTS_MIN / 2, middle + HIT_POINTS_MIN / 2)
        panel.set_xlabel("tokens hit, %")
        panel.set_ylabel("p90 to first token, s")
        store = "store" if scene["store"] else "no store"
        panel.set_title(f"{scene['trace']}, {scene['workers']} workers, {store}, {scene['load']}", fontsize=9)
    for panel in axes.flat[len(found) :]:
        panel.axis("off")
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=7, fontsize=9)
    figure.savefig(path)
    pyplot.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="*", default=[8, 64])
    parser.add_argument("--policy", nargs="*", help="default: all")
    parser.add_argument("--trace", nargs="*", choices=("chat", "agents"), default=["chat", "agents"])
    parser.add_argument("--store", nargs="*", choices=("yes", "no"), default=["yes", "no"])
    parser.add_argument("--parts", type=Path, nargs="*", help="start no run; combine these results of earlier runs")
    parser.add_argument("--json", type=Path, help="also write the record here")
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    if args.parts:
        found = [scene for part in args.parts for scene in json.loads(part.read_text())["scenes"]]
        if args.json:
            write(args.json, {"scenes": found}, "numpy")
    else:
        found = scenes(args)
    if args.plot:
        plot(found, args.plot)
    sys.stdout.write(table(found) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
