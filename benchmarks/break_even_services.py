"""Do the real services agree with the simulator about what each window strategy gives, and where not?

    python benchmarks/break_even_services.py --lengths 2048 8192 --repeats 3

For each strategy: one deployment prefills documents cold, a second one on the same store (so nothing is in a worker's
memory) answers the next turn of each and a request that leaves it inside. The same cases go through the simulator's
planner and machine model, whose speeds are fitted to the cold runs of this very run and to direct reads of this disk.
Times are the client's, medians; prints a table with plan, measured and simulated time, and their ratio.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from ttft import direct_read_rate

from antefix.deployment import Deployment, DeploymentConfig
from antefix.window import PromptFacts, RatePriors, Rates, RestorePlanner, Sizes, StoredPrefix, parse
from antefix.wire import Sampling
from simulate.machine import Machine, carry_out, model_sizes
from simulate.report import align

ROOT = Path(__file__).parents[1]
STRATEGIES = ("zero", "boundary", "auto", "full")
QUESTION_TOKENS = 40
# Documents end inside a block, as real ones do: at a block's end `auto`, which leaves out the template's cue, gives
# up a whole block for two tokens.
ODD_TOKENS = 17
# Cold runs of next to nothing tell the fixed cost from the rate.
SHORT_TOKENS = 100
# Inside a document, where no strategy but `full` has a checkpoint near.
LEAVE_SHARE = 0.55


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One answer. case: "cold", "next turn" or "left inside"."""

    strategy: str
    length: int
    case: str
    ttft_s: float
    plan: str
    run_tokens: int


async def ask(
    deployment: Deployment, prompt: npt.NDArray[np.uint32], *, strategy: str, length: int, case: str
) -> Sample:
    started = time.perf_counter()
    ttft_s = 0.0
    async for message in deployment.router.generate(prompt, Sampling(max_tokens=2, ignore_eos=True)):
        ttft_s = ttft_s or time.perf_counter() - started
        last = message
    restore = last.restore
    run_tokens = restore.miss_tokens + restore.replayed_tokens
    return Sample(strategy=strategy, length=length, case=case, ttft_s=ttft_s, plan=restore.plan, run_tokens=run_tokens)


async def measure(strategy: str, args: argparse.Namespace) -> tuple[list[Sample], float]:
    """All cases of one strategy, and the disk's read rate."""
    rng = np.random.default_rng(args.seed)

    def tokens(count: int) -> npt.NDArray[np.uint32]:
        return rng.integers(0, 256, count).astype(np.uint32)

    documents = [(length, tokens(length + ODD_TOKENS)) for length in args.lengths for _ in range(args.repeats)]
    samples = []
    with tempfile.TemporaryDirectory(prefix="antefix-bench-") as scratch:
        config = DeploymentConfig(model=args.model, data_dir=Path(scratch), strategy=strategy)
        async with Deployment(config) as deployment:
            await ask(deployment, tokens(600), strategy=strategy, length=0, case="warm-up")
            for length, document in documents:
                samples.append(await ask(deployment, document, strategy=strategy, length=length, case="cold"))
                short = tokens(SHORT_TOKENS)
                samples.append(await ask(deployment, short, strategy=strategy, length=SHORT_TOKENS, case="cold"))
        async with Deployment(config) as deployment:
            # The planner learns this machine's speeds from a few prompts, as it would in service.
            for _ in range(4):
                await ask(deployment, tokens(1200), strategy=strategy, length=0, case="warm-up")
            for length, document in documents:
                cases = {"left inside": int(LEAVE_SHARE * length), "next turn": len(document)}
                for case, shared in cases.items():
                    prompt = np.concatenate((document[:shared], tokens(QUESTION_TOKENS)))
                    samples.append(await ask(deployment, prompt, strategy=strategy, length=length, case=case))
        return samples, direct_read_rate(config.store_dir)


def fitted_machine(cold: list[Sample], disk_bytes_per_s: float) -> Machine:
    """A machine without jitter: fixed cost from the shortest cold runs, rate from the median of all others."""
    short = statistics.median(sample.ttft_s for sample in cold if sample.length == SHORT_TOKENS)
    rate = statistics.median(
        (sample.length - SHORT_TOKENS) / (sample.ttft_s - short) for sample in cold if sample.length > SHORT_TOKENS
    )
    return Machine(
        prefill_tokens_per_s=rate,
        prefill_fixed_s=max(short - SHORT_TOKENS / rate, 0.001),
        context_half_tokens=1e9,
        disk_bytes_per_s=disk_bytes_per_s,
        jitter=0.0,
    )


def simulated(strategy: str, length: int, case: str, machine: Machine, sizes: Sizes) -> tuple[float, str]:
    """Seconds and plan of the same case in the simulator."""
    priors = RatePriors(
        prefill_tokens_per_s=machine.prefill_tokens_per_s,
        prefill_fixed_s=machine.prefill_fixed_s,
        load_bytes_per_s=machine.disk_bytes_per_s,
        load_fixed_s=machine.disk_fixed_s,
    )
    facts = PromptFacts(num_tokens=length + ODD_TOKENS, num_stored_blocks=0, resume_block=0)
    marks = parse(strategy).at_prompt(facts, sizes)
    shared = length + ODD_TOKENS if case == "next turn" else int(LEAVE_SHARE * length)
    stored = StoredPrefix(
        num_tokens=shared + QUESTION_TOKENS,
        num_blocks=shared // sizes.block_size,
        checkpoints={mark.block: "disk" for mark in marks if mark.block <= shared // sizes.block_size},
    )
    plan = RestorePlanner(sizes, Rates(priors)).plan(stored).plan
    return carry_out(machine, sizes, plan, random.Random(0)).total_s, plan.kind.value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "models" / "antefix-tiny")
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 8192])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    samples: list[Sample] = []
    disks = []
    for strategy in STRATEGIES:
        found, disk = asyncio.run(measure(strategy, args))
        samples += found
        disks.append(disk)
    sizes = model_sizes(str(args.model))
    machine = fitted_machine([s for s in samples if s.case == "cold"], statistics.median(disks))
    print(
        f"cold: {machine.prefill_fixed_s * 1e3:.0f} ms + tokens at {machine.prefill_tokens_per_s:.0f}/s; "
        f"disk {machine.disk_bytes_per_s / 1e9:.2f} GB/s; replay {sizes.replay_tokens} tokens"
    )
    rows = [["strategy", "tokens", "case", "plan", "tokens run", "measured", "simulated", "ratio", "simulated plan"]]
    for strategy in STRATEGIES:
        for length in args.lengths:
            for case in ("next turn", "left inside"):
                group = [s for s in samples if (s.strategy, s.length, s.case) == (strategy, length, case)]
                measured = statistics.median(s.ttft_s for s in group)
                expected, plan = simulated(strategy, length, case, machine, sizes)
                run = statistics.median(s.run_tokens for s in group)
                plans = "/".join(sorted({s.plan for s in group}))
                times = [f"{measured * 1e3:.0f} ms", f"{expected * 1e3:.0f} ms", f"{measured / expected:.2f}"]
                rows.append([strategy, str(length), case, plans, f"{run:.0f}", *times, plan])
    print(align(rows))


if __name__ == "__main__":
    main()
