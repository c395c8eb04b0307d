"""What do shorter pieces of prompts cost, and how much more evenly do tokens come, on one compute thread?

    python -m benchmarks.piece_lengths --pieces 256 128          # 90 s of processor time

A closed system without services: `--sequences` sequences behind `--tokens` tokens each get `--output` tokens in shared
decode steps, then wait until a rest of 192 to 256 prompt tokens has been computed, and continue. Between two steps the
thread computes one call of at most so many tokens, of the sequence with the fewest tokens left. All times are processor
time of this thread, so other load on the machine counts little.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from antefix.layout import KVFormat
from antefix.model import Model, Sequence, WindowState, forward, load_model
from antefix.model.backend import make_backend
from antefix.model.compiled.check import enable
from benchmarks import run_record
from benchmarks.step import ROOT, follow

REST_TOKENS = (192, 256)


@dataclass(slots=True, eq=False)
class Conversation:
    """sequence: what it runs now.  rest: prompt tokens that it waits for.  left: output tokens still to come.
    told_s: when its last token came."""

    sequence: Sequence
    beginning: WindowState
    rest: int
    left: int = 0
    told_s: float = 0.0
    num_turns: int = 0


def measure(model: Model, args: argparse.Namespace, piece_tokens: int) -> dict[str, float]:
    size, random = model.config.geometry.block_size, np.random.default_rng(0)
    room = REST_TOKENS[1] + args.output + size
    num_blocks = -(-args.tokens // size) + args.sequences * -(-room // size)
    pool, ops = make_backend("auto", model.layout, num_blocks, model.device)
    waiting = [
        Conversation(sequence, sequence.window.clone(), int(random.integers(*REST_TOKENS)))
        for sequence in follow(model, pool, ops, args.tokens, args.sequences, room)
    ]
    running: list[Conversation] = []
    gaps_s: list[float] = []
    started = time.thread_time()
    while waiting or running:
        if waiting:
            chosen = min(waiting, key=lambda each: each.rest)
            num_tokens = min(chosen.rest, piece_tokens)
            tokens = random.integers(0, model.config.vocab_size, num_tokens).astype(np.uint32)
            forward(model, pool, [(chosen.sequence, tokens)], ops=ops)
            chosen.rest -= num_tokens
            if not chosen.rest:
                waiting.remove(chosen)
                running.append(chosen)
                chosen.left, chosen.told_s = args.output, time.thread_time()
        if running:
            forward(model, pool, [(each.sequence, np.zeros(1, np.uint32)) for each in running], ops=ops)
            now = time.thread_time()
            gaps_s += [now - each.told_s for each in running]
            for each in list(running):
                each.told_s, each.left = now, each.left - 1
                if each.left:
                    continue
                running.remove(each)
                each.num_turns += 1
                if each.num_turns < args.turns:
                    each.sequence = Sequence(each.sequence.block_table, each.beginning.clone())
                    each.rest = int(random.integers(*REST_TOKENS))
                    waiting.append(each)
    p50_s, p99_s = np.percentile(gaps_s, (50, 99))
    tokens_per_s = len(gaps_s) / (time.thread_time() - started)
    return {"piece_tokens": piece_tokens, "tokens_per_s": tokens_per_s, "gap_p50_s": p50_s, "gap_p99_s": p99_s}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "models/antefix-tiny")
    parser.add_argument("--pieces", type=int, nargs="+", default=[256, 128, 64], help="most tokens of a call")
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=4096, help="tokens before each rest")
    parser.add_argument("--output", type=int, default=64)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--out", type=Path, help="file for the figures")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = load_model(args.model, kv_format=KVFormat.FP8)
    model.threads_are_free = True
    compiled = enable(model)
    rows = [measure(model, args, piece_tokens) for piece_tokens in args.pieces]
    print(json.dumps(rows, indent=1))
    if args.out is not None:
        run_record.write(args.out, {"compiled": compiled, "sequences": args.sequences, "rows": rows}, "torch")


if __name__ == "__main__":
    main()
