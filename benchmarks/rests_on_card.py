"""Short prefills on a GPU, in shared launches and graphs: are they right, how long do they take, how far is the floor?

    python -m benchmarks.rests_on_card --parts check times --layers WCHC --out results

check     compares a small model's calls of several tokens per sequence, launched together and as CUDA graphs, with each
          sequence alone: bit by bit in reproducible mode, by relative error otherwise.
times     measures milliseconds until the likeliest ids are on the host, at V4-Flash's width with weights drawn on the
          card: 100 tokens after 65,536; four prefills of 100 tokens; 32 sequences with one drafted token each; and one
          call with 300 tokens of a sequence and one token of 31 others. Each runs sequence by sequence, launched
          together, and as graphs. The times are divided by the floor of `benchmarks.decode_on_card`.

If a part fails, it prints the reason, and the next part runs. rests_on_card.json is written after every row. The
program needs a CUDA GPU to measure anything. `--toy` runs the code anywhere, in Triton's interpreter if necessary, and
measures nothing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import torch

from antefix.model import Model, Sequence, WindowState, forward, run_tokens, triton_ops
from antefix.model.card_pool import CardPool
from antefix.model.triton_ops import TritonOps
from benchmarks.decode_on_card import FLASH, SMALL, build, floor_bytes, follow, picked_experts, profile
from benchmarks.run_record import about

WAYS: dict[str, dict[str, bool]] = {
    "alone": {}, "together": {"batched": True, "chunks": True},
    "graphs": {"batched": True, "chunks": True, "graphs": True},
}  # fmt: skip
# The number of earlier tokens of each sequence, and each sequence's number of new tokens.
CASES = ((65536, (100,)), (4096, (100,) * 4), (4096, (2,) * 32), (4096, (300, *(1,) * 31)))
REPEATS = 6


def several(model: Model, way: str, *, reproducible: bool, lengths: tuple[int, ...], calls: int) -> dict[str, Any]:
    """Logits of each call, final states and rows of the pool. lengths: earlier tokens of each sequence."""
    random = np.random.default_rng(1)
    size, most = model.config.geometry.block_size, 24 if len(lengths) > 2 else 4
    ops = TritonOps(model.layout, reproducible=reproducible, **WAYS[way])
    plain = TritonOps(model.layout, reproducible=reproducible)
    counts = [[int(n) for n in random.integers(1, most, len(lengths))] for _ in range(calls)]
    kept = [[int(random.integers(1, n + 1)) for n in each] for each in counts]
    needed = [-(-(n + sum(each[i] for each in counts)) // size) for i, n in enumerate(lengths)]
    pool = CardPool(model.layout, sum(needed), model.device, takes_payloads=False)
    sequences = []
    for length, blocks in zip(lengths, needed, strict=True):
        sequences.append(Sequence(pool.allocate(blocks), WindowState.zeros(model.layout, 0, model.device)))
        tokens = random.integers(0, model.config.vocab_size, length).astype("<u4")
        forward(model, pool, [(sequences[-1], tokens)], ops=plain)
    logits = []
    for call in range(calls):
        batch = [
            (s, random.integers(0, model.config.vocab_size, n).astype("<u4"))
            for s, n in zip(sequences, counts[call], strict=True)
        ]
        ran = run_tokens(model, pool, batch, logits="all", ops=ops)
        for number, count in enumerate(kept[call]):
            ran.keep(number, count)
        logits.append(ran.logits.float().cpu())
    runner = ops.step_runner
    return {"logits": torch.cat(logits), "states": [s.window.to_bytes() for s in sequences], "rows": pool.rows.cpu(),
            "replayed": 0 if runner is None else runner.counters.steps_replayed}  # fmt: skip


def check(device: str, rows: list[dict[str, Any]], *, toy: bool) -> None:
    model = build(SMALL, "WCHC", torch.bfloat16 if device == "cuda" else torch.float32, device)
    size: dict[str, Any] = {"lengths": (1, 9), "calls": 1}
    if not toy:
        size = {"lengths": (1, 15, 40, 63, 130, 200), "calls": 6}
    for reproducible in (False,) if toy else (True, False):
        alone = several(model, "alone", reproducible=reproducible, **size)
        for way in ("together", "graphs"):
            got = several(model, way, reproducible=reproducible, **size)
            error = ((got["logits"] - alone["logits"]).norm(dim=1) / alone["logits"].norm(dim=1)).median()
            rows.append({"check": way, "reproducible": reproducible, "replayed": got["replayed"],
                         "logits_equal": torch.equal(got["logits"], alone["logits"]), "median_error": float(error),
                         "states_equal": got["states"] == alone["states"],
                         "rows_equal": float((got["rows"] == alone["rows"]).float().mean())})  # fmt: skip
            print(json.dumps(rows[-1]), flush=True)


def times(args: argparse.Namespace, device: str, bandwidth: float, rows: list[dict[str, Any]], save: Any) -> None:
    fields = SMALL if args.toy else FLASH
    model = build(fields, args.layers, torch.bfloat16 if device == "cuda" else torch.float32, device)
    for context, counts in ((9, (3, 1)),) if args.toy else CASES:
        for way in args.ways:
            try:
                rows.append(measure(model, way, context, counts, bandwidth, device))
                print(json.dumps({k: v for k, v in rows[-1].items() if k != "kernels"}), flush=True)
                print(rows[-1]["kernels"], flush=True)
                save()
            except Exception:  # noqa: BLE001 - the next one says more
                print(f"{context} {counts} {way}: FAILED\n{traceback.format_exc()}", flush=True)


def measure(
    model: Model, way: str, context: int, counts: tuple[int, ...], bandwidth: float, device: str
) -> dict[str, Any]:
    ops = TritonOps(model.layout, **WAYS[way])
    pool, sequences = follow(model, ops, context, len(counts), (REPEATS + 5) * max(counts) + 16)
    random = np.random.default_rng(3)

    def once(by: TritonOps = ops) -> list[int]:
        tokens = [random.integers(0, model.config.vocab_size, n).astype(np.uint32) for n in counts]
        logits = forward(model, pool, list(zip(sequences, tokens, strict=True)), ops=by)
        found: list[int] = logits.argmax(1).tolist()
        return found

    picked = picked_experts(
        model, lambda: once(TritonOps(model.layout, **WAYS["together" if way == "graphs" else way]))
    )
    once(), once()
    spans = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        once()
        spans.append(time.perf_counter() - started)
    floor_ms = floor_bytes(model, picked, len(counts), context) / bandwidth * 1e3
    ms = statistics.median(spans) * 1e3
    return {"tokens": context, "new_tokens": list(counts), "way": way, "ms": ms, "floor_ms": floor_ms,
            "times_floor": ms / floor_ms, **profile(once, device)}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=["check", "times"], choices=("check", "times"))
    parser.add_argument(
        "--layers", default="WCHC", help="the model's layers, one letter each (W window-only, C CSA, H HCA)"
    )
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--toy", action="store_true", help="use a small model, to see whether the benchmark runs")
    parser.add_argument("--out", type=Path, default=Path())
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.toy:
        triton_ops.REPRODUCIBLE_QUERIES_MIN = 16
    found: dict[str, Any] = {**about("torch", "triton"), "check": [], "times": []}
    args.out.mkdir(parents=True, exist_ok=True)

    def save() -> None:
        (args.out / "rests_on_card.json").write_text(json.dumps(found, indent=1) + "\n")

    bandwidth = 4.2e12
    if device == "cuda":
        from benchmarks.kernels import ceilings

        found["ceilings"] = ceilings()
        bandwidth = found["ceilings"]["copy_bytes_per_s"]
    with torch.inference_mode():
        for part in args.parts:
            started = time.perf_counter()
            try:
                if part == "check":
                    check(device, found["check"], toy=args.toy)
                else:
                    times(args, device, bandwidth, found["times"], save)
            except Exception:  # noqa: BLE001 - the next part says more
                print(f"{part}: FAILED\n{traceback.format_exc()}", flush=True)
            save()
            print(f"{part} took {time.perf_counter() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
