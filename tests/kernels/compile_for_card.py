"""Compiles every kernel that a worker launches for Hopper, on a machine without a card, and says which do not compile.

    python -m tests.kernels.compile_for_card [--cases NAME ...] [--jobs N] [--threads N] [--out FILE]

The model's own code runs in V4-Flash's and V4-Pro's widths on tensors without numbers (`pretended_card`), so kernels
have the types, tiles and constants of a real card. On a machine with a card the program fills Triton's cache, so that
later launches find their kernels compiled. The exit status is 1 if a kernel fails.

This is a separate program, because in a test's process Triton's interpreter replaces the kernels.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton

from antefix.layout import KVFormat
from antefix.model import Model, ModelConfig, Sequence, WindowState, forward
from antefix.model.card_pool import CardPool
from antefix.model.load_plan import dtype_of
from antefix.model.ranks import Ranks
from antefix.model.triton_ops import TritonOps
from antefix_kernels import linear, packed_fp4_shared, packed_fp8
from antefix_kernels.packed_linear import Weight
from benchmarks import drawn_flash
from benchmarks.decode_on_card import FLASH, KINDS
from benchmarks.packed_products import SHARED_TILES
from tests.kernels.pretended_card import Compiled, pretended_card, why

PRO = FLASH | {
    "num_attention_heads": 128, "hidden_size": 7168, "q_lora_rank": 1536, "o_groups": 16, "index_topk": 1024,
    "moe_intermediate_size": 3072, "n_routed_experts": 384,
}  # fmt: skip
BLOCKS = 80


def bfloat16_model(fields: dict[str, Any]) -> Model:
    config = ModelConfig.from_dict(fields | {"num_hidden_layers": 4, "layer_types": [KINDS[kind] for kind in "WCHC"]})
    with torch.device("meta"):
        model = Model(config, kv_format=KVFormat.FP8)
    return _placed(model, lambda name, like: dtype_of(name, like, torch.bfloat16))


def released_model(ranks: Ranks | None = None) -> Model:
    """Four layers in V4-Flash's released formats."""
    made: Any = drawn_flash
    held = made._draw, made.inverse_frequencies, torch.Generator
    made.inverse_frequencies = lambda _, rope_dim: torch.empty(rope_dim // 2, device="cuda")
    made._draw = lambda name, like, module, config, dtype, _: torch.empty(
        like.shape, dtype=dtype_of(name, like, dtype) if like.dtype.is_floating_point else like.dtype, device="cuda"
    )
    torch.Generator = lambda _: torch._C.Generator()  # type: ignore[misc, assignment]
    try:
        return drawn_flash.draw_share(ranks=ranks, device="cuda:0", num_layers=5)
    finally:
        made._draw, made.inverse_frequencies, torch.Generator = held  # type: ignore[misc]


def _placed(model: Model, dtype: Callable[[str, torch.Tensor], torch.dtype]) -> Model:
    state = {
        name: torch.empty(like.shape, dtype=dtype(name, like), device="cuda")
        for name, like in model.state_dict().items()
    }
    model.load_state_dict(state, strict=True, assign=True)
    for name in ("rope_main", "rope_compress"):
        setattr(model, name, torch.empty(getattr(model, name).shape, device="cuda"))
    return model.requires_grad_(False).eval()


class _Alone(Ranks):
    """A rank that exchanges nothing, because only shapes matter here."""

    def merge(self, x: torch.Tensor, is_mine: torch.Tensor) -> torch.Tensor:
        return torch.where(is_mine, x, -0.0)

    def _gather(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [x] * self.size


def serve(model: Model, *, reproducible: bool, chunks: tuple[int, ...], steps: tuple[int, ...]) -> None:
    """Run a prompt in chunks, sequence by sequence, and then steps of several sequences in shared launches."""
    alone = TritonOps(model.layout, reproducible=reproducible)
    pool = CardPool(model.layout, BLOCKS, model.device, takes_payloads=False)
    table = list(range(BLOCKS))
    for length in chunks:
        sequence = Sequence(table, WindowState.zeros(model.layout, 0, model.device))
        forward(model, pool, [(sequence, np.zeros(length, np.uint32))], ops=alone)
        forward(model, pool, [(sequence, np.zeros(min(length, 100), np.uint32))], logits="all", ops=alone)
    together = TritonOps(model.layout, reproducible=reproducible, batched=True, chunks=True)
    for count in steps:
        batch = [Sequence(table, WindowState.zeros(model.layout, 900, model.device)) for _ in range(count)]
        forward(model, pool, [(each, np.zeros(1, np.uint32)) for each in batch], ops=together)
        several = [(each, np.zeros(2, np.uint32)) for each in batch[:64]]
        forward(model, pool, several, logits="all", ops=together)


def candidates() -> None:
    """Run the kernels that no worker uses yet, as benchmarks/packed_products.py does."""
    form = drawn_flash.FORMS["fp4"]
    for outputs, addends, is_gated in ((4096, 4096, True), (4096, 2048, False)):
        shape = torch.Size((256, outputs, addends))
        weight = Weight(
            codes=torch.empty(form.code_shape(shape), dtype=torch.uint8, device="cuda:0"),
            scales=torch.empty(form.scale_shape(shape), dtype=torch.uint8, device="cuda:0").view(drawn_flash.E8M0),
            block=form.block,
        )
        for tile in SHARED_TILES:
            picks = torch.empty(2048, 6, dtype=torch.long, device="cuda:0")
            routing = linear.route(picks, 256, tile=tile.rows)
            x = torch.empty(2048 * (1 if is_gated else 6), addends, dtype=torch.bfloat16, device="cuda:0")
            inputs = packed_fp8.prepare_inputs(x, is_fp4=True)
            packed_fp4_shared.multiply_routed(
                inputs, weight, routing, torch.bfloat16, gathered=is_gated, tile=tile,
                gate_limit=10.0 if is_gated else None,
            )  # fmt: skip


CASES: dict[str, Callable[[], None]] = {
    "flash": lambda: serve(bfloat16_model(FLASH), reproducible=False, chunks=(2048, 8192), steps=(1, 32, 128)),
    "flash-reproducible": lambda: serve(bfloat16_model(FLASH), reproducible=True, chunks=(2048,), steps=(1, 32, 128)),
    "pro": lambda: serve(bfloat16_model(PRO), reproducible=False, chunks=(2048,), steps=(1, 32)),
    "released": lambda: serve(released_model(), reproducible=False, chunks=(2048, 8192), steps=(1, 8, 32, 128)),
    "released-reproducible": lambda: serve(released_model(), reproducible=True, chunks=(2048,), steps=(1, 32, 128)),
    "candidates": candidates,
    "released-half": lambda: serve(
        released_model(_Alone(rank=1, size=2)), reproducible=False, chunks=(2048,), steps=(1, 32, 128)
    ),
}


def compile_case(name: str, threads: int = 1) -> dict[str, Any]:
    torch.__future__.set_swap_module_params_on_conversion(False)
    began = time.perf_counter()
    with contextlib.ExitStack() as stack:
        found = stack.enter_context(pretended_card())
        if threads > 1:
            # The case's code continues while other threads compile kernels.
            pool = stack.enter_context(ThreadPoolExecutor(threads))
            stack.enter_context(triton.AsyncCompileMode(pool, ignore_errors=True))
        try:
            CASES[name]()
        except Exception as err:
            # The result includes the kernels that were compiled before the failure.
            found.failures.append((f"case {name}", why(err)))
        found.finish()
    return {"case": name, "seconds": time.perf_counter() - began, "triton": triton.__version__, **_told(found)}


def _told(found: Compiled) -> dict[str, Any]:
    kernels = {name: {"forms": forms, "seconds": found.seconds[name]} for name, forms in sorted(found.forms.items())}
    return {"kernels": kernels, "failures": found.failures}


def _apart(name: str, threads: int) -> dict[str, Any]:
    """Run a case in a separate process."""
    run = subprocess.run(
        [sys.executable, "-m", "tests.kernels.compile_for_card", "--cases", name, "--threads", str(threads),
         "--out", "-"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    lines = run.stdout.strip().splitlines()
    if not lines or not lines[-1].startswith("["):
        return {"case": name, "seconds": 0.0, "kernels": {}, "failures": [(f"case {name}", run.stderr[-3000:])]}
    found: dict[str, Any] = json.loads(lines[-1])[0]
    return found


def _run_all(names: list[str], jobs: int, threads: int) -> Iterator[dict[str, Any]]:
    """Yield each case's result as soon as it is ready."""
    if jobs == 1:
        yield from (compile_case(name, threads) for name in names)
        return
    with ThreadPoolExecutor(jobs) as pool:
        for future in as_completed([pool.submit(_apart, name, threads) for name in names]):
            yield future.result()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--jobs", type=int, default=1, help="cases at once, each in a process of its own")
    parser.add_argument("--threads", type=int, help="that compile, of each case (default: the processors by --jobs)")
    parser.add_argument("--out", help="a JSON file; -: to standard output, alone")
    args = parser.parse_args()
    jobs = min(args.jobs, len(args.cases))
    threads = args.threads or max(1, (os.cpu_count() or 1) // jobs)
    told = []
    for case in _run_all(args.cases, jobs, threads):
        told.append(case)
        if args.out != "-":
            _print(case)
        if args.out not in (None, "-"):
            Path(args.out).write_text(json.dumps(told, indent=1) + "\n")
    if args.out == "-":
        print(json.dumps(told))
        return 0
    return 1 if any(case["failures"] for case in told) else 0


def _print(case: dict[str, Any]) -> None:
    forms = sum(kernel["forms"] for kernel in case["kernels"].values())
    print(
        f"{case['case']}: {len(case['kernels'])} kernels in {forms} forms, {case['seconds']:.0f} s,"
        f" {len(case['failures'])} failures",
        flush=True,
    )
    for name, reason in case["failures"]:
        print(f"  {name}\n{reason}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
