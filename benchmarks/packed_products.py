"""Products with packed weights on FP8 tensor cores: are they right, which tiles are fastest, what does a layer gain?

    python -m benchmarks.packed_products --out results [--steps compile check products layers model]

compile   compiles all kernels of the other steps in several processes at once, so that the GPU is idle for less time.
check     compares products of V4-Flash's shapes with the decoded weight in float64. Rows computed alone must have the
          same bits as rows among others, and so must gates with and without their activation.
products  measures milliseconds by number of tokens and tile, divided by the floor: packed bytes at copy bandwidth, or
          operations at the BF16 matrix rate. Only picked experts count. All tiles must give the same bits. The table
          also has `antefix_kernels.packed_linear`, which multiplies in BF16.
candidates  compares FP4 experts with 128 addends in one sum (`antefix_kernels.packed_fp4_shared`) with the experts in
          use: errors and speed. Compares two products of one input in one launch (wq_a with wkv, shared w1 with w3)
          with the same products in two launches.
layers    measures the part of a layer that computes each token alone, as one CUDA graph, with and without FP8 tensor
          cores.
model     measures steps of a model of --layers layers with and without FP8 tensor cores, in the same way as
          benchmarks/weights_on_card.py.

Every step runs, even if another step fails. Needs a Hopper GPU. Writes packed_products.json after each step.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from antefix.model import packed
from antefix.model.packed import round_inputs as round_on_cpu
from antefix_kernels import linear, packed_fp4_shared, packed_fp8, packed_linear, tokens
from antefix_kernels.packed_fp8 import Tile
from antefix_kernels.packed_linear import Weight
from antefix_kernels.torch_reference import decode_weight
from benchmarks import run_record
from benchmarks.drawn_flash import FORMS, draw_share
from benchmarks.kernels import ceilings, replay_ms
from benchmarks.weights_on_card import copies, draw_weight, measure_model

STEPS = ("compile", "check", "products", "candidates", "layers", "model")
PRODUCTS = (("wq_a", 1024, 4096), ("wq_b", 32768, 1024), ("wkv", 512, 4096), ("wo_b", 4096, 8192),
            ("shared w1", 2048, 4096), ("shared w2", 4096, 2048))  # fmt: skip
# The groups of wo_a, which are multiplied in BF16.
GROUPED = ("wo_a", 8, 1024, 4096)
# The candidate's tiles: outputs, rows, warps, stages.
SHARED_TILES = tuple(
    Tile(outputs=n, rows=m, warps=w, stages=s)
    for n, m, w, s in ((128, 16, 4, 3), (64, 64, 4, 3), (128, 64, 4, 3), (128, 128, 8, 3), (64, 128, 4, 3))
)
# Pairs of products with the same input, each pair also merged into one product.
MERGED = (("wq_a with wkv", (1024, 512), 4096), ("shared w1 with w3", (2048, 2048), 4096))
NUM_EXPERTS, NUM_PICKED, HIDDEN, INNER, LIMIT = 256, 6, 4096, 2048, 10.0
TOKENS = (1, 32, 128, 2048, 8192)
EXPERT_TOKENS = (1, 8, 32, 128, 512, 2048, 8192)
PROCESSES = 12


def fp8_tiles(num_rows: int) -> list[Tile]:
    if num_rows <= 32:
        sizes = [(128, 16, 8, 4), (128, 16, 4, 4), (64, 16, 4, 4), (128, 32, 4, 4), (128, 32, 4, 3)]
    elif num_rows <= 128:
        sizes = [(64, 128, 4, 3), (128, 64, 4, 4), (128, 64, 4, 3)]
    else:
        sizes = [(64, 128, 4, 3), (128, 64, 4, 3), (64, 128, 4, 2)]
    return [Tile(outputs=n, rows=m, warps=w, stages=s) for n, m, w, s in sizes]


def fp4_tiles(num_tokens: int) -> list[Tile]:
    if num_tokens <= 128:
        sizes = [(128, 16, 4, 3), (128, 16, 4, 4), (64, 16, 4, 4), (64, 16, 4, 6)]
    elif num_tokens <= 512:
        sizes = [(128, 16, 4, 3), (128, 32, 4, 3), (64, 32, 4, 4)]
    else:
        sizes = [(64, 64, 4, 3), (64, 32, 4, 4), (128, 32, 4, 3), (128, 64, 4, 2), (64, 64, 4, 4), (128, 64, 8, 3)]
    return [Tile(outputs=n, rows=m, warps=w, stages=s) for n, m, w, s in sizes]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """run(tile): the calls to time, each on different operands.  before: the same products by packed_linear."""

    name: str
    num_tokens: int
    tiles: list[Tile]
    run: Callable[[Tile], list[Callable[[], torch.Tensor]]]
    before: Callable[[], list[Callable[[], torch.Tensor]]]
    num_bytes: float
    num_flops: float


def cases() -> Iterator[Case]:
    for name, outputs, addends in PRODUCTS:
        weights = [draw_weight(FORMS["fp8"], 1, outputs, addends) for _ in range(copies(outputs * addends))]
        for num_tokens in TOKENS:
            x = torch.randn(num_tokens, addends, device="cuda").bfloat16()
            yield _product(name, num_tokens, x, weights)
    for name in ("w1 and w3", "w2"):
        outputs, addends = (2 * INNER, HIDDEN) if name != "w2" else (HIDDEN, INNER)
        weight = draw_weight(FORMS["fp4"], NUM_EXPERTS, outputs, addends)
        for num_tokens in EXPERT_TOKENS:
            yield _routed(name, num_tokens, weight)


def _product(name: str, num_tokens: int, x: torch.Tensor, weights: list[Weight]) -> Case:
    outputs, addends = weights[0].codes.shape[1], weights[0].num_addends
    inputs = packed_fp8.prepare_inputs(x, is_fp4=False).view(num_tokens, 1)
    rounded = packed_linear.prepare_inputs(x, rounds=True, is_fp4=False).unsqueeze(1)

    def run(tile: Tile) -> list[Callable[[], torch.Tensor]]:
        return [lambda w=w: packed_fp8.multiply(inputs, w, torch.bfloat16, tile=tile) for w in weights]

    return Case(
        name=f"fp8 {name}",
        num_tokens=num_tokens,
        tiles=fp8_tiles(num_tokens),
        run=run,
        before=lambda: [lambda w=w: packed_linear.multiply(rounded, w) for w in weights],
        num_bytes=outputs * addends + num_tokens * (2 * outputs + addends),
        num_flops=2 * num_tokens * outputs * addends,
    )


def _routed(name: str, num_tokens: int, weight: Weight) -> Case:
    is_gated = name != "w2"
    outputs, addends = weight.codes.shape[1], weight.num_addends
    torch.manual_seed(num_tokens)
    # The cache holds few experts, so each call picks different ones and reads them from memory.
    sets = [
        torch.rand(num_tokens, NUM_EXPERTS, device="cuda").argsort(1)[:, :NUM_PICKED].contiguous()
        for _ in range(8 if num_tokens <= 8 else 1)
    ]
    num_rows = num_tokens if is_gated else num_tokens * NUM_PICKED
    x = torch.randn(num_rows, addends, device="cuda").bfloat16()
    inputs = packed_fp8.prepare_inputs(x, is_fp4=True)
    rounded = packed_linear.prepare_inputs(x, rounds=True, is_fp4=True)

    def run(tile: Tile) -> list[Callable[[], torch.Tensor]]:
        routings = [linear.route(picks, NUM_EXPERTS, tile=tile.rows) for picks in sets]
        return [
            lambda r=r: packed_fp8.multiply_routed(
                inputs, weight, r, torch.bfloat16, gathered=is_gated, tile=tile, gate_limit=LIMIT if is_gated else None
            )
            for r in routings
        ]

    def before() -> list[Callable[[], torch.Tensor]]:
        rows = packed_linear.routed_tile(x, num_tokens * NUM_PICKED, weight)
        routings = [linear.route(picks, NUM_EXPERTS, tile=rows) for picks in sets]

        def one(routing: linear.Routing) -> torch.Tensor:
            out = packed_linear.multiply_routed(rounded, weight, routing, gathered=is_gated)
            return tokens.swiglu(out, LIMIT) if is_gated else out

        return [lambda r=r: one(r) for r in routings]

    picked = sum(len(picks.unique()) for picks in sets) / len(sets)
    return Case(
        name=f"fp4 experts {name}",
        num_tokens=num_tokens,
        tiles=fp4_tiles(num_tokens),
        run=run,
        before=before,
        num_bytes=picked * outputs * addends * 17 / 32 + num_rows * addends + 2 * num_tokens * NUM_PICKED * outputs,
        num_flops=2 * num_tokens * NUM_PICKED * outputs * addends,
    )


def compile_all(number: int) -> None:
    """Run once each kernel that process `number` has to compile."""
    count = 0
    for case in cases():
        for tile in case.tiles:
            count += 1
            if count % PROCESSES == number:
                try:
                    case.run(tile)[0]()
                except Exception as error:  # noqa: BLE001 - the step that measures it says so
                    print(f"{case.name} {tile}: {str(error)[-200:]}", flush=True)
    torch.cuda.synchronize()


def compile_in_processes() -> dict[str, Any]:
    started = time.perf_counter()
    command = [sys.executable, "-m", "benchmarks.packed_products", "--compile"]
    started_all = [subprocess.Popen([*command, str(number)]) for number in range(PROCESSES)]
    codes = [process.wait() for process in started_all]
    return {"s": time.perf_counter() - started, "exit_codes": codes}


def check() -> list[str]:
    """A description of each error that was found; empty if all results are right."""
    wrong: list[str] = []
    for name, form in FORMS.items():
        for outputs, addends in ((1024, 4096), (520, 384), (4096, 2048), (512, 4096), (32768, 1024)):
            weight = draw_weight(form, 1, outputs, addends)
            values = decode_weight(weight.codes[0], weight.scales[0], weight.block)
            x = torch.randn(400, addends, device="cuda").bfloat16()
            want = round_on_cpu(x.cpu()).cuda().double() @ values.T

            def product(rows: torch.Tensor, w: Weight = weight, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
                inputs = packed_fp8.prepare_inputs(rows, is_fp4=w.is_fp4).view(len(rows), 1)
                return packed_fp8.multiply(inputs, w, dtype)[:, 0]

            whole = product(x)
            precise = _error(product(x, dtype=torch.float32), want)
            print(f"{name} {outputs}x{addends}: {_error(whole, want):.1e}, in float32 {precise:.1e}", flush=True)
            if not (_error(whole, want) < 4e-3 and precise < 1e-3):
                wrong.append(f"{name} {outputs}x{addends}: relative error {_error(whole, want):.1e}")
            for start, stop in ((0, 1), (5, 38), (7, 39), (100, 356), (299, 300)):
                if not torch.equal(product(x[start:stop]), whole[start:stop]):
                    wrong.append(f"{name} {outputs}x{addends}: rows {start} to {stop} differ alone")
            # With this many rows, one program adds up all runs itself.
            many = product(x.repeat(13, 1)).view(13, *whole.shape)
            if not torch.equal(many, whole.expand_as(many)):
                wrong.append(f"{name} {outputs}x{addends}: rows differ among 5,200")
        wrong += check_routed(name)
    return wrong


def check_routed(name: str) -> list[str]:
    wrong = []
    weight = draw_weight(FORMS[name], 8, 512, 1024)
    values = torch.stack([decode_weight(c, s, weight.block) for c, s in zip(weight.codes, weight.scales, strict=True)])
    x = torch.randn(200, 1024, device="cuda").bfloat16()
    # No row picks the last expert.
    picks = torch.rand(200, 7, device="cuda").argsort(1)[:, :3]
    picks[60:70] = torch.tensor([2, 3, 4], device="cuda")

    def run(rows: slice, limit: float | None = None) -> torch.Tensor:
        routing = linear.route(picks[rows], 8, tile=packed_fp8.routed_tile(weight, picks[rows].numel(), x.device))
        inputs = packed_fp8.prepare_inputs(x[rows], is_fp4=weight.is_fp4)
        out = packed_fp8.multiply_routed(inputs, weight, routing, x.dtype, gathered=True, gate_limit=limit)
        return out[routing.place].view(len(picks[rows]), 3, -1)

    whole, gated = run(slice(0, 200)), run(slice(0, 200), LIMIT)
    error = _error(whole, torch.einsum("nk,npok->npo", round_on_cpu(x.cpu()).cuda().double(), values[picks]))
    if not error < 4e-3:
        wrong.append(f"{name} routed: relative error {error:.1e}")
    apart = tokens.swiglu(whole.view(-1, 512), LIMIT).view(200, 3, -1)
    if not torch.equal(gated, apart):
        wrong.append(f"{name} gates: {(gated != apart).float().mean():.1e} of values differ from those of two kernels")
    for start, stop in ((50, 90), (3, 11), (60, 70), (9, 10)):
        if not torch.equal(run(slice(start, stop)), whole[start:stop]):
            wrong.append(f"{name} routed: rows {start} to {stop} differ alone")
        if not torch.equal(run(slice(start, stop), LIMIT), gated[start:stop]):
            wrong.append(f"{name} gates: rows {start} to {stop} differ alone")
    return wrong


def _error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


def measure_products(top: dict[str, float]) -> list[dict[str, Any]]:
    rows = []
    for case in cases():
        floor = max(case.num_bytes / top["copy_bytes_per_s"], case.num_flops / top["bf16_flops_per_s"]) * 1e3
        row: dict[str, Any] = {"name": case.name, "tokens": case.num_tokens, "floor_ms": round(floor, 4)}
        row["before_ms"] = _try_ms(case.before)
        wanted, times = None, {}
        for tile in case.tiles:
            label = f"{tile.outputs}x{tile.rows}x{tile.warps}x{tile.stages}"
            try:
                calls = case.run(tile)
                out = calls[0]()
                wanted = out if wanted is None else wanted
                times[label] = round(replay_ms(calls), 4)
                if not torch.equal(out, wanted):
                    row["bits"] = [*row.get("bits", []), label]
            except Exception as error:  # noqa: BLE001 - one tile's failure must not hide the others' times
                times[label] = None
                print(f"FAILED {case.name} {label}: {str(error)[-200:]}", flush=True)
        known = {label: ms for label, ms in times.items() if ms is not None}
        if known:
            best = min(known, key=lambda label: known[label])
            row |= {"best": best, "ms": known[best], "of_floor": round(floor / known[best], 3)}
        rows.append(row | {"tiles": times})
        print(json.dumps(rows[-1]), flush=True)
    rows += measure_grouped(top)
    return rows


def measure_candidates(top: dict[str, float]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for name in ("w1 and w3", "w2"):
        outputs, addends = (2 * INNER, HIDDEN) if name != "w2" else (HIDDEN, INNER)
        weight = draw_weight(FORMS["fp4"], NUM_EXPERTS, outputs, addends)
        takes = packed_fp4_shared.takes(weight)
        for num_tokens in (1, 32, 128, 2048, 8192):
            case = _routed(name, num_tokens, weight)
            floor = max(case.num_bytes / top["copy_bytes_per_s"], case.num_flops / top["bf16_flops_per_s"]) * 1e3
            row: dict[str, Any] = {"name": f"shared {case.name}", "tokens": num_tokens, "floor_ms": round(floor, 4)}
            in_use = packed_fp8.tile_of(weight, num_tokens * NUM_PICKED // NUM_EXPERTS, weight.codes.device)
            row |= {"takes": takes, "in_use_ms": _try_ms(lambda c=case, t=in_use: c.run(t))}
            want = case.run(in_use)[0]().float()
            shared = _shared(name, num_tokens, weight)
            times, errors = {}, {}
            for tile in SHARED_TILES:
                label = f"{tile.outputs}x{tile.rows}x{tile.warps}x{tile.stages}"
                times[label] = _try_ms(lambda t=tile, s=shared: s(t))
                if times[label] is not None:
                    errors[label] = f"{_error(shared(tile)[0](), want):.1e}"
            rows.append(row | {"tiles": times, "off_by": errors})
            print(json.dumps(rows[-1]), flush=True)
    return rows + measure_merged()


def _shared(name: str, num_tokens: int, weight: Weight) -> Callable[[Tile], list[Callable[[], torch.Tensor]]]:
    """Calls of the candidate. The inputs and picks are the same as those of `_routed`, because the seed is the same."""
    is_gated = name != "w2"
    torch.manual_seed(num_tokens)
    sets = [torch.rand(num_tokens, NUM_EXPERTS, device="cuda").argsort(1)[:, :NUM_PICKED].contiguous()]
    if num_tokens <= 8:
        sets += [torch.rand(num_tokens, NUM_EXPERTS, device="cuda").argsort(1)[:, :NUM_PICKED].contiguous()
                 for _ in range(7)]  # fmt: skip
    num_rows = num_tokens if is_gated else num_tokens * NUM_PICKED
    x = torch.randn(num_rows, weight.num_addends, device="cuda").bfloat16()
    inputs = packed_fp8.prepare_inputs(x, is_fp4=True)

    def run(tile: Tile) -> list[Callable[[], torch.Tensor]]:
        routings = [linear.route(picks, NUM_EXPERTS, tile=tile.rows) for picks in sets]
        return [
            lambda r=r: packed_fp4_shared.multiply_routed(
                inputs, weight, r, torch.bfloat16, gathered=is_gated, tile=tile, gate_limit=LIMIT if is_gated else None
            )
            for r in routings
        ]

    return run


def measure_merged() -> list[dict[str, Any]]:
    rows = []
    for name, parts, addends in MERGED:
        apart = [[draw_weight(FORMS["fp8"], 1, n, addends) for _ in range(copies(n * addends))] for n in parts]
        merged = [draw_weight(FORMS["fp8"], 1, sum(parts), addends) for _ in range(copies(sum(parts) * addends))]
        for num_tokens in (1, 32, 128, 2048):
            x = torch.randn(num_tokens, addends, device="cuda").bfloat16()
            inputs = packed_fp8.prepare_inputs(x, is_fp4=False).view(num_tokens, 1)
            times = [
                _try_ms(lambda w=w, i=inputs: [lambda e=e: packed_fp8.multiply(i, e, torch.bfloat16) for e in w])
                for w in (*apart, merged)
            ]
            rows.append({"name": name, "tokens": num_tokens, "apart_ms": times[:-1], "merged_ms": times[-1]})
            print(json.dumps(rows[-1]), flush=True)
    return rows


def measure_grouped(top: dict[str, float]) -> list[dict[str, Any]]:
    """Measure wo_a by packed_linear with each of its tiles."""
    name, groups, outputs, addends = GROUPED
    form = FORMS["fp8"].plain_inputs()
    weights = [draw_weight(form, groups, outputs, addends) for _ in range(copies(groups * outputs * addends))]
    kept, rows = packed_linear._TILES_FP8, []
    for num_tokens in TOKENS[:4]:
        x = torch.randn(num_tokens, groups, addends, device="cuda").bfloat16()
        few = ((64, 16, 128, 4, 4), (64, 16, 128, 4, 6), (64, 32, 128, 4, 4), (128, 16, 128, 8, 4))
        many = ((64, 64, 128, 4, 3), (128, 64, 128, 8, 4), (128, 128, 128, 8, 3), (128, 128, 64, 8, 4))
        num_bytes = groups * (outputs * addends + 2 * num_tokens * (outputs + addends))
        flops = 2 * num_tokens * groups * outputs * addends
        floor = max(num_bytes / top["copy_bytes_per_s"], flops / top["bf16_flops_per_s"]) * 1e3
        times = {}
        for tile in few if num_tokens <= 32 else many:
            packed_linear._TILES_FP8 = ((None, tile),)
            calls = [lambda w=w, x=x: packed_linear.multiply(x, w) for w in weights]
            times["x".join(map(str, tile))] = _try_ms(lambda c=calls: c)
        packed_linear._TILES_FP8 = kept
        calls = [lambda w=w, x=x: packed_linear.multiply(x, w) for w in weights]
        row = {"name": f"bf16 {name}", "tokens": num_tokens, "floor_ms": round(floor, 4), "tiles": times}
        rows.append(row | {"before_ms": _try_ms(lambda c=calls: c)})
        print(json.dumps(rows[-1]), flush=True)
    return rows


def _try_ms(calls: Callable[[], list[Callable[[], torch.Tensor]]]) -> float | None:
    try:
        return round(replay_ms(list(calls())), 4)
    except Exception as error:  # noqa: BLE001 - as above
        print(f"FAILED: {str(error)[-200:]}", flush=True)
        return None


def measure_layers() -> list[dict[str, Any]]:
    """Measure one layer of each kind; the figures are per layer."""
    model = draw_share(ranks=None, device="cuda", num_layers=4)
    layers = list(model.model.layers)
    config, rows = model.config, []
    for num_tokens in (1, 32, 128, 2048):
        x = torch.randn(num_tokens, config.hidden_size, device="cuda").bfloat16()
        ids = torch.arange(num_tokens, device="cuda")
        attended = torch.randn(num_tokens, config.num_heads, config.geometry.head_dim, device="cuda").bfloat16()
        angles = torch.randn(num_tokens, config.geometry.rope_dim // 2, device="cuda")
        cos, sin = angles.cos(), angles.sin()

        def feed_forward() -> list[Callable[[], object]]:
            return [lambda layer=layer: layer.mlp(x, ids) for layer in layers]  # noqa: B023

        def attention(layer: Any) -> None:
            own = layer.self_attn
            own.queries(own.query_residual(x), cos, sin)  # noqa: B023
            own.window_entries(x, cos, sin)  # noqa: B023
            own.output(attended, cos, sin)  # noqa: B023

        def projections() -> list[Callable[[], object]]:
            return [lambda layer=layer: attention(layer) for layer in layers]

        row: dict[str, Any] = {"tokens": num_tokens}
        for label, uses_fp8 in (("before", False), ("fp8", True)):
            packed.USES_FP8 = uses_fp8
            for part, calls in (("mlp", feed_forward), ("projections", projections)):
                row[f"{part}_{label}_ms"] = _try_ms(calls)  # type: ignore[arg-type]
        packed.USES_FP8 = False
        rows.append(row)
        print(json.dumps(row), flush=True)
    return rows


def measure_models(num_layers: int, top: dict[str, float]) -> dict[str, Any]:
    found = {}
    for label, uses_fp8 in (("fp8", True), ("before", False)):
        packed.USES_FP8 = uses_fp8
        print(label, flush=True)
        found[label] = measure_model(num_layers, 8192, top)
        torch.cuda.empty_cache()
    packed.USES_FP8 = False
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", nargs="+", default=list(STEPS), choices=STEPS)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path())
    parser.add_argument("--compile", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.manual_seed(0)
    if args.compile is not None:
        compile_all(args.compile)
        return
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    found: dict[str, Any] = {
        "command": " ".join(sys.argv), "commit": commit.stdout.strip(), "date": time.strftime("%Y-%m-%d"),
        "machine": f"one {torch.cuda.get_device_name()}, {os.cpu_count()} cores", "torch": torch.__version__,
    }  # fmt: skip
    args.out.mkdir(parents=True, exist_ok=True)
    has_failed = False
    with torch.inference_mode():
        top = found["ceilings"] = ceilings()
        print(json.dumps(found), flush=True)
        runs: dict[str, Callable[[], Any]] = {
            "compile": compile_in_processes, "check": check, "products": lambda: measure_products(top),
            "candidates": lambda: measure_candidates(top), "layers": measure_layers,
            "model": lambda: measure_models(args.layers, top),
        }  # fmt: skip
        for step in args.steps:
            started = time.perf_counter()
            try:
                found[step] = runs[step]()
                has_failed |= step == "check" and bool(found[step])
            except Exception:  # noqa: BLE001 - the other steps must still run
                has_failed = True
                traceback.print_exc()
            print(f"== {step}: {time.perf_counter() - started:.1f} s", flush=True)
            if step == "check":
                print(f"check: {len(found.get(step, []))} wrong", *found.get(step, ["it broke off"]), sep="\n  ")
            run_record.write(args.out / "packed_products.json", found, "torch", "triton")
    sys.exit(1 if has_failed else 0)


if __name__ == "__main__":
    main()
