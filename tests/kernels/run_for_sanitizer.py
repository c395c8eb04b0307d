"""Launches workers' kernels once or twice in V4-Flash's attention shapes, with few rows each, for compute-sanitizer.

    compute-sanitizer --tool racecheck --error-exitcode 9 python -m tests.kernels.run_for_sanitizer [--parts ...]

packed        products with FP8 and FP4 weights, routed and not
W, C, H       one window-only, CSA or HCA layer: a prompt, steps of 8 and 40 sequences in shared launches, short
              prefills. Heads have V4's sizes. All else is narrow: racecheck makes a kernel 20 to 100 times slower
reproducible  the three kinds of layers in reproducible mode
Uses no pytest and no files. Prints each part's end. A part that fails does not stop the next one. With one part per run
and a time limit each, a slow part hides no result of the others.
"""

from __future__ import annotations

import argparse
import traceback
from collections.abc import Callable

import numpy as np
import torch

from antefix.model import forward
from antefix.model.triton_ops import TritonOps
from antefix_kernels import linear, packed_fp8
from benchmarks.decode_on_card import FLASH, build, follow
from benchmarks.drawn_flash import FORMS
from benchmarks.weights_on_card import draw_weight

FEW = FLASH | {
    "n_routed_experts": 8, "vocab_size": 1024, "hidden_size": 512, "q_lora_rank": 256, "moe_intermediate_size": 256,
    "o_lora_rank": 128,
}  # fmt: skip


def layer(kinds: str, *, reproducible: bool = False) -> None:
    model = build(FEW, kinds, torch.bfloat16, "cuda")
    alone = TritonOps(model.layout, reproducible=reproducible)
    together = TritonOps(model.layout, reproducible=reproducible, batched=True, chunks=True)
    for count in (8, 40):
        # Lists of a few tiles. Kernels with roles split no list, and kernels without roles split theirs.
        pool, sequences = follow(model, alone, 1200, count, 64)
        for tokens in (1, 3):
            batch = [(each, np.ones(tokens, np.uint32)) for each in sequences]
            forward(model, pool, batch, ops=together)
        forward(model, pool, [(sequences[0], np.ones(20, np.uint32))], ops=alone)
    torch.cuda.synchronize()


def packed() -> None:
    for name, form in FORMS.items():
        weight = draw_weight(form, 4, 512, 1024)
        x = torch.randn(40, 1024, device="cuda").bfloat16()
        picks = torch.arange(80, device="cuda").view(40, 2) % 4
        inputs = packed_fp8.prepare_inputs(x, is_fp4=weight.is_fp4)
        routing = linear.route(picks, 4, tile=packed_fp8.routed_tile(weight, 80, x.device))
        packed_fp8.multiply_routed(inputs, weight, routing, x.dtype, gathered=True, gate_limit=10.0)
        one = draw_weight(form, 1, 512, 1024)
        packed_fp8.multiply(inputs.view(40, 1), one, x.dtype)
        print(f"  {name}", flush=True)
    torch.cuda.synchronize()


PARTS: dict[str, Callable[[], None]] = {
    "packed": packed,
    "W": lambda: layer("W"),
    "C": lambda: layer("C"),
    "H": lambda: layer("H"),
    "reproducible": lambda: layer("WCH", reproducible=True),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    with torch.inference_mode():
        for part in parser.parse_args().parts:
            try:
                PARTS[part]()
                print(f"{part}: done", flush=True)
            except Exception:
                print(f"{part}: FAILED\n{traceback.format_exc()}", flush=True)


if __name__ == "__main__":
    main()
