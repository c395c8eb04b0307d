"""How long does transformers' implementation of the architecture take for a prompt on a GPU, compared with ours?

    python -m benchmarks.card_transformers --lengths 1024 2048 4096 8192 --out results

Both implementations run a CSA and an HCA layer of V4-Flash's width in bfloat16 with random weights. The
implementations run a whole prompt at once, without a cache, and compute the last token's logits. transformers uses
eager attention, because it has no other. Times are medians after a warm-up. If an implementation runs out of memory,
the report says so for that length.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from antefix.model import Sequence, WindowState, forward
from antefix.model.backend import make_backend
from benchmarks import run_record
from benchmarks.card_restore import FLASH, LAYERS, random_model


def theirs(layers: str) -> Callable[[torch.Tensor], object]:
    from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

    fields = {name: value for name, value in FLASH.items() if name not in ("model_type", "num_hash_layers")}
    kinds = [LAYERS[kind] for kind in layers]
    config = DeepseekV4Config(
        **fields,
        num_hidden_layers=len(layers),
        layer_types=kinds,
        mlp_layer_types=["moe"] * len(layers),
        attn_implementation="eager",
    )
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = DeepseekV4ForCausalLM._from_config(config, dtype=torch.bfloat16).eval()
    torch.set_default_dtype(torch.float32)
    for name, weight in model.named_parameters():
        if "norm" not in name and weight.dim() > 1:
            weight.data.normal_(0.0, weight.shape[-1] ** -0.5)

    def run(tokens: torch.Tensor) -> object:
        with torch.inference_mode():
            return model(input_ids=tokens[None], use_cache=False, logits_to_keep=1).logits

    return run


def ours(layers: str, chunk: int) -> Callable[[torch.Tensor], object]:
    model = random_model(layers, torch.bfloat16, "cuda", small=False).model

    def run(tokens: torch.Tensor) -> object:
        ids = tokens.cpu().numpy().astype(np.uint32)
        num_blocks = -(-len(ids) // model.layout.geometry.block_size)
        pool, ops = make_backend("auto", model.layout, num_blocks, "cuda")
        sequence = Sequence(pool.allocate(num_blocks), WindowState.zeros(model.layout, 0, "cuda"))
        for start in range(0, len(ids), chunk):
            out = forward(model, pool, [(sequence, ids[start : start + chunk])], ops=ops)
        return out

    return run


def timed(run: Callable[[torch.Tensor], object], length: int, repeats: int) -> float | str:
    """Milliseconds of a run, or the reason why the run failed."""
    spans = []
    try:
        for _ in range(repeats + 1):
            tokens = torch.randint(0, 129280, (length,), device="cuda")
            torch.cuda.synchronize()
            started = time.perf_counter()
            run(tokens)
            torch.cuda.synchronize()
            spans.append(1e3 * (time.perf_counter() - started))
    except torch.cuda.OutOfMemoryError:
        torch.cuda.empty_cache()
        return "out of memory"
    return statistics.median(spans[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8192])
    parser.add_argument("--layers", default="CH", help="C CSA, H HCA (default: CH)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="directory for card_transformers.json")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = [{"tokens": length} for length in args.lengths]
    for name, make in (("ours_ms", lambda: ours(args.layers, 8192)), ("transformers_ms", lambda: theirs(args.layers))):
        run = make()
        for row in rows:
            row[name] = timed(run, row["tokens"], args.repeats)
            print(json.dumps(row), flush=True)
        del run
        gc.collect()
        torch.cuda.empty_cache()
    import transformers

    result = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "layers": args.layers,
        "rows": rows,
    }
    print(json.dumps(result))
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        run_record.write(args.out / "card_transformers.json", result, "torch", "transformers")


if __name__ == "__main__":
    main()
