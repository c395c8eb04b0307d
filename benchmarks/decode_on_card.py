"""Decode steps of batches on a GPU: are they right, how long do they take, and how far from the lower bound is that?

    python -m benchmarks.decode_on_card --parts check products steps --layers WCHC --out results

check     compares a small model's steps, batched and as CUDA graphs, with each sequence alone: bit by bit in
          reproducible mode, by relative error otherwise.
products  measures products of V4-Flash's shapes at 1, 32 and 128 rows, by tile: microseconds, share of the floor (the
          time to read the weights at copy bandwidth), and whether the bits equal those of the tile for many rows.
steps     measures a step at V4-Flash's width, with weights drawn on the GPU, for several numbers of sequences, each
          with a context of its own: sequence by sequence, batched, and as graphs. It reports launches, time on the
          GPU, the largest kernels, and the floor: the time to read the step's weights (only picked experts) and KV
          once at copy bandwidth.

If one part of the benchmark fails, it prints the reason, and the next part runs. Needs a CUDA GPU. `--toy` runs the
code anywhere, in Triton's interpreter if necessary, and measures nothing.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from antefix.layout import KVFormat
from antefix.model import Model, ModelConfig, Sequence, WindowState, forward, moe, triton_ops
from antefix.model.card_pool import CardPool
from antefix.model.load_plan import dtype_of
from antefix.model.norms_rope import inverse_frequencies
from antefix.model.triton_ops import TritonOps
from antefix_kernels import expert_routing, linear
from antefix_kernels.likeliest import likeliest
from benchmarks.attention_floor import attention_work
from benchmarks.run_record import about

KINDS = {"W": "sliding_attention", "C": "compressed_sparse_attention", "H": "heavily_compressed_attention"}
# V4-Flash's own sizes are a config's defaults.
FLASH: dict[str, Any] = {
    "model_type": "deepseek_v4", "head_dim": 512, "index_head_dim": 128, "sliding_window": 128, "num_hash_layers": 0,
    "compress_rates": {KINDS["C"]: 4, KINDS["H"]: 128},
}  # fmt: skip
SMALL: dict[str, Any] = {
    "model_type": "deepseek_v4", "vocab_size": 64, "hidden_size": 64, "sliding_window": 16, "num_attention_heads": 4,
    "head_dim": 80, "partial_rotary_factor": 0.2, "q_lora_rank": 32, "o_groups": 2, "o_lora_rank": 16,
    "index_n_heads": 16, "index_head_dim": 32, "index_topk": 8, "moe_intermediate_size": 32, "n_routed_experts": 4,
    "num_experts_per_tok": 2, "num_hash_layers": 1, "compress_rates": {KINDS["C"]: 4, KINDS["H"]: 16},
}  # fmt: skip
# Name, outputs, addends, groups.
PRODUCTS = (
    ("wq_a", 1024, 4096, 1), ("wq_b", 32768, 1024, 1), ("wkv", 512, 4096, 1), ("wo_a", 1024, 4096, 8),
    ("wo_b", 4096, 8192, 1), ("shared w1", 2048, 4096, 1), ("head", 129280, 4096, 1),
)  # fmt: skip
TILES = (
    (64, 16, 128, 4, 5), (64, 32, 128, 4, 5), (64, 64, 128, 4, 4), (64, 128, 64, 4, 5), (128, 32, 128, 4, 4),
    (128, 64, 64, 4, 5), (128, 128, 64, 8, 4),
)  # fmt: skip
QUICK_TILES = (
    (64, 16, 128, 4, 5), (64, 32, 128, 4, 5), (64, 64, 128, 4, 4), (128, 32, 128, 4, 4), (128, 64, 64, 4, 5),
)  # fmt: skip
ROUTED_TILES = ((64, 32, 128, 4, 4), (64, 64, 128, 4, 4), (64, 128, 64, 4, 4), (64, 128, 128, 4, 3))
STEPS = 8


def build(fields: dict[str, Any], layers: str, dtype: torch.dtype, device: str) -> Model:
    """Weights drawn on the device."""
    plan = {"num_hidden_layers": len(layers), "layer_types": [KINDS[kind] for kind in layers]}
    config = ModelConfig.from_dict(fields | plan)
    with torch.device("meta"):
        model = Model(config, kv_format=KVFormat.FP8).requires_grad_(False).eval()
        for name, weight in model.named_parameters():
            weight.data = weight.data.to(dtype_of(name, weight, dtype))
    model = model.to_empty(device=device)
    model.rope_main = inverse_frequencies(config.rope_main, config.geometry.rope_dim).to(device)
    model.rope_compress = inverse_frequencies(config.rope_compress, config.geometry.rope_dim).to(device)
    torch.manual_seed(0)
    for name, weight in model.named_parameters():
        if "norm" in name or name.endswith("scale"):
            weight.fill_(1.0)
        else:
            weight.normal_(0.0, weight.shape[-1] ** -0.5)
    for name, table in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            table.zero_()
        if name.endswith("tid2eid"):
            order = torch.rand(len(table), config.num_experts, device=device).argsort(1)
            table.copy_(order[:, : table.shape[1]])
    return model


def follow(
    model: Model, ops: TritonOps, num_tokens: int, num_sequences: int, room: int
) -> tuple[CardPool, list[Sequence]]:
    """Sequences that continue one prompt, each with a copy of the prompt's blocks and state."""
    size = model.config.geometry.block_size
    first, each = -(-num_tokens // size), -(-(num_tokens + room) // size)
    pool = CardPool(model.layout, first + each * num_sequences, model.device, takes_payloads=False)
    prompt = Sequence(pool.allocate(first), WindowState.zeros(model.layout, 0, model.device))
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, num_tokens).astype(np.uint32)
    for start in range(0, num_tokens, 4096):
        forward(model, pool, [(prompt, tokens[start : start + 4096])], ops=ops)
    sequences = []
    for _ in range(num_sequences):
        table = pool.allocate(each)
        pool.rows[torch.tensor(table[:first], device=model.device)] = pool.rows[
            torch.tensor(prompt.block_table, device=model.device)
        ]
        sequences.append(Sequence(table, prompt.window.clone()))
    return pool, sequences


def ops_of(model: Model, way: str, reproducible: bool) -> TritonOps:
    return TritonOps(model.layout, reproducible=reproducible, batched=way != "alone", graphs=way == "graphs")


def run_few(model: Model, way: str, reproducible: bool, lengths: list[int], num_steps: int) -> dict[str, Any]:
    """Run sequences of several lengths in one batch; returns logits, rows of the pool and states."""
    random = np.random.default_rng(1)
    size, ops = model.config.geometry.block_size, ops_of(model, way, reproducible)
    needed = [-(-(length + num_steps) // size) for length in lengths]
    pool = CardPool(model.layout, sum(needed), model.device, takes_payloads=False)
    ids = [int(block) for block in random.permutation(pool.allocate(pool.num_blocks))]
    sequences = []
    for length, blocks in zip(lengths, needed, strict=True):
        table = [ids.pop() for _ in range(blocks)]
        sequences.append(Sequence(table, WindowState.zeros(model.layout, 0, model.device)))
        tokens = random.integers(0, model.config.vocab_size, length).astype("<u4")
        forward(model, pool, [(sequences[-1], tokens)], ops=ops_of(model, "alone", reproducible))
    logits = []
    for _ in range(num_steps):
        batch = [(s, random.integers(0, model.config.vocab_size, 1).astype("<u4")) for s in sequences]
        logits.append(forward(model, pool, batch, ops=ops).float().cpu())
    runner = ops.step_runner
    return {
        "logits": torch.cat(logits), "rows": pool.rows.cpu(), "states": [s.window.to_bytes() for s in sequences],
        "replayed": 0 if runner is None else runner.counters.steps_replayed,
    }  # fmt: skip


def check(device: str, dtypes: list[torch.dtype], *, toy: bool) -> None:
    lengths = [1, 5, 8] if toy else [1, 2, 15, 16, 40, 63, 64, 127, 130, 200, 333]
    for dtype in dtypes:
        model = build(SMALL, "WCHC", dtype, device)
        for reproducible in (False,) if toy else (True, False):
            steps = 2 if toy else 24
            alone = run_few(model, "alone", reproducible, lengths, steps)
            for way in ("batched", "graphs"):
                try:
                    compare(f"{dtype} reproducible={reproducible} {way}", alone, run_few(
                        model, way, reproducible, lengths, steps
                    ))  # fmt: skip
                except Exception:  # noqa: BLE001 - the next one says more
                    print(f"{dtype} reproducible={reproducible} {way}: FAILED\n{traceback.format_exc()}", flush=True)


def compare(name: str, alone: dict[str, Any], got: dict[str, Any]) -> None:
    error = ((got["logits"] - alone["logits"]).norm(dim=1) / alone["logits"].norm(dim=1)).median()
    states = sum(one == other for one, other in zip(alone["states"], got["states"], strict=True))
    print(
        f"{name}: logits equal {torch.equal(alone['logits'], got['logits'])} (median error {float(error):.1e}), "
        f"rows equal {float((alone['rows'] == got['rows']).float().mean()):.6f}, "
        f"states equal {states}/{len(alone['states'])}, replays {got['replayed']}",
        flush=True,
    )


def check_routing() -> None:
    """Compare the picked experts and their order, computed by one launch each, with torch's."""
    for tokens in (1, 7, 32, 128):
        scores = torch.rand(tokens, 256, device="cuda").round(decimals=2)
        bias = torch.rand(256, device="cuda").round(decimals=1)
        experts, weights = expert_routing.pick_experts(scores, 6, 1.5, bias=bias)
        want = moe.pick_experts(scores + bias, 6)
        held = scores.gather(1, want)
        error = float((weights - held / held.sum(1, keepdim=True) * 1.5).abs().max())
        was, expert_routing.ENABLED = expert_routing.ENABLED, True
        got = linear.route(experts, 256)
        expert_routing.ENABLED = False
        torch_route = linear.route(want, 256)
        expert_routing.ENABLED = was
        used = torch_route.experts < 256
        same = [torch.equal(getattr(got, name), getattr(torch_route, name)) for name in ("order", "place", "experts")]
        same += [torch.equal(getattr(got, n)[used], getattr(torch_route, n)[used]) for n in ("firsts", "stops")]
        print(
            f"routing of {tokens}: picks equal {torch.equal(experts, want)}, weights off by {error:.1e}, {same}",
            flush=True,
        )


def products(bandwidth: float, *, quick: bool) -> list[dict[str, Any]]:
    from benchmarks.kernels import replay_ms

    check_routing()
    rows = []
    for name, outputs, addends, groups in PRODUCTS[:5:2] + PRODUCTS[1:2] if quick else PRODUCTS:
        copies = max(1, min(16, (100 << 20) // (2 * outputs * addends * groups)))
        weights = [
            (torch.randn(groups, outputs, addends, device="cuda") * addends**-0.5).bfloat16() for _ in range(copies)
        ]
        for tokens in (1, 32, 128):
            x = torch.randn(tokens, groups, addends, device="cuda").bfloat16()
            floor = (2 * groups * outputs * addends) / bandwidth * 1e3
            many = None
            chosen = [tile for tile in (QUICK_TILES if quick else TILES) if (tile[0] == 64) == (tokens <= 64)]
            for tile, skips in ((None, False), (None, True), *((t, s) for t in chosen for s in (False, True))):
                with tiles(tile, None, skips):
                    out = linear.multiply_groups(x, weights[0])
                    many = out if many is None else many
                    ms = replay_ms([lambda w=w, x=x: linear.multiply_groups(x, w) for w in weights])
                rows.append({"name": name, "tokens": tokens, "tile": tile, "skips": skips, "us": ms * 1e3,
                             "of_floor": floor / ms, "same_bits": torch.equal(out, many)})  # fmt: skip
                print(json.dumps(rows[-1]), flush=True)
            if tokens == 1:
                out = linear.multiply_groups(x, weights[0])
                ms = replay_ms([lambda w=w, x=x: linear.multiply_groups(x, w) for w in weights])
                rows.append({"name": name, "tokens": tokens, "tile": "few rows", "skips": True, "us": ms * 1e3,
                             "of_floor": floor / ms, "same_bits": torch.equal(out, many)})  # fmt: skip
                print(json.dumps(rows[-1]), flush=True)
    rows += routed(bandwidth, replay_ms, quick=quick)
    return rows


def routed(bandwidth: float, replay_ms: Callable[..., float], *, quick: bool) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    shapes = (("experts w1 and w3", 4096, 4096), ("experts w2", 4096, 2048))
    for name, outputs, addends in shapes[:1] if quick else shapes:
        weight = torch.randn(256, outputs, addends, device="cuda", dtype=torch.bfloat16)
        for tokens in (1, 32, 128):
            picks = torch.rand(tokens, 256, device="cuda").argsort(1)[:, :6].contiguous()
            x = torch.randn(tokens, addends, device="cuda").bfloat16()
            order = linear.route(picks, 256)
            floor = 2 * len(picks.unique()) * outputs * addends / bandwidth * 1e3
            many = None
            for tile, skips in ((None, False), (None, True), *((t, s) for t in ROUTED_TILES for s in (False, True))):
                with tiles(None, tile, skips):
                    out = linear.multiply_routed(x, weight, order, gathered=True)
                    many = out if many is None else many
                    ms = replay_ms([lambda x=x, r=order, w=weight: linear.multiply_routed(x, w, r, gathered=True)])
                rows.append({"name": name, "tokens": tokens, "tile": tile, "skips": skips, "us": ms * 1e3,
                             "of_floor": floor / ms, "same_bits": torch.equal(out, many)})  # fmt: skip
                print(json.dumps(rows[-1]), flush=True)
    return rows


class tiles:
    """A context in which products of few rows use this tile. None stands for the tiles for many rows.

    skips: see `linear`.
    """

    def __init__(self, plain: tuple[int, ...] | None, routed: tuple[int, ...] | None, skips: bool) -> None:
        self.plain, self.routed, self.skips = plain, routed, skips

    def __enter__(self) -> None:
        self.held = {
            name: getattr(linear, name)
            for name in ("_TILES_FEW", "_TILE_PICKS", "_PICKS", "SKIPS_MISSING_ROWS", "FEW_ROWS")
        }
        few: Any = linear
        few.FEW_ROWS = False
        few._TILES_FEW, few._PICKS, few.SKIPS_MISSING_ROWS = (), range(0), self.skips
        if self.plain is not None:
            few._TILES_FEW = ((128, 1 << 30, self.plain),)
        if self.routed is not None:
            few._TILE_PICKS, few._PICKS = self.routed, range(1 << 20)

    def __exit__(self, *_: object) -> None:
        for name, value in self.held.items():
            setattr(linear, name, value)


def picked_experts(model: Model, step: Callable[[], object]) -> list[int]:
    """How many experts a step reads in each layer."""
    found: list[int] = []

    def note(module: nn.Module, _: Any, out: tuple[torch.Tensor, torch.Tensor]) -> None:
        found.append(len(out[0].unique()))

    hooks = [m.register_forward_hook(note) for m in model.modules() if isinstance(m, moe.ExpertRouter)]
    step()
    for hook in hooks:
        hook.remove()
    return found


def floor_bytes(model: Model, picked: list[int], num_sequences: int, num_tokens: int) -> float:
    """Bytes that a step must read: weights (except the embedding's rows), index keys, picked entries,
    HCA entries, and windows.
    """
    total = 0.0
    for name, weight in model.named_parameters():
        if ".experts." not in name and "embed_tokens" not in name:
            total += weight.numel() * weight.element_size()
    layers = [layer.mlp.experts for layer in model.model.layers]
    for experts, count in zip(layers, picked, strict=True):
        for weight in (experts.gate_up_proj, experts.down_proj):
            total += weight[0].numel() * weight.element_size() * count
    return total + attention_work(model.config, context=num_tokens, num_sequences=num_sequences).nbytes


def one_step(model: Model, pool: CardPool, ops: TritonOps, sequences: list[Sequence], random: Any) -> list[int]:
    tokens = random.integers(0, model.config.vocab_size, len(sequences)).astype(np.uint32)
    batch = [(sequence, tokens[i : i + 1]) for i, sequence in enumerate(sequences)]
    logits = forward(model, pool, batch, ops=ops)
    found: list[int] = likeliest(logits)[0].tolist()
    return found


def steps(args: argparse.Namespace, bandwidth: float, device: str) -> list[dict[str, Any]]:
    fields = SMALL if args.toy else FLASH
    model = build(fields, args.layers, torch.bfloat16 if device == "cuda" else torch.float32, device)
    rows = []
    for count in args.sequences:
        context = args.long if count == 1 else args.tokens
        try:
            print(f"{count} sequences: {agreement(model, count, context)}", flush=True)
        except Exception:  # noqa: BLE001 - the next one says more
            print(f"{count} agreement: FAILED\n{traceback.format_exc()}", flush=True)
        for way in args.ways:
            for reproducible in args.reproducible:
                try:
                    row = measure(model, way, bool(reproducible), count, context, bandwidth, device)
                    rows.append(row)
                    print(json.dumps({k: v for k, v in row.items() if k != "kernels"}), flush=True)
                    print(row["kernels"], flush=True)
                except Exception:  # noqa: BLE001 - the next one says more
                    print(f"{count} {way} {reproducible}: FAILED\n{traceback.format_exc()}", flush=True)
                gc.collect()
                if device == "cuda":
                    torch.cuda.empty_cache()
    return rows


def agreement(model: Model, count: int, context: int) -> str:
    """How far the faster kernels' logits are from those of reproducible mode, after a batched step of the same
    sequences; and in both modes, how far the batch's logits are from those of each sequence alone.
    """
    found = {}
    pool, sequences = follow(model, ops_of(model, "alone", False), context, count, 16)
    random = np.random.default_rng(5)
    tokens = random.integers(0, model.config.vocab_size, count).astype(np.uint32)
    for way, reproducible in (("batched", True), ("batched", False), ("alone", True), ("alone", False)):
        copies = [Sequence(s.block_table, s.window.clone()) for s in sequences[: count if way == "batched" else 2]]
        batch = [(sequence, tokens[i : i + 1]) for i, sequence in enumerate(copies)]
        found[way, reproducible] = forward(model, pool, batch, ops=ops_of(model, way, reproducible)).float()
    exact, fast = found["batched", True], found["batched", False]
    errors = ((fast - exact).norm(dim=1) / exact.norm(dim=1)).sort().values
    few = len(found["alone", True])
    alone = ((fast[:few] - found["alone", False]).norm(dim=1) / exact[:few].norm(dim=1)).max()
    return (
        f"fast against reproducible, relative: median {float(errors[len(errors) // 2]):.1e},"
        f" most {float(errors[-1]):.1e}; fast against alone {float(alone):.1e}; reproducible equals alone:"
        f" {torch.equal(exact[:few], found['alone', True])}"
    )


def measure(
    model: Model, way: str, reproducible: bool, count: int, context: int, bandwidth: float, device: str
) -> dict[str, Any]:
    ops = ops_of(model, way, reproducible)
    num_steps = 3 if way == "alone" and count > 1 else STEPS
    pool, sequences = follow(model, ops, context, count, 4 * num_steps + 16)
    random = np.random.default_rng(3)
    # A replayed CUDA graph runs no Python code that could count the picked experts.
    eager = ops_of(model, "batched" if way == "graphs" else way, reproducible)
    picked = picked_experts(model, lambda: one_step(model, pool, eager, sequences, random))
    for _ in range(2):
        one_step(model, pool, ops, sequences, random)
    spans = []
    for _ in range(num_steps):
        started = time.perf_counter()
        one_step(model, pool, ops, sequences, random)
        spans.append(time.perf_counter() - started)
    floor_ms = floor_bytes(model, picked, count, context) / bandwidth * 1e3
    ms = statistics.median(spans) * 1e3
    seen = profile(lambda: one_step(model, pool, ops, sequences, random), device)
    return {"sequences": count, "tokens": context, "way": way, "reproducible": reproducible, "ms": ms,
            "floor_ms": floor_ms, "times_floor": ms / floor_ms, "picked": picked, **seen}  # fmt: skip


def profile(step: Callable[[], object], device: str) -> dict[str, Any]:
    """A step's launches, milliseconds that the GPU was busy, calls that wait for the GPU, and the largest kernels."""
    if device != "cuda":
        step()
        return {"kernels": ""}
    kinds = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=kinds) as seen:
        step()
        torch.cuda.synchronize()
    averages = seen.key_averages()
    calls = {each.key: each.count for each in averages}
    on_card = [(each.self_device_time_total, each.count, each.key) for each in averages if each.self_device_time_total]
    on_card.sort(reverse=True)
    launches = sum(n for name, n in calls.items() if name.startswith(("cudaLaunchKernel", "cuLaunchKernel")))
    waits = {n: c for n, c in calls.items() if n.startswith(("cudaStreamSync", "cudaDeviceSync", "cudaMemcpy"))}
    lines = [f"    {us / 1e3:8.3f} ms {count:5d}  {key[:90]}" for us, count, key in on_card[:16]]
    return {
        "launches": launches, "graph_launches": calls.get("cudaGraphLaunch", 0), "waits": waits,
        "card_kernels": sum(count for _, count, _ in on_card), "card_ms": sum(us for us, _, _ in on_card) / 1e3,
        "kernels": "\n".join(lines),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=["check", "products", "steps"])
    parser.add_argument(
        "--layers", default="WCHC", help="the model's layers, one letter each (W window-only, C CSA, H HCA)"
    )
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 32, 128])
    parser.add_argument("--tokens", type=int, default=4096, help="tokens that each sequence follows")
    parser.add_argument(
        "--long", type=int, default=65536, help="number of earlier tokens in the cache where a sequence runs alone"
    )
    parser.add_argument("--ways", nargs="+", default=["alone", "batched", "graphs"])
    parser.add_argument("--reproducible", type=int, nargs="+", default=[0, 1])
    parser.add_argument(
        "--few",
        type=int,
        default=1,
        help="1: use tiles for few rows, and our kernels for routing; 0: use tiles for many rows, and torch's routing",
    )
    parser.add_argument("--quick", action="store_true", help="measure only a few matrix products and tile sizes")
    parser.add_argument("--toy", action="store_true", help="use a small model, to see whether the benchmark runs")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if not args.few:
        linear._TILES_FEW, linear._PICKS, linear.FEW_ROWS = (), range(0), False
        expert_routing.ENABLED = False
    if args.toy:
        triton_ops.REPRODUCIBLE_QUERIES_MIN = 16
    found: dict[str, Any] = {}
    bandwidth = 4.2e12
    if device == "cuda":
        from benchmarks.kernels import ceilings

        found["ceilings"] = ceilings()
        bandwidth = found["ceilings"]["copy_bytes_per_s"]
        print(torch.cuda.get_device_name(), torch.__version__, json.dumps(found["ceilings"]), flush=True)
    dtypes = [torch.bfloat16] if device == "cuda" else [torch.float32]
    parts: dict[str, Callable[[], Any]] = {
        "check": lambda: check(device, dtypes, toy=args.toy),
        "products": lambda: products(bandwidth, quick=args.quick),
        "steps": lambda: steps(args, bandwidth, device),
    }
    with torch.inference_mode():
        for name in args.parts:
            started = time.perf_counter()
            try:
                found[name] = parts[name]()
            except Exception:  # noqa: BLE001 - the next part says more
                print(f"{name}: FAILED\n{traceback.format_exc()}", flush=True)
            print(f"{name} took {time.perf_counter() - started:.0f} s", flush=True)
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "decode_on_card.json").write_text(
            json.dumps({**about("torch", "triton"), **found}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
