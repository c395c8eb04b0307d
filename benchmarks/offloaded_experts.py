"""Experts in host memory, fetched layer by layer: what do steps and chunks cost, and how far is that from the floor?

    python -m benchmarks.offloaded_experts --layers 12 --shares 0 0.25 0.5 --out results

Draws `--layers` layers of V4-Flash's width in the released formats on the GPU, and moves a share of the experts' bytes
to pinned host memory, as `--cpu-offload-bytes` does. For each share it measures GPU memory, decode steps of 1 and 32
sequences behind 8,192 tokens, and a prefill chunk of 2,048 tokens. A forward pass fetches the experts of offloaded
layers whole. (Of three offloaded layers a pass fetches only two, because one of the two buffers on the GPU serves only
one layer.) So the floor is the longer of two times: the floor without offloading, and the bytes that a pass fetches at
the rate of pinned copies, which the same run measures. The logits of a prompt and a step must equal those without
offloading in every bit.

Writes offloaded_experts.json after every row. 12 layers need 44 GB of GPU memory and up to 21 GB of pinned host memory.
`--toy --device cpu` runs everything at small widths.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from antefix.model import BlockPool, Model, Sequence, WindowState, forward
from antefix.model.backend import make_backend
from antefix.model.expert_offload import ExpertOffload, offloaded_layers
from antefix.model.ops import Ops
from benchmarks import run_record
from benchmarks.drawn_flash import draw_share
from benchmarks.ranks_on_cards import Share, ceilings, copy_to_card_rate, synchronize

SEQUENCES = (1, 32)
REPEATS = 6


def offload(model: Model, share: float, dtype: torch.dtype, device: str) -> tuple[int, ...]:
    """Move this share of the experts' bytes to the host. Returns the layers whose experts moved."""
    if not share:
        return ()
    total = sum(tensor.numel() * tensor.element_size() for _, tensor in _expert_tensors(model))
    # In whole layers, as a worker does it.
    layers = offloaded_layers(model, int(share * total), dtype)
    for index in layers:
        for name, tensor in _expert_tensors(model, index):
            owner, _, own = name.rpartition(".")
            setattr(model.get_submodule(owner), own, _on_host(tensor, device))
    ExpertOffload(model, layers, torch.device(device))
    return layers


def _expert_tensors(model: Model, layer: int | None = None) -> list[tuple[str, Tensor]]:
    prefix = "model.layers." if layer is None else f"model.layers.{layer}."
    return [(n, t) for n, t in model.state_dict().items() if n.startswith(prefix) and ".mlp.experts." in n]


def _on_host(tensor: Tensor, device: str) -> Tensor:
    host = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=device == "cuda")
    return host.copy_(tensor)


class Bench:
    """A model and a pool whose sequences all continue one prefix, whose KV is what the pool's memory holds."""

    def __init__(self, model: Model, args: argparse.Namespace) -> None:
        self.model, self.args = model, args
        self.size = model.config.geometry.block_size
        num_blocks = args.context // self.size + 4 * args.chunk // self.size + 2 * max(SEQUENCES) + 8
        self.pool, self.ops = _backend(model, num_blocks)
        self.prefix = self.pool.allocate(args.context // self.size)
        self.random = np.random.default_rng(0)

    def logits(self) -> Tensor:
        """Logits of a prompt and of a step after it, always of the same tokens."""
        blocks = self.pool.allocate(3)
        sequence = Sequence(blocks, WindowState.zeros(self.model.layout, 0, self.model.device))
        random = np.random.default_rng(1)
        found = [self._forward([sequence], random, count) for count in (2 * self.size + 5, 1)]
        self.pool.release(blocks)
        return torch.cat(found).float().cpu()

    def step_s(self, count: int) -> float:
        held = [self.pool.allocate(2) for _ in range(count)]
        running = [self._at(self.args.context, [*self.prefix, *blocks]) for blocks in held]
        spans = [self._timed(lambda: self._forward(running, self.random, 1)) for _ in range(REPEATS + 2)]
        for blocks in held:
            self.pool.release(blocks)
        return statistics.median(spans[2:])

    def chunk_s(self) -> float:
        """Chunks that follow one, two and three others."""
        blocks = self.pool.allocate(4 * self.args.chunk // self.size)
        sequence = self._at(0, blocks)
        spans = [self._timed(lambda: self._forward([sequence], self.random, self.args.chunk)) for _ in range(4)]
        self.pool.release(blocks)
        return statistics.median(spans[1:])

    def _at(self, position: int, blocks: list[int]) -> Sequence:
        return Sequence(blocks, WindowState.zeros(self.model.layout, position, self.model.device))

    def _forward(self, sequences: list[Sequence], random: np.random.Generator, count: int) -> Tensor:
        vocab = self.model.config.vocab_size
        batch = [(each, random.integers(0, vocab, count).astype(np.uint32)) for each in sequences]
        return forward(self.model, self.pool, batch, ops=self.ops)

    def _timed(self, call: Callable[[], object]) -> float:
        synchronize(self.args.device)
        started = time.perf_counter()
        call()
        synchronize(self.args.device)
        return time.perf_counter() - started


def _backend(model: Model, num_blocks: int) -> tuple[BlockPool, Ops]:
    return make_backend("auto", model.layout, num_blocks, model.device)


def measure(args: argparse.Namespace, found: dict[str, Any], save: Callable[[dict[str, Any]], None]) -> None:
    dtype = torch.float32 if args.device == "cpu" else torch.bfloat16
    top, rate = ceilings(args), copy_to_card_rate(args.device)
    found |= {"ceilings": top, "copy_to_card_gb_per_s": rate / 1e9}
    want: Tensor | None = None
    for share in args.shares:
        started = time.perf_counter()
        model = draw_share(ranks=None, device=args.device, num_layers=args.layers, toy=args.toy, dtype=dtype)
        floors = Share(model, 1, top)
        layers = offload(model, share, dtype, args.device)
        host_bytes = sum(t.numel() * t.element_size() for i in layers for _, t in _expert_tensors(model, i))
        bench = Bench(model, args)
        got = bench.logits()
        want = got if want is None else want
        row = {"share": share, "offloaded_layers": len(layers), "host_gb": host_bytes / 1e9, "draw_s": _since(started)}
        row |= {"card_gb": torch.cuda.memory_allocated() / 1e9 if args.device == "cuda" else 0.0}
        row |= {"equals_all_on_card": bool(torch.equal(got, want))}
        fetched = _fetched_per_pass(bench)
        row |= {"fetched_per_pass": fetched, "fetched_gb": fetched * host_bytes / max(1, len(layers)) / 1e9}
        copy_s = row["fetched_gb"] * 1e9 / rate
        cases = [(f"step of {n}", functools.partial(bench.step_s, n), 1, n, args.context) for n in SEQUENCES]
        cases.append((f"chunk of {args.chunk}", bench.chunk_s, args.chunk, 1, 2 * args.chunk))
        for name, call, tokens, count, context in cases:
            seconds = call()
            card_s = floors.floor_s(tokens, context=context, num_sequences=count)
            floor_s = max(card_s, copy_s)
            row[name] = {"s": seconds, "card_floor_s": card_s, "copy_floor_s": copy_s, "over": seconds / floor_s}
        if model.offload is not None:
            row |= {"fetched": model.offload.num_fetched, "waited": model.offload.num_waits}
        save(row)
        # `call` holds the model too.
        del model, floors, bench, cases, call
        gc.collect()
        if args.device == "cuda":
            torch.cuda.empty_cache()


def _fetched_per_pass(bench: Bench) -> float:
    """The number of offloaded layers that a forward pass fetches."""
    if bench.model.offload is None:
        return 0
    before = bench.model.offload.num_fetched
    bench.logits()  # two forward passes
    return (bench.model.offload.num_fetched - before) / 2


def _since(started: float) -> float:
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--shares", type=float, nargs="+", default=[0, 0.25, 0.5])
    parser.add_argument("--context", type=int, default=8192, help="number of earlier tokens of each sequence")
    parser.add_argument("--chunk", type=int, default=2048)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--toy", action="store_true", help="use small tensor widths, to see whether the benchmark runs")
    parser.add_argument("--out", type=Path, default=Path())
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {"layers": args.layers, "context": args.context, "rows": []}

    def save(row: dict[str, Any]) -> None:
        found["rows"].append(row)
        print(json.dumps(row), flush=True)
        run_record.write(args.out / "offloaded_experts.json", found, "torch")

    torch.set_grad_enabled(False)
    measure(args, found, save)


if __name__ == "__main__":
    main()
