"""How long does it take to place a long prompt, from tokens to worker? What does the directory cost in bytes and time?

    python benchmarks/placement.py --json benchmarks/results/placement.json

A decision covers all of the router's own work: hashing the prompt's blocks, finding their holders, choosing a worker.
"""

from __future__ import annotations

import argparse
import gc
import random
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np

from antefix.block import chain_of
from antefix.secret import Keyring
from antefix_router.naming import PromptNames
from antefix_router.placement.directory import Directory
from antefix_router.placement.workers import Worker, WorkerRole, Workers
from antefix_simulate.baselines import ALL_POLICIES, make_policy
from benchmarks.run_record import write

BLOCK_SIZE = 128
FINGERPRINT = b"f" * 32


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=131072)
    parser.add_argument("--blocks", type=int, default=1_000_000, help="blocks that the directory knows")
    parser.add_argument("--workers", type=int, default=64)
    parser.add_argument("--decisions", type=int, default=1000)
    parser.add_argument("--policy", choices=sorted(ALL_POLICIES), default="least_work")
    parser.add_argument(
        "--guess",
        action="store_true",
        help="simulate workers that do not report their blocks; the router guesses from the requests that it sent",
    )
    parser.add_argument("--json", type=Path, help="also write the record here")
    args = parser.parse_args()
    figures = measure(args)
    sys.stdout.write("\n".join(f"{k:32} {v:,.3f}" for k, v in figures.items()) + "\n")
    if args.json:
        write(args.json, figures, "numpy")
    return 0


def measure(args: argparse.Namespace) -> dict[str, float]:
    rng = np.random.default_rng(0)
    names = PromptNames(fingerprint=FINGERPRINT, keyring=Keyring(b"s" * 32), block_size=BLOCK_SIZE)
    workers = fleet(args.workers, args.policy)
    directory, told = fill(args.blocks, [worker.address for worker in workers.workers])
    conversations = [rng.integers(0, 100_000, args.tokens * 2).astype(np.uint32) for _ in range(16)]
    for worker, tokens in zip(workers.workers, conversations, strict=False):
        directory.placed(worker.address, names.prompt("tenant", tokens[: args.tokens]).keys)
    if not args.guess:
        for worker in workers.workers:
            directory.know(worker.address)
    turns = decisions(args, names, workers, directory, conversations)
    fresh = [rng.integers(0, 100_000, args.tokens).astype(np.uint32) for _ in range(64)]
    first = [timed_decision(names, workers, directory, tokens) for tokens in fresh]
    hashing = [timed_hashing(tokens) for tokens in fresh]
    return {
        **figures("decision", turns),
        **figures("unseen", first),
        "hashing_whole_prompt_ms": 1e3 * float(np.median(hashing)),
        **told,
    }


def figures(label: str, taken: list[tuple[float, float]]) -> dict[str, float]:
    """Figures are given by wall clock and by processor time, which other processes on a busy machine do not
    lengthen.
    """
    named = {}
    for kind, seconds in zip(("", "_cpu"), np.array(taken).T, strict=True):
        named[f"{label}s{kind}_per_s"] = float(1 / seconds.mean())
        named[f"{label}{kind}_p50_ms"] = 1e3 * float(np.quantile(seconds, 0.5))
        named[f"{label}{kind}_p99_ms"] = 1e3 * float(np.quantile(seconds, 0.99))
    return named


def fleet(count: int, policy: str) -> Workers:
    workers = Workers(WorkerRole.PREFILL, make_policy(policy), [f"127.0.0.1:{20000 + i}" for i in range(count)])
    rng = random.Random(0)
    for worker in workers.workers:
        load(worker, rng)
    return workers


def load(worker: Worker, rng: random.Random) -> None:
    for _ in range(rng.randrange(4)):
        worker.num_requests += 1
        worker.backlog.add(rng.uniform(1e3, 1e5), time.monotonic())


def fill(num_blocks: int, addresses: list[str]) -> tuple[Directory, dict[str, float]]:
    """A directory of `num_blocks` blocks in chains of 500, each held by one to three workers; and its fill time."""
    rng = random.Random(0)
    chains = [[rng.getrandbits(64) for _ in range(500)] for _ in range(num_blocks // 500)]
    holders = [rng.sample(addresses, rng.choice((1, 1, 2, 3))) for _ in chains]
    events = sum(len(chain) * len(held) for chain, held in zip(chains, holders, strict=True))
    gc.collect()
    # Bytes are measured in a second directory, because tracing memory slows every allocation.
    directory = Directory(num_blocks_max=4 * num_blocks)
    start, cpu = time.perf_counter(), time.thread_time()
    for chain, held in zip(chains, holders, strict=True):
        for address in held:
            directory.placed(address, chain)
    stored_s, stored_cpu_s = time.perf_counter() - start, time.thread_time() - cpu
    start, cpu = time.perf_counter(), time.thread_time()
    for chain, held in zip(chains[::4], holders[::4], strict=True):
        directory.evicted(held[0], chain)
    evicted_s, evicted_cpu_s = time.perf_counter() - start, time.thread_time() - cpu
    traced_bytes = bytes_of(num_blocks, addresses)
    return directory, {
        "stored_events_per_s": events / stored_s,
        "stored_events_cpu_per_s": events / stored_cpu_s,
        "evicted_events_per_s": 500 * len(chains[::4]) / evicted_s,
        "evicted_events_cpu_per_s": 500 * len(chains[::4]) / evicted_cpu_s,
        "directory_bytes_per_block": traced_bytes[0],
        "directory_bytes_per_block_and_holder": traced_bytes[1],
    }


def bytes_of(num_blocks: int, addresses: list[str]) -> tuple[float, float]:
    """Bytes of keys, table and holder sets: per block, and per pair of block and holder."""
    rng = random.Random(1)
    gc.collect()
    tracemalloc.start()
    directory, pairs = Directory(num_blocks_max=4 * num_blocks), 0
    for _ in range(num_blocks // 500):
        chain = [rng.getrandbits(64) for _ in range(500)]
        held = rng.sample(addresses, rng.choice((1, 1, 2, 3)))
        pairs += 500 * len(held)
        for address in held:
            directory.placed(address, chain)
    nbytes = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    return nbytes / len(directory), nbytes / pairs


def decisions(
    args: argparse.Namespace,
    names: PromptNames,
    workers: Workers,
    directory: Directory,
    conversations: list[np.ndarray],
) -> list[tuple[float, float]]:
    """Times of placing the turns of growing conversations. Each turn is 300 tokens longer than the one before."""
    taken = []
    for number in range(args.decisions):
        turn, which = divmod(number, len(conversations))
        tokens = conversations[which][: args.tokens + 300 * (turn + 1)]
        taken.append(timed_decision(names, workers, directory, tokens))
    return taken


def timed_decision(
    names: PromptNames, workers: Workers, directory: Directory, tokens: np.ndarray
) -> tuple[float, float]:
    start, cpu = time.perf_counter(), time.thread_time()
    prompt = names.prompt("tenant", tokens)
    work = prompt.work(len(prompt.keys) - 4)
    worker = workers.place(work, directory, prompt.keys, BLOCK_SIZE, frozenset())
    directory.guess(worker.address, prompt.keys)
    return time.perf_counter() - start, time.thread_time() - cpu


def timed_hashing(tokens: np.ndarray) -> float:
    start = time.perf_counter()
    chain_of(tokens, fingerprint_digest=FINGERPRINT, key=b"k" * 32, block_size=BLOCK_SIZE)
    return time.perf_counter() - start


if __name__ == "__main__":
    sys.exit(main())
