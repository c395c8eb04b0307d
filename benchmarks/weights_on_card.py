"""Packed weights on a GPU: are products right, and how near are products and a model to the lower bound ("floor")?

    python -m benchmarks.weights_on_card --steps check products model --layers 36 --out results

check     compares every product with the decoded weight in float64. Rows computed alone must have the same bits as rows
          among others. If this step fails, no other step runs. If a later step fails, the next one still runs.
products  measures milliseconds of V4-Flash's products by number of tokens, divided by the floor: packed bytes at copy
          bandwidth, or operations at the BF16 matrix rate, whichever is longer. Only picked experts count.
model     measures a model of V4-Flash's width with `--layers` layers in the released formats, drawn on the GPU:
          memory, decode steps of 1, 32 and 128 sequences at `--context` tokens, and prefill of 2,048-token chunks. Each
          time is divided by its floor.

Needs a CUDA GPU. Writes weights_on_card.json after every step. Over several GPUs: benchmarks/ranks_on_cards.py. From a
directory: benchmarks/loading_on_card.py.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from antefix.model import Model, Sequence, WindowState, forward
from antefix.model.backend import make_backend
from antefix.model.packed import PackedForm, PackedLinear
from antefix.model.packed import round_inputs as round_on_cpu
from antefix_kernels import linear, packed_linear
from antefix_kernels.packed_linear import Weight
from antefix_kernels.torch_reference import decode_weight
from benchmarks import run_record
from benchmarks.attention_floor import attention_work
from benchmarks.drawn_flash import FORMS, draw_codes, draw_scales, draw_share
from benchmarks.kernels import ceilings, replay_ms

# V4-Flash's products: name, outputs, addends.
PRODUCTS = (
    ("wq_a", 1024, 4096),
    ("wq_b", 32768, 1024),
    ("wkv", 512, 4096),
    ("wo_b", 4096, 8192),
    ("shared w1", 2048, 4096),
)
EXPERTS = (("w1 and w3", 4096, 4096), ("w2", 4096, 2048))
NUM_EXPERTS, NUM_PICKED = 256, 6
TOKENS = (1, 32, 128, 2048)
CHUNK = 2048
EMBEDDING = "model.embed_tokens.weight"


def draw_weight(form: PackedForm, *shape: int) -> Weight:
    size = torch.Size(shape)
    codes = draw_codes(form.code_shape(size), is_fp4=form.is_fp4)
    return Weight(codes=codes, scales=draw_scales(form.scale_shape(size), form, shape[-1]), block=form.block)


def check() -> list[str]:
    """A description of each error found; empty if everything is right."""
    wrong = []
    for name, form in FORMS.items():
        for outputs, addends in ((1024, 4096), (520, 416), (4096, 2048), (32768, 1024)):
            weight = draw_weight(form, 1, outputs, addends)
            values = decode_weight(weight.codes[0], weight.scales[0], weight.block)
            x = torch.randn(400, addends, device="cuda").bfloat16()
            inputs = packed_linear.prepare_inputs(x, rounds=True, is_fp4=form.is_fp4)
            rounded = round_on_cpu(x.cpu()).cuda()
            if not form.is_fp4 and not torch.equal(inputs, rounded):
                wrong.append(f"{name} {outputs}x{addends}: inputs are rounded otherwise than on a CPU")
            whole = packed_linear.multiply(inputs.unsqueeze(1), weight)[:, 0]
            want = rounded.double() @ values.T
            error = float((whole.double() - want).norm() / want.norm())
            if not error < 4e-3:
                wrong.append(f"{name} {outputs}x{addends}: relative error {error:.1e}")
            # The tile depends on the number of rows, so these ranges use different tiles.
            for start, stop in ((0, 1), (5, 38), (7, 39), (100, 356), (299, 300)):
                alone = packed_linear.multiply(inputs[start:stop].unsqueeze(1), weight)[:, 0]
                if not torch.equal(alone, whole[start:stop]):
                    wrong.append(f"{name} {outputs}x{addends}: rows {start} to {stop} differ alone")
        wrong += check_routed(name, form)
    return wrong


def check_routed(name: str, form: PackedForm) -> list[str]:
    wrong = []
    weight = draw_weight(form, 8, 512, 1024)
    values = torch.stack([decode_weight(c, s, weight.block) for c, s in zip(weight.codes, weight.scales, strict=True)])
    x = torch.randn(200, 1024, device="cuda").bfloat16()
    picks = torch.rand(200, 8, device="cuda").argsort(1)[:, :3]
    inputs = packed_linear.prepare_inputs(x, rounds=True, is_fp4=form.is_fp4)
    rounded = round_on_cpu(x.cpu()).cuda()

    def run(rows: slice) -> torch.Tensor:
        tile = packed_linear.routed_tile(x, picks[rows].numel(), weight)
        routing = linear.route(picks[rows], 8, tile=tile)
        out = packed_linear.multiply_routed(inputs[rows], weight, routing, gathered=True)
        return out[routing.place].view(-1, 3, 512)

    whole = run(slice(0, 200))
    want = torch.einsum("nk,npok->npo", rounded.double(), values[picks])
    error = float((whole.double() - want).norm() / want.norm())
    if not error < 4e-3:
        wrong.append(f"{name} routed: relative error {error:.1e}")
    # All rows together are 75 rows per expert; these ranges are 15 and 3 rows per expert.
    for start, stop in ((50, 90), (3, 11)):
        if not torch.equal(run(slice(start, stop)), whole[start:stop]):
            wrong.append(f"{name} routed: rows {start} to {stop} differ alone")
    return wrong


def products(top: dict[str, float]) -> list[dict[str, Any]]:
    rows = []
    for name, outputs, addends in PRODUCTS:
        weights = [draw_weight(FORMS["fp8"], 1, outputs, addends) for _ in range(copies(outputs * addends))]
        for tokens in TOKENS:
            x = torch.randn(tokens, 1, addends, device="cuda").bfloat16()
            ms = replay_ms([lambda w=w, x=x: packed_linear.multiply(x, w) for w in weights])
            nbytes = outputs * addends + 2 * tokens * (outputs + addends)
            rows.append(row(f"fp8 {name}", tokens, ms, nbytes, 2 * tokens * outputs * addends, top))
        x = torch.randn(2048, addends, device="cuda").bfloat16()
        ms = replay_ms([lambda x=x: packed_linear.prepare_inputs(x, rounds=True, is_fp4=False)])
        rows.append(row(f"rounding of {addends}", 2048, ms, 4 * x.numel(), 0, top))
    for name, outputs, addends in EXPERTS:
        weight = draw_weight(FORMS["fp4"], NUM_EXPERTS, outputs, addends)
        for tokens in TOKENS:
            picks = torch.rand(tokens, NUM_EXPERTS, device="cuda").argsort(1)[:, :NUM_PICKED].contiguous()
            x = torch.randn(tokens, addends, device="cuda").bfloat16()
            routing = linear.route(picks, NUM_EXPERTS, tile=packed_linear.routed_tile(x, picks.numel(), weight))
            ms = replay_ms([lambda x=x, r=routing, w=weight: packed_linear.multiply_routed(x, w, r, gathered=True)])
            picked = len(picks.unique())
            nbytes = picked * outputs * addends * 17 // 32 + 2 * tokens * (addends + NUM_PICKED * outputs)
            flops = 2 * tokens * NUM_PICKED * outputs * addends
            rows.append(row(f"fp4 experts {name}", tokens, ms, nbytes, flops, top) | {"experts": picked})
    return rows


def copies(nbytes: int) -> int:
    """The number of operands that are twice as large as the GPU's 50 MB cache, so that they are read from memory."""
    return max(1, min(32, (100 << 20) // nbytes))


def row(name: str, tokens: int, ms: float, nbytes: float, flops: float, top: dict[str, float]) -> dict[str, Any]:
    # A copy reads and writes. On this GPU, reads alone run at the same rate.
    bytes_ms, flops_ms = (nbytes / top["copy_bytes_per_s"] * 1e3, flops / top["bf16_flops_per_s"] * 1e3)
    floor = max(bytes_ms, flops_ms)
    found = {
        "name": name,
        "tokens": tokens,
        "ms": round(ms, 4),
        "floor_ms": round(floor, 4),
        "over": round(ms / floor, 2),
    }
    print(json.dumps(found), flush=True)
    return found


def random_model(num_layers: int) -> Model:
    """A model with the first layers of Flash's plan, in the released formats, whose weights are drawn on the GPU."""
    return draw_share(ranks=None, device="cuda", num_layers=num_layers)


def measure_model(num_layers: int, context: int, top: dict[str, float]) -> dict[str, Any]:
    started = time.perf_counter()
    model = random_model(num_layers)
    torch.cuda.synchronize()
    held = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    found: dict[str, Any] = {"layers": num_layers, "weights_gib": held / 2**30, "draw_s": time.perf_counter() - started}
    size = model.layout.geometry.block_size
    num_blocks = context // size + 4 * CHUNK // size + 2 * 128 + 8
    pool, ops = make_backend("auto", model.layout, num_blocks, "cuda")
    found["card_gib"] = torch.cuda.memory_allocated() / 2**30
    # Bytes that all products except the experts' read, and weights that a token is multiplied with.
    sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in model.state_dict().items()}
    expert = sum(nbytes for name, nbytes in sizes.items() if ".mlp.experts." in name) / NUM_EXPERTS
    dense = sum(nbytes for name, nbytes in sizes.items() if ".mlp.experts." not in name) - sizes[EMBEDDING]
    active = dense_weights(model) + NUM_PICKED * expert * 32 / 17
    prefix = pool.allocate(context // size)

    def start(position: int, blocks: list[int]) -> Sequence:
        return Sequence(blocks, WindowState.zeros(model.layout, position, "cuda"))

    def step_of(sequences: list[Sequence], seed: int) -> float:
        tokens = np.random.default_rng(seed).integers(0, 129280, (len(sequences), 1)).astype("<u4")
        return timed(lambda: forward(model, pool, list(zip(sequences, tokens, strict=True)), ops=ops))

    def floor_s(nbytes: float, operations: float, **of: int) -> float:
        work = attention_work(model.config, **of)
        read = (nbytes + work.nbytes) / top["copy_bytes_per_s"]
        return float(max(read, (operations + work.operations) / top["bf16_flops_per_s"]))

    found["decode"] = []
    for batch in (1, 32, 128):
        sequences = [start(context, prefix + pool.allocate(2)) for _ in range(batch)]
        times = [step_of(sequences, seed) for seed in range(6)]
        picked = NUM_EXPERTS * (1 - (1 - NUM_PICKED / NUM_EXPERTS) ** batch)
        floor = floor_s(dense + picked * expert, 2 * active * batch, context=context, num_sequences=batch)
        step = statistics.median(times[2:])
        found["decode"].append({"sequences": batch, "step_s": step, "tokens_per_s": batch / step, "floor_s": floor})
        print(json.dumps(found["decode"][-1]), flush=True)
        for sequence in sequences:
            pool.release(sequence.block_table[-2:])
    sequence = start(0, pool.allocate(4 * CHUNK // size))
    tokens = np.random.default_rng(0).integers(0, 129280, CHUNK).astype("<u4")
    times = [timed(lambda: forward(model, pool, [(sequence, tokens)], ops=ops)) for _ in range(4)]
    step = statistics.median(times[1:])
    # The median is over the chunks that follow 2,048, 4,096 and 6,144 tokens.
    floor = floor_s(held, 2 * active * CHUNK, context=2 * CHUNK, num_tokens=CHUNK)
    found["prefill"] = {"chunk": CHUNK, "chunk_s": step, "tokens_per_s": CHUNK / step, "floor_s": floor}
    print(json.dumps(found["prefill"]), flush=True)
    return found


def dense_weights(model: Model) -> float:
    """The number of weights with which every token is multiplied."""
    count = 0
    for module in model.modules():
        if isinstance(module, PackedLinear):
            count += module.in_features * module.out_features
        elif isinstance(module, nn.Linear):
            count += module.weight.numel()
    return float(count)


def timed(call: Any) -> float:
    torch.cuda.synchronize()
    started = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", nargs="+", default=["check", "products", "model"])
    parser.add_argument("--layers", type=int, default=36)
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--out", type=Path, default=Path())
    args = parser.parse_args()
    torch.manual_seed(0)
    if "check" in args.steps:
        wrong = check()
        print(f"check: {len(wrong)} wrong", *wrong, sep="\n  ", flush=True)
        if wrong:
            sys.exit(1)
    top = ceilings()
    found: dict[str, Any] = {"card": torch.cuda.get_device_name(), "ceilings": top}
    args.out.mkdir(parents=True, exist_ok=True)
    steps: dict[str, Callable[[], Any]] = {
        "products": lambda: products(top),
        "model": lambda: measure_model(args.layers, args.context, top),
    }
    with torch.inference_mode():
        for step, run in steps.items():
            if step not in args.steps:
                continue
            try:
                found[step] = run()
            except Exception:  # noqa: BLE001 - the next step says more
                print(f"{step}: FAILED\n{traceback.format_exc()}", flush=True)
            run_record.write(args.out / "weights_on_card.json", found, "torch", "triton")


if __name__ == "__main__":
    main()
