"""How near are the cache path's kernels to the GPU's limits ("floors"), and how much faster than plain torch?

    python -m benchmarks.kernels --out benchmarks/results [--only PATTERN] [--compile PATTERN]

Needs a CUDA GPU. A kernel's floor is the larger of two times: its bytes over copy bandwidth, and its operations over
the dense BF16 matrix rate. Both rates are measured first. Times are medians of ten CUDA graph replays over rotated
operand sets, so a launch costs what it costs inside a graph. Eager and compiled torch are launched from Python, as
users run them. Writes kernels.json and kernels.md.
"""

from __future__ import annotations

import argparse
import gc
import re
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import run_record
from benchmarks.kernels_cases import Case, all_cases

REPEATS = 10
TARGET_MS = 4.0


def replay_ms(calls: list[Callable[[], object]]) -> float:
    """Median milliseconds of one call, from graph replays that run every call in turn."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    once = _events_ms(lambda: [call() for call in calls]) / len(calls)
    rounds = max(1, min(20, int(TARGET_MS / max(once * len(calls), 1e-3))))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls * rounds:
            call()
    graph.replay()
    times = [_events_ms(graph.replay) for _ in range(REPEATS)]
    del graph
    return statistics.median(times) / (rounds * len(calls))


def eager_ms(call: Callable[[], object]) -> float:
    """Median milliseconds of an eager call, launched from Python."""
    call()
    torch.cuda.synchronize()
    return statistics.median(_events_ms(call) for _ in range(5))


def _events_ms(call: Callable[[], object]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def ceilings() -> dict[str, float]:
    """Copy bandwidth (bytes read plus written) and BF16 matrix rate of this GPU."""
    source = torch.randn(1 << 29, device="cuda")
    target = torch.empty_like(source)
    copy = min(replay_ms([lambda: target.copy_(source)]), replay_ms([lambda: torch.neg(source, out=target)]))
    a = torch.randn(8192, 8192, device="cuda").bfloat16()
    b, c = torch.randn(8192, 8192, device="cuda").bfloat16(), torch.empty(8192, 8192, device="cuda").bfloat16()
    product = replay_ms([lambda: torch.matmul(a, b, out=c)])
    return {"copy_bytes_per_s": 8 * source.numel() / copy * 1e3, "bf16_flops_per_s": 2 * 8192**3 / product * 1e3}


def measure(case: Case, top: dict[str, float], compiled: bool) -> dict[str, Any]:
    """One row of the table."""
    ours = replay_ms(case.calls)
    bytes_ms = case.num_bytes / top["copy_bytes_per_s"] * 1e3
    flops_ms = case.num_flops / top["bf16_flops_per_s"] * 1e3
    row: dict[str, Any] = {
        "kernel": case.kernel,
        "shape": case.shape,
        "us": ours * 1e3,
        "bytes": case.num_bytes,
        "flops": case.num_flops,
        "floor_us": max(bytes_ms, flops_ms) * 1e3,
        "bound": "bytes" if bytes_ms >= flops_ms else "flops",
        "fraction": max(bytes_ms, flops_ms) / ours,
        "bandwidth_fraction": bytes_ms / ours,
    }
    if case.eager is not None:
        try:
            row["eager_us"] = eager_ms(case.eager) * case.eager_scale * 1e3
        except torch.OutOfMemoryError:
            row["eager_us"] = None
        if compiled:
            row["compile_us"] = eager_ms(torch.compile(case.eager, dynamic=False)) * case.eager_scale * 1e3
    return row


def table(rows: list[dict[str, Any]], top: dict[str, float], device: str) -> str:
    """The rows as Markdown."""
    lines = [
        f"{device}, torch {torch.__version__}: copy {top['copy_bytes_per_s'] / 1e12:.2f} TB/s, "
        f"BF16 product {top['bf16_flops_per_s'] / 1e12:.0f} TFLOP/s.",
        "",
        "| kernel | shape | us | floor us | bound | of floor | of bandwidth | eager us | x eager | compile us |",
        "| --- | --- | ---: | ---: | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for r in rows:
        plain, compiled = r.get("eager_us"), r.get("compile_us")
        times = "" if plain is None else f"{plain / r['us']:.1f}"
        lines.append(
            f"| {r['kernel']} | {r['shape']} | {r['us']:.1f} | {r['floor_us']:.1f} | {r['bound']} "
            f"| {r['fraction']:.2f} | {r['bandwidth_fraction']:.2f} | {_whole(plain)} | {times} | {_whole(compiled)} |"
        )
    return "\n".join(lines) + "\n"


def _whole(us: float | None) -> str:
    return "" if us is None else f"{us:.0f}"


def main() -> None:
    """Run the cases and write both files. If a case failed, its row says so."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", default="")
    parser.add_argument("--compile", default="^$")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit-s", type=float, default=1e9)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks.kernels needs a CUDA card")
    args.out.mkdir(parents=True, exist_ok=True)
    top = ceilings()
    rows: list[dict[str, Any]] = []
    began = time.monotonic()
    for case in all_cases(args.seed, args.only):
        name = f"{case.kernel} {case.shape}"
        compiled = bool(re.search(args.compile, name))
        try:
            rows.append(measure(case, top, compiled))
        except Exception as error:  # noqa: BLE001 - one shape's failure must not hide the others' figures
            print(f"FAILED {name}: {str(error)[-400:]}", flush=True)
        del case
        gc.collect()
        torch.cuda.empty_cache()
        _write(args.out, rows, top)
        if time.monotonic() - began > args.limit_s:
            print("stopped at the time limit", flush=True)
            break
    print(table(rows, top, torch.cuda.get_device_name()))


def _write(out: Path, rows: list[dict[str, Any]], top: dict[str, float]) -> None:
    device = torch.cuda.get_device_name()
    run_record.write(out / "kernels.json", {"device": device, "ceilings": top, "rows": rows}, "torch", "triton")
    (out / "kernels.md").write_text(table(rows, top, device))


if __name__ == "__main__":
    main()
