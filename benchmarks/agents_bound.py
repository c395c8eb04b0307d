"""How many tokens per second would agents' conversations get if both cores only ran the model, and never waited?

    python -m benchmarks.agents_bound --out benchmarks/results/agents_bound.json    # a minute, also on a busy machine

The work is that of `benchmarks.agents`: an answer of `--output` tokens needs the prefill of the `--rest` tokens after a
hit, and a share in decode steps. There is no service, no store and no client. Times are processor time, the minimum of
`--repeats`. "Together" means that every step has all conversations, and that `--cores` processes share the work
without a loss. "Alone" is one conversation: its prefill runs first, then its steps, and one thread computes both. The
ratio "with free steps" leaves the prefills of all conversations, and takes their decode steps for free.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch

from antefix.layout import KVFormat
from antefix.model import Model, forward, load_model
from antefix.model.backend import make_backend
from antefix.model.compiled.check import enable
from benchmarks.run_record import write
from benchmarks.step import follow

ROOT = Path(__file__).parents[1]


def call_s(model: Model, num_tokens: int, num_sequences: int, num_new: int, repeats: int) -> float:
    """Least processor time of a call with `num_new` tokens of each sequence behind `num_tokens` shared ones."""
    size = model.config.geometry.block_size
    room = num_new * (repeats + 1)
    num_blocks = -(-num_tokens // size) + num_sequences * (-(-room // size) + 1)
    pool, ops = make_backend("auto", model.layout, num_blocks, "cpu")
    sequences = follow(model, pool, ops, num_tokens, num_sequences, room)
    tokens = np.zeros(num_new, np.uint32)
    took = []
    for _ in range(repeats + 1):
        started = time.process_time()
        forward(model, pool, [(sequence, tokens) for sequence in sequences], ops=ops)
        took.append(time.process_time() - started)
    return min(took)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", type=Path, default=ROOT / "models/antefix-tiny")
    parser.add_argument("--conversations", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=4672, help="tokens of a prompt, on average over the turns")
    parser.add_argument("--rest", type=int, default=288, help="tokens of it that are no hit, on average")
    parser.add_argument("--output", type=int, default=64, help="tokens of an answer")
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--out", type=Path, help="file for the figures")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = load_model(args.model, device="cpu", kv_format=KVFormat.FP8)
    compiled = enable(model)
    prefill = call_s(model, args.tokens - args.rest, 1, args.rest, max(args.repeats // 4, 1))
    alone = call_s(model, args.tokens, 1, 1, args.repeats)
    together = call_s(model, args.tokens, args.conversations, 1, args.repeats)
    share = prefill / args.output
    many = args.cores / (share + together / args.conversations)
    one = 1 / (share + alone)
    free_steps = args.cores / share
    print(f"compiled kernels: {compiled}; prefill of {args.rest} tokens {prefill * 1e3:.0f} ms; a step of 1 "
          f"{alone * 1e3:.1f} ms, of {args.conversations} {together * 1e3:.1f} ms")  # fmt: skip
    print(f"tokens/s at most: {many:.0f} with {args.conversations} conversations, {one:.0f} with one: "
          f"{many / one:.1f} times; {free_steps / one:.1f} times with free steps")  # fmt: skip
    if args.out is not None:
        figures = {
            "prefill_s": prefill,
            "step_of_one_s": alone,
            "step_of_all_s": together,
            "many_tokens_per_s": many,
            "one_tokens_per_s": one,
            "times_one": many / one,
            "free_steps_times_one": free_steps / one,
        }
        fields = ("conversations", "tokens", "rest", "output", "cores", "repeats")
        write(args.out, {**{name: getattr(args, name) for name in fields}, "compiled": compiled, **figures}, "torch")


if __name__ == "__main__":
    main()
