"""Do the real services agree with the simulator about the benefit of each window strategy, and where do they differ?

    python benchmarks/break_even_services.py --write        about three minutes on two quiet cores

The benchmark starts one deployment per strategy. All deployments run at the same time and get requests in turn, so
that a busy moment of the machine affects them equally. Each deployment prefills the same documents cold. After that,
the processes restart on the same stores, with nothing in the workers' memory. The restarted processes answer the next
turn of some documents, and for others a prompt that shares only part of the document. The same cases go through the
simulator's planner and machine model, whose speeds are fitted to the cold runs of the same run and to direct reads of
this disk. Times are medians measured by the client. Bytes are those that the stores hold. --write writes the JSON, the
plot and the table in docs/results/window_state.md. --from FILE shows the result of an earlier run.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from break_even_report import plot_services, table, write_table
from ttft import direct_read_rate

from antefix.linear_law import LinearLaw
from antefix.record import RecordKind
from antefix.sampling import Sampling
from antefix.store.remote_store import RemoteStore
from antefix.window import Plan, PromptFacts, RatePriors, Rates, RestorePlanner, Sizes, StoredPrefix, parse
from antefix_console.deployment import Deployment, DeploymentConfig
from antefix_simulate.machine import Machine, carry_out, model_sizes
from benchmarks.run_record import write

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks" / "results" / "break_even_services.json"
PLOT = ROOT / "docs" / "plots" / "break_even_services.svg"
DOC = ROOT / "docs" / "results" / "window_state.md"
STRATEGIES = ("zero", "boundary", "auto", "full")
CASES = ("next turn", "left inside")
QUESTION_TOKENS = 40
# Documents end inside a block, as real ones usually do. If one ended at a block's end, `auto`, which leaves out the
# template's cue, would lose a whole block because of two tokens.
ODD_TOKENS = 17
# Cold runs of very short prompts separate the fixed cost from the rate.
SHORT_TOKENS = 100
# A place inside a document where only the strategy `full` has a checkpoint nearby.
LEAVE_SHARE = 0.55
WARM_UP_TOKENS = 1200

_KEPT = (RecordKind.BLOCK, RecordKind.CHECKPOINT)

Tokens = npt.NDArray[np.uint32]


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """One document; `case` names the way in which it will be used again."""

    length: int
    case: str
    tokens: Tokens

    @property
    def shared_tokens(self) -> int:
        return shared_tokens(self.length, self.case)


def shared_tokens(length: int, case: str) -> int:
    return length + ODD_TOKENS if case == "next turn" else int(LEAVE_SHARE * length)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One answer. case: "cold", "next turn" or "left inside".  restore_s, compute_s: as the worker reports them."""

    strategy: str
    length: int
    case: str
    ttft_s: float
    restore_s: float
    compute_s: float
    plan: str
    run_tokens: int


class Measurement:
    """Measures all deployments at once. Each prompt goes to every deployment in turn, with a different one first."""

    def __init__(self, args: argparse.Namespace, scratch: Path) -> None:
        self._rng = np.random.default_rng(args.seed)
        self._turn = 0
        self.samples: list[Sample] = []
        self.stored_bytes: dict[tuple[str, int], float] = {}
        self.configs = {
            name: DeploymentConfig(model=args.model, data_dir=scratch / name, strategy=name) for name in STRATEGIES
        }
        self._lengths, self._repeats = args.lengths, args.repeats
        self.documents = [
            Document(length=length, case=case, tokens=self._tokens(length + ODD_TOKENS))
            for length in args.lengths
            for _ in range(args.repeats)
            for case in CASES
        ]

    async def run(self) -> float:
        """Run all cases; returns the disk's read rate."""
        async with AsyncExitStack() as stack:
            deployments = await self._start(stack)
            await self._ask(deployments, self._tokens(600), length=0, case="warm-up")
            for _ in range(2 * self._repeats):
                await self._ask(deployments, self._tokens(SHORT_TOKENS), length=SHORT_TOKENS, case="cold")
            for length in self._lengths:
                before = await self._used(deployments)
                here = [document for document in self.documents if document.length == length]
                for document in here:
                    await self._ask(deployments, document.tokens, length=length, case="cold")
                after = await self._used(deployments)
                for name in STRATEGIES:
                    self.stored_bytes[name, length] = (after[name] - before[name]) / len(here)
        async with AsyncExitStack() as stack:
            deployments = await self._start(stack)
            # The planners learn this machine's speeds from a few prompts, as they would in service.
            for _ in range(4):
                await self._ask(deployments, self._tokens(WARM_UP_TOKENS), length=0, case="warm-up")
            for document in self.documents:
                prompt = np.concatenate((document.tokens[: document.shared_tokens], self._tokens(QUESTION_TOKENS)))
                await self._ask(deployments, prompt, length=document.length, case=document.case)
            return statistics.median(direct_read_rate(config.store_dir) for config in self.configs.values())

    async def _start(self, stack: AsyncExitStack) -> dict[str, Deployment]:
        deployments = {name: Deployment(config) for name, config in self.configs.items()}
        await asyncio.gather(*(stack.enter_async_context(deployment) for deployment in deployments.values()))
        return deployments

    async def _ask(self, deployments: dict[str, Deployment], prompt: Tokens, *, length: int, case: str) -> None:
        self._turn += 1
        for place in range(len(STRATEGIES)):
            name = STRATEGIES[(self._turn + place) % len(STRATEGIES)]
            self.samples.append(await _ask(deployments[name], prompt, strategy=name, length=length, case=case))
        sys.stderr.write(f"\r{len(self.samples)} answers: {case}, {length} tokens        ")

    async def _used(self, deployments: dict[str, Deployment]) -> dict[str, int]:
        """Bytes of records on disk, after the last ones are written. Handoffs stay in memory and do not count."""
        found: dict[str, int] = {}
        for name, deployment in deployments.items():
            before = -1
            while before != found.get(name):
                before = found.get(name, -2)
                await asyncio.sleep(0.3)
                stats = await RemoteStore(deployment.one("kvstore").address).stats()
                found[name] = sum(stats.kinds[kind].stored_bytes for kind in _KEPT if kind in stats.kinds)
        return found

    def _tokens(self, count: int) -> Tokens:
        return self._rng.integers(0, 256, count).astype(np.uint32)


async def _ask(deployment: Deployment, prompt: Tokens, *, strategy: str, length: int, case: str) -> Sample:
    started = time.perf_counter()
    ttft_s = 0.0
    async for message in deployment.router.generate(prompt, Sampling(max_tokens=2, ignore_eos=True)):
        ttft_s = ttft_s or time.perf_counter() - started
        last = message
    restore = last.restore
    assert restore is not None
    return Sample(
        strategy=strategy,
        length=length,
        case=case,
        ttft_s=ttft_s,
        restore_s=restore.restore_s,
        compute_s=restore.compute_s,
        plan=restore.plan,
        run_tokens=restore.miss_tokens + restore.replayed_tokens,
    )


def fitted_machine(cold: Sequence[Sample], disk_bytes_per_s: float) -> Machine:
    """A machine without jitter whose fixed cost, rate and growth with context are fitted to the cold runs."""
    law = LinearLaw((0.02, 1 / 2000, 0.0), (1.0, 2048.0, 2048.0 * 16384.0), memory=1.0, follow=0.0)
    for sample in cold:
        tokens = float(sample.length + (ODD_TOKENS if sample.length != SHORT_TOKENS else 0))
        law.observe((1.0, tokens, tokens * tokens / 2), sample.ttft_s)
    fixed, per_token, growth = law.coefficients
    return Machine(
        prefill_tokens_per_s=1 / per_token,
        prefill_fixed_s=max(fixed, 0.001),
        context_half_tokens=min(per_token / growth, 1e9) if growth else 1e9,
        disk_bytes_per_s=disk_bytes_per_s,
        jitter=0.0,
    )


def simulated(strategy: str, length: int, case: str, machine: Machine, sizes: Sizes) -> tuple[float, Plan]:
    """Seconds and plan of the same case in the simulator, with a planner that knows the machine."""
    rates = Rates(RatePriors(prefill_tokens_per_s=machine.prefill_tokens_per_s))
    for _ in range(10):
        for tokens in (64, 512, 4096, 16384):
            rates.observe_prefill(tokens, context=0, seconds=machine.compute_s(tokens, context=0))
            rates.observe_prefill(tokens, context=8192, seconds=machine.compute_s(tokens, context=8192))
            rates.observe_load("disk", tokens * 1000, machine.load_s("disk", tokens * 1000))
    facts = PromptFacts(num_tokens=length + ODD_TOKENS, num_stored_blocks=0, resume_block=0)
    shared = shared_tokens(length, case)
    num_blocks = shared // sizes.block_size
    stored = StoredPrefix(
        num_tokens=shared + QUESTION_TOKENS,
        num_blocks=num_blocks,
        checkpoints={
            mark.block: "disk" for mark in parse(strategy).at_prompt(facts, sizes) if mark.block <= num_blocks
        },
    )
    plan = RestorePlanner(sizes, rates).plan(stored).plan
    return carry_out(machine, sizes, plan, random.Random(0)).total_s, plan


def simulated_bytes(strategy: str, length: int, sizes: Sizes) -> int:
    facts = PromptFacts(num_tokens=length + ODD_TOKENS, num_stored_blocks=0, resume_block=0)
    marks = parse(strategy).at_prompt(facts, sizes)
    return length // sizes.block_size * sizes.block_bytes + len(marks) * sizes.checkpoint_bytes


def report(measurement: Measurement, machine: Machine, sizes: Sizes, args: argparse.Namespace) -> dict[str, Any]:
    """All results to show, plot and keep. cold_s: seconds of a cold prompt of a length, from the fit to cold runs."""
    samples = measurement.samples
    rows = []
    for length in args.lengths:
        for case in CASES:
            for strategy in STRATEGIES:
                group = [s for s in samples if (s.strategy, s.length, s.case) == (strategy, length, case)]
                expected_s, plan = simulated(strategy, length, case, machine, sizes)
                prompt_tokens = shared_tokens(length, case) + QUESTION_TOKENS
                times = {
                    name: statistics.median(getattr(s, name) for s in group)
                    for name in ("ttft_s", "restore_s", "compute_s")
                }
                rows.append(
                    {
                        "tokens": length,
                        "case": case,
                        "strategy": strategy,
                        "plans": sorted({s.plan for s in group}),
                        "run_tokens": statistics.median(s.run_tokens for s in group),
                        **times,
                        "cold_s": machine.compute_s(prompt_tokens, context=0),
                        "stored_bytes": measurement.stored_bytes[strategy, length],
                        "simulated_plan": plan.kind.value,
                        "simulated_ttft_s": expected_s,
                        "simulated_bytes": simulated_bytes(strategy, length, sizes),
                    }
                )
    return {
        "model": args.model.name,
        "repeats": args.repeats,
        "replay_tokens": sizes.replay_tokens,
        "machine": asdict(machine),
        "rows": rows,
        "samples": [asdict(sample) for sample in samples if sample.length],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "models" / "antefix-tiny")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096, 8192])
    parser.add_argument(
        "--repeats",
        type=int,
        default=3,
        help="number of documents for each combination of length and case (default: 3)",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--write", action="store_true", help="replace the JSON file, the plot and the table in the document"
    )
    parser.add_argument(
        "--from",
        dest="source",
        type=Path,
        help="show (and write) the result of this earlier run instead of starting a new run",
    )
    args = parser.parse_args()
    if args.source:
        found = json.loads(args.source.read_text())
    else:
        with tempfile.TemporaryDirectory(prefix="antefix-bench-") as scratch:
            measurement = Measurement(args, Path(scratch))
            disk = asyncio.run(measurement.run())
        sys.stderr.write("\n")
        machine = fitted_machine([s for s in measurement.samples if s.case == "cold"], disk)
        found = report(measurement, machine, model_sizes(str(args.model)), args)
    print("\n".join(table(found)))
    if args.write:
        write(RESULT, found, "torch", "grpcio", "lmdb")
        plot_services(found, PLOT)
        write_table(found, DOC)


if __name__ == "__main__":
    main()
