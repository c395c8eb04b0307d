"""How much more can this machine's second core compute at all, and how much of it do two threads of a prefill get?

    python -m benchmarks.threads_bound --out benchmarks/results/threads_bound.json   # 3 minutes on two idle cores

Two processes with one thread each share nothing but the machine: their summed rate over the rate of one process is the
most that a second thread could give (cores may share caches, memory and, as hyperthreads, one core). Both compute the
same prefills; "products" are small matrix products that stay in a core's cache. All variants take turns, and ratios are
medians over the rounds. Wall time, so the machine must be idle: `busy` is the share of the time that a process had a
core, and figures with less than 0.97 mean nothing.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch

from antefix.layout import KVFormat
from antefix.model import load_model
from antefix.model.compiled.check import enable
from benchmarks.cpu_peers import ROOT, Step, our_prefill, their_prefill
from benchmarks.run_record import write

# Each variant: what is computed, how many processes compute it, and with how many threads each.
VARIANTS = {
    "products_one": ("products", 1, 1), "products_two_processes": ("products", 2, 1),
    "ours_one": ("ours", 1, 1), "ours_two_processes": ("ours", 2, 1), "ours_two_threads": ("ours", 1, 2),
    "theirs_one": ("theirs", 1, 1), "theirs_two_processes": ("theirs", 2, 1), "theirs_two_threads": ("theirs", 1, 2),
}  # fmt: skip


def products() -> Step:
    rows, weights = torch.randn(64, 192), torch.randn(192, 192)

    def run() -> None:
        for _ in range(1000):
            torch.mm(rows, weights)

    return run


def rate(step: Step, seconds: float) -> tuple[float, float]:
    """Calls per second, and the share of the time that this process had one core."""
    started, used, count = time.perf_counter(), time.process_time(), 0
    while time.perf_counter() - started < seconds:
        step()
        count += 1
    took = time.perf_counter() - started
    return count / took, (time.process_time() - used) / took


def compute(to: Connection, path: Path, num_tokens: int) -> None:
    """A process that computes what it is told, from a common moment on."""
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    model = load_model(path, device="cpu", kv_format=KVFormat.FP8)
    model.threads_are_free = True
    to.send(enable(model))
    theirs = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, num_tokens).astype(np.uint32)
    steps: dict[str, Callable[[], object]] = {
        "products": products(), "ours": our_prefill(model, tokens), "theirs": their_prefill(theirs, tokens)
    }  # fmt: skip
    while (told := to.recv()) is not None:
        what, threads, begin, seconds = told
        torch.set_num_threads(threads)
        steps[what]()
        time.sleep(max(0.0, begin - time.perf_counter()))
        to.send(rate(steps[what], seconds))


def measure(args: argparse.Namespace) -> dict[str, Any]:
    context = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    for _ in range(2):
        mine, other = context.Pipe()
        process = context.Process(target=compute, args=(other, args.model, args.tokens), daemon=True)
        process.start()
        pipes.append(mine)
        processes.append(process)
    are_compiled = [pipe.recv() for pipe in pipes]
    rounds: list[dict[str, float]] = []
    least_busy = 1.0
    for number in range(args.rounds + 1):
        rates = {}
        for name, (what, num_processes, threads) in VARIANTS.items():
            # Time for one call of each process, which warms its caches.
            begin = time.perf_counter() + args.warm_s
            for pipe in pipes[:num_processes]:
                pipe.send((what, threads, begin, args.seconds))
            found = [pipe.recv() for pipe in pipes[:num_processes]]
            rates[name] = sum(each for each, _ in found)
            if number and threads == 1:
                least_busy = min(least_busy, *(busy for _, busy in found))
        rounds += [rates] if number else []
    for pipe, process in zip(pipes, processes, strict=True):
        pipe.send(None)
        process.join()
    ratios = {
        name: statistics.median(each[name] / each[f"{VARIANTS[name][0]}_one"] for each in rounds)
        for name in VARIANTS if not name.endswith("_one")
    }  # fmt: skip
    tokens_per_s = {
        name: args.tokens * statistics.median(each[name] for each in rounds)
        for name in VARIANTS if VARIANTS[name][0] != "products"
    }  # fmt: skip
    return {"compiled": all(are_compiled), "busy": least_busy, "over_one": ratios, "tokens_per_s": tokens_per_s}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", type=Path, default=ROOT / "models/antefix-tiny")
    parser.add_argument("--tokens", type=int, default=1024, help="tokens of the prefill")
    parser.add_argument("--seconds", type=float, default=1.5, help="how long each variant runs per round")
    parser.add_argument("--warm-s", type=float, default=0.3)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="file for the figures")
    args = parser.parse_args()
    found = measure(args)
    for name, ratio in found["over_one"].items():
        print(f"{name}: {ratio:.2f} times one")
    part = found["over_one"]["ours_two_threads"] / found["over_one"]["ours_two_processes"]
    print(f"two threads get {part:.2f} of what two processes get; a process had a core for {found['busy']:.2f} of the "
          f"time or more; compiled kernels: {found['compiled']}")  # fmt: skip
    if args.out is not None:
        write(args.out, {"tokens": args.tokens, "rounds": args.rounds, **found}, "torch", "transformers")


if __name__ == "__main__":
    main()
