"""How the time of a prefill chunk on a GPU divides into kinds of kernels.

    python -m benchmarks.prefill_kinds --layers 6 --contexts 16384 65536 --out results

A model of --layers layers in the released formats, with random weights, runs one chunk behind each context under
PyTorch's profiler, after two chunks that are not profiled. The time of each kernel is added up by name. Kinds whose
operations can be counted also get a fraction of the BF16 matrix rate, which is measured in the same run.

Needs a CUDA GPU. Writes prefill_kinds.json.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from antefix.model import Sequence, WindowState, forward
from antefix.model.backend import make_backend
from antefix.model.packed import PackedLinear
from benchmarks import run_record
from benchmarks.attention_floor import attention_work
from benchmarks.drawn_flash import draw_share
from benchmarks.kernels import ceilings

# Kinds by a part of the kernel's name; the first that fits counts.
KINDS = (
    ("FP4 experts", ("fp4_kernel",)),
    ("FP8 products", ("fp8_kernel",)),
    ("BF16 products", ("_product_kernel", "nvjet", "gemm", "cutlass", "xmma")),
    ("attention and index", ("attend_kernel", "prefill_kernel", "topk", "_queries_kernel", "rows_over")),
    ("mixing", ("_mixing", "_mixed", "_collapse", "_expand", "_gates_kernel")),
    ("rounding to FP8", ("_prepare_kernel",)),
    ("norms and turns", ("_norm_turn",)),
    (
        "routing and sum of experts",
        ("_pick_kernel", "_route_kernel", "_combine", "_likeliest", "sort", "Sort", "radix"),
    ),
    ("copies", ("Memcpy", "Memset", "copy")),
)
REST = "rest"


def kind_of(name: str) -> str:
    return next((kind for kind, parts in KINDS if any(part in name for part in parts)), REST)


def operations(model: Any, chunk: int, context: int) -> dict[str, float]:
    """The operations of a chunk by kind."""
    config = model.config
    counts = {"FP4 experts": 0.0, "FP8 products": 0.0, "BF16 products": 0.0}
    for name, module in model.named_modules():
        if isinstance(module, PackedLinear):
            plain = name.endswith("o_a_proj")
            counts["BF16 products" if plain else "FP8 products"] += 2.0 * chunk * module.codes.numel()
        elif isinstance(module, nn.Linear) and "lm_head" not in name:
            counts["BF16 products"] += 2.0 * chunk * module.weight.numel()
    experts = sum(t.numel() * t.element_size() for n, t in model.state_dict().items() if ".mlp.experts." in n)
    # A byte of codes is two numbers, and 16 of 17 bytes are codes.
    counts["FP4 experts"] = 2.0 * chunk * config.num_experts_per_token / config.num_experts * experts * 32 / 17
    work = attention_work(config, context=context, num_tokens=chunk, num_sequences=1)
    return counts | {"attention and index": work.operations}


def profiled(call: Any) -> dict[str, dict[str, float]]:
    """Milliseconds and launches of each kernel of a call."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        call()
        torch.cuda.synchronize()
    return {
        each.key: {"ms": each.self_device_time_total / 1e3, "launches": each.count}
        for each in seen.key_averages()
        if each.self_device_time_total > 0
    }


def measure(model: Any, contexts: list[int], chunk: int, rate: float) -> list[dict[str, Any]]:
    size = model.layout.geometry.block_size
    pool, ops = make_backend("auto", model.layout, (max(contexts) + chunk) // size + 8, model.device, lead=model.lead)
    prefix, own = pool.allocate(max(contexts) // size), pool.allocate(chunk // size)
    random = np.random.default_rng(0)
    rows = []
    for context in contexts:

        def run(context: int = context) -> None:
            state = WindowState.zeros(model.layout, context, model.device)
            tokens = random.integers(0, model.config.vocab_size, chunk).astype(np.uint32)
            forward(model, pool, [(Sequence(prefix[: context // size] + own, state), tokens)], ops=ops)

        run()
        run()
        kernels = profiled(run)
        kinds: dict[str, dict[str, float]] = {}
        for name, of in kernels.items():
            kind = kinds.setdefault(kind_of(name), {"ms": 0.0, "launches": 0})
            kind["ms"] += of["ms"]
            kind["launches"] += of["launches"]
        for name, count in operations(model, chunk, context).items():
            if name in kinds:
                seconds = kinds[name]["ms"] / 1e3
                kinds[name] |= {"operations": count, "of_rate": count / seconds / rate}
        total = sum(kind["ms"] for kind in kinds.values())
        rows.append({"context": context, "chunk": chunk, "ms": total, "kinds": kinds})
        print(json.dumps({"kernels": kernels} | rows[-1], indent=1), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--chunk", type=int, default=8192)
    parser.add_argument("--contexts", type=int, nargs="+", default=[16384, 65536])
    parser.add_argument("--out", type=Path, default=Path())
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    with torch.inference_mode():
        top = ceilings()
        model = draw_share(ranks=None, device="cuda", num_layers=args.layers)
        rows = measure(model, args.contexts, args.chunk, top["bf16_flops_per_s"])
        found = {"ceilings": top, "layers": args.layers, "chunks": rows, "gpu": torch.cuda.get_device_name()}
        run_record.write(args.out / "prefill_kinds.json", found, "torch", "triton")


if __name__ == "__main__":
    main()
